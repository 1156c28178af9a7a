"""What profiles favour, against tables computed by hand."""

from pathlib import Path

import numpy as np
import pytest

from components.evaluate.profiles import MIN_GROUP, report, sentiment, source_texts
from components.ids import TRAIN
from components.ingest.dataset import Dataset
from tests.sideinfo_parents import SMALL, write_ingest

# three profiles, and an item without one: two point the same way, one across
TEXT = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=np.float32)
SIDE = np.array([[3.0, 0.0], [0.0, 2.0], [0.0, -2.0], [5.0, 5.0]], dtype=np.float32)
PROFILES = ["a wonderful, wonderful tool", "a tool for the shed", "a dull thing", ""]
SOURCES = ["a wonderful tool with teeth", "a tool", "a thing", "the best"]
POPULARITY = np.array([8, 8, 1, 100])
TOPS = {"factual": np.array([[0, 1], [0, 3], [0, -1]]), "debiased": np.array([[2, 1], [0, 3], [1, 2]])}


def reported(**changes: object) -> dict:
    arguments = {
        "profiles": PROFILES,
        "sources": SOURCES,
        "groups": [["Kind: tool"], ["Kind: tool"], ["Kind: thing"], ["Kind: tool"]],
        "text": TEXT,
        "references": None,
        "side": SIDE,
        "popularity": POPULARITY,
        "tops": TOPS,
    }
    found = report(**{**arguments, **changes})  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0.0), ("A wonderful, dull tool", 0.0), ("WONDERFUL tool", 0.5), ("a dull dull thing", -0.5), ("1995", 0.0)],
)
def test_sentiment_is_the_balance_of_words_over_all_words(text: str, expected: float) -> None:
    assert sentiment(text) == expected


def test_genericness_is_the_mean_cosine_of_profiles_before_and_after_the_encoder() -> None:
    found = reported()
    assert found["items"] == 3
    text, side = found["genericness"]["text"], found["genericness"]["side"]
    # cosines of the text: 1, 1, 0; 1, 1, 0; 0, 0, 1. Means 2/3, 2/3, 1/3
    assert text["mean"] == pytest.approx(5 / 9, abs=1e-6)
    assert text["std"] == pytest.approx(np.std([2 / 3, 2 / 3, 1 / 3]), abs=1e-6)
    # of the side representations: 1, 0, 0; 0, 1, -1; 0, -1, 1. Means 1/3, 0, 0
    assert side["mean"] == pytest.approx(1 / 9, abs=1e-6)
    # log(1 + popularity) takes two values, high where the text is generic: a perfect correlation
    assert text["correlation_log_popularity"] == pytest.approx(1.0)
    assert side["correlation_log_popularity"] == pytest.approx(0.5)


def test_inflation_is_the_profiles_sentiment_less_its_sources() -> None:
    found = reported()["sentiment"]
    # profiles 2/4, 0, -1/3; sources 1/5, 0, 0: inflation 3/10, 0, -1/3
    assert found["profile"] == pytest.approx((1 / 2 - 1 / 3) / 3, abs=1e-6)
    assert found["source"] == pytest.approx(1 / 15, abs=1e-6)
    assert found["inflation"]["mean"] == pytest.approx((3 / 10 - 1 / 3) / 3, abs=1e-6)
    expected = np.corrcoef([0.3, 0, -1 / 3], np.log1p([8, 8, 1]))[0, 1]
    assert found["inflation"]["correlation_log_popularity"] == pytest.approx(expected, abs=1e-6)


def test_exposure_is_set_against_what_the_profiles_favour_before_and_after_debiasing() -> None:
    found = reported()["exposure"]
    # appearances: factual 3, 1, 0; debiased 1, 2, 2
    for score, counts in (("factual", [3, 1, 0]), ("debiased", [1, 2, 2])):
        generic, inflated = ([2 / 3, 2 / 3, 1 / 3], [0.3, 0, -1 / 3])
        assert found[score]["correlation_genericness"] == pytest.approx(np.corrcoef(counts, generic)[0, 1], abs=1e-6)
        assert found[score]["correlation_inflation"] == pytest.approx(np.corrcoef(counts, inflated)[0, 1], abs=1e-6)
    assert found["debiased"]["correlation_inflation"] < 0 < found["factual"]["correlation_inflation"]


def test_what_is_written_anyway_is_the_share_of_a_profile_along_its_reference() -> None:
    assert reported()["written_anyway"] is None
    # less the mean of the profiles, (2/3, 1/3): texts (1, -1)/3 twice and (-2, 2)/3; references along it, across it, and none
    references = np.array([[1.0, 0.0], [1.0, 2 / 3], [0.0, 0.0], [3.0, 3.0]])
    found = reported(references=references)
    assert found["written_anyway"]["mean"] == pytest.approx(1 / 3, abs=1e-6)
    counts, share = [3, 1, 0], [1, 0, 0]
    expected = np.corrcoef(counts, share)[0, 1]
    assert found["exposure"]["factual"]["correlation_written_anyway"] == pytest.approx(expected, abs=1e-6)
    assert found["groups"][0]["written_anyway"] == pytest.approx(1 / 3, abs=1e-6)
    assert "written_anyway" not in reported()["groups"][0]


def test_groups_of_enough_items_have_their_means_beside_those_of_all() -> None:
    times = MIN_GROUP  # every item so often: groups of 2 and 1 times that
    many = {
        "profiles": PROFILES[:3] * times,
        "sources": SOURCES[:3] * times,
        "groups": [["Kind: tool"], ["Kind: tool", "Kind: tool"], ["Kind: thing", "Rare"]] * 2
        + [["Kind: tool"], ["Kind: tool"], ["Kind: thing"]] * (times - 2),
        "text": np.tile(TEXT[:3], (times, 1)),
        "side": np.empty((3 * times, 0)),
        "popularity": np.tile(POPULARITY[:3], times),
        "tops": {"factual": np.array([[0, 1], [0, 1]]), "debiased": np.array([[2, 2], [2, 0]])},
    }
    every, tool, thing = reported(**many)["groups"]
    assert [row["group"] for row in (every, tool, thing)] == ["all", "Kind: tool", "Kind: thing"]
    assert [row["items"] for row in (every, tool, thing)] == [15, 10, 5]
    assert "genericness_side" not in every
    assert tool["genericness_text"] == pytest.approx(2 / 3, abs=1e-6)
    assert tool["inflation"] == pytest.approx(0.15, abs=1e-6)
    assert thing["inflation"] == pytest.approx(-1 / 3, abs=1e-6)
    # four places among 15 items; tools (10 items) hold all of the factual ones and one of the debiased ones
    assert (every["exposure_factual"], tool["exposure_factual"], thing["exposure_factual"]) == (1.0, 1.5, 0.0)
    assert tool["exposure_debiased"] == pytest.approx(1 / 10 * 15 / 4)
    assert thing["exposure_debiased"] == pytest.approx(3 / 5 * 15 / 4)


def test_without_any_profile_there_is_nothing_to_measure() -> None:
    nothing = report(["", ""], ["a", "b"], [[], []], TEXT[:2], None, SIDE[:2], POPULARITY[:2], TOPS)
    assert nothing is None


def test_a_source_is_what_is_known_of_the_item_and_said_of_it_in_training(tmp_path: Path) -> None:
    data = Dataset.load(write_ingest(tmp_path, SMALL).path())
    told = data.interactions.assign(review=["good"] + [""] * (len(data.interactions) - 2) + ["held out"])
    training = Dataset(data.name, data.users, data.items, told).only(TRAIN)
    assert source_texts(training) == [
        "Alien 1979 Horror, Sci-Fi good",
        "Blade Runner 1982 Sci-Fi",
        "Casablanca 1942 Drama",
        "Dogma. 1999 Drama",
        "50",
    ]

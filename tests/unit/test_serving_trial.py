"""A challenger beside the champion: who belongs to its share, who answers whom, and how far two rankings are apart."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from structlog.testing import capture_logs

from serving.approximate import Exactness
from serving.lifecycle import Follower, Target, load
from serving.recommender import Question
from serving.schemas import Method, RankedItem, RecommendRequest, UserRecommendations
from serving.settings import Trial, place
from serving.trial import MAX_WAITING, Shadow, difference, joined, model_of, parts
from tests.bundles import write_item_columns, write_random_bundle

USERS = [f"user {number}" for number in range(20_000)]


def test_a_place_is_a_hash_of_user_and_challenger() -> None:
    digest = hashlib.sha256(b"0123\nanna").digest()
    assert place("anna", "0123") == int.from_bytes(digest[:8], "big") / 2**64
    assert 0 <= place("\ud800", "0123") < 1  # no valid text, and no reason to fail


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_a_share_of_the_users_is_that_share_and_always_the_same_users(share: float) -> None:
    trial = Trial(mode="canary", share=share)
    held = [trial.holds(user, "a" * 16) for user in USERS]
    assert np.mean(held) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(USERS)))
    assert held == [trial.holds(user, "a" * 16) for user in USERS]


def test_a_larger_share_holds_everybody_of_a_smaller_one_and_another_challenger_others() -> None:
    small, large = Trial(mode="canary", share=0.1), Trial(mode="canary", share=0.2)
    assert all(large.holds(user, "a" * 16) for user in USERS if small.holds(user, "a" * 16))
    both = [small.holds(user, "a" * 16) and small.holds(user, "b" * 16) for user in USERS]
    assert np.mean(both) == pytest.approx(0.01, abs=0.003)


def test_a_bare_off_is_off_as_yaml_reads_it() -> None:
    assert Trial.model_validate(yaml.safe_load("{mode: off, share: 0.1}")) == Trial(share=0.1)


def test_a_trial_without_a_share_needs_no_challenger() -> None:
    assert [Trial(mode=mode, share=share).needs() for mode, share in (("off", 1), ("canary", 0), ("shadow", 0.1))] == [
        False,
        False,
        True,
    ]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    root = tmp_path_factory.mktemp("bundles")
    found = []
    for seed in range(2):
        write_random_bundle(root / str(seed), seed=seed)
        found.append(Target(str(seed + 1), f"{seed}" * 16, "/store", str(root / str(seed))))
    return found


class Told:
    """Remembers comparisons."""

    def __init__(self) -> None:
        self.overlaps: list[float] = []
        self.missed = 0

    def compared(self, model_version: str, overlap: float, difference: float | None) -> None:
        assert model_version == "2"
        self.overlaps.append(overlap)

    def left_out(self, model_version: str) -> None:
        self.missed += 1


def test_every_user_is_answered_by_his_own_model_in_the_order_asked(bundles: list[Target]) -> None:
    champion, challenger = map(load, bundles)
    trial = Trial(mode="canary", share=0.5)
    users = [f"u{row}" for row in range(40)]
    request = RecommendRequest(users=users, k=5, recent={user: ["i1"] for user in users[::3]}, debias=0.5)
    histories = [[f"i{row}" for row in range(at, at + 60)] for at in range(len(users))]
    asked = Question(request, histories)
    split = parts(trial, champion, challenger, asked)
    assert [part.model for part in split] == [champion, challenger]
    answers = [(part.places, part.model.recommender.recommend(*part.question)) for part in split]
    answer = joined(answers)
    assert answer.model_version == "1"
    assert [result.user_id for result in answer.results] == users
    whole = [live.recommender.recommend(request, histories) for live in (champion, challenger)]
    for at, result in enumerate(answer.results):
        tried = place(result.user_id, challenger.target.fingerprint) < 0.5
        expected = whole[tried].results[at]
        assert result.model_copy(update={"items": []}) == expected.model_copy(update={"items": []})
        assert [item.item_id for item in result.items] == [item.item_id for item in expected.items]
        # of fewer users at a time, whose products may be rounded otherwise
        assert [item.score for item in result.items] == pytest.approx([item.score for item in expected.items], abs=1e-6)
    assert {result.model_version for result in answer.results} == {"1", "2"}
    only = [user for user in users if place(user, challenger.target.fingerprint) < 0.5]
    of_share = Question(RecommendRequest(users=only), [[]] * len(only))
    assert [part.model for part in parts(trial, champion, challenger, of_share)] == [challenger]
    assert [user for user in users if model_of(trial, champion, challenger, user) is challenger] == only
    for other in (Trial(mode="shadow", share=1.0), Trial(share=1.0)):
        assert [part.model for part in parts(other, champion, challenger, asked)] == [champion]
        assert {model_of(other, champion, challenger, user).target for user in users} == {champion.target}
    assert [part.model for part in parts(trial, champion, None, asked)] == [champion]


def ranking(*items: tuple[str, float], method: Method = "personalised") -> UserRecommendations:
    ranked = [RankedItem(rank=at, item_id=item, title="", score=score) for at, (item, score) in enumerate(items, start=1)]
    return UserRecommendations(user_id="u", model_version="1", debias=0.5, cold=False, method=method, reason=None, items=ranked)


def test_two_rankings_differ_by_what_only_one_names_and_by_the_scores_of_what_both_name() -> None:
    ours, theirs = ranking(("a", 3), ("b", 2), ("c", 1), ("d", 0)), ranking(("b", 4), ("a", 2), ("x", 1), ("y", 0))
    assert difference(ours, theirs) == (0.5, 1.5)
    assert difference(ours, ours) == (1.0, 0.0)
    assert difference(ours, ranking(("x", 1))) == (0.0, None)
    assert difference(ranking(), ranking()) == (0.0, None)
    for short, long in ((ours, ranking(("a", 3))), (ranking(("a", 3)), ours)):  # of a longer ranking, whosever it is
        assert difference(short, long) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [
        ("fold_in", "fold_in", 2.0),
        ("personalised", "fold_in", None),
        ("popularity", "popularity", 2.0),
        ("side_information", "side_information", None),
    ],
)
def test_scores_are_compared_only_where_both_are_in_standard_deviations(
    first: Method, second: Method, apart: float | None
) -> None:
    assert difference(ranking(("a", 3), method=first), ranking(("a", 1), method=second)) == (1.0, apart)


def test_a_shadow_compares_and_leaves_out_what_would_pile_up(bundles: list[Target]) -> None:
    champion, challenger = map(load, bundles)
    request = RecommendRequest(users=["u1", "u2"], k=10)
    answer = champion.recommender.recommend(request, [[], []])
    told = Told()
    shadow = Shadow(told)
    held = shadow._thread.submit(time.sleep, 0.3)
    for _ in range(MAX_WAITING + 3):
        shadow.compare(challenger, Question(request, [[], []]), answer)
    assert told.missed == 3
    held.result()
    shadow._thread.submit(lambda: None).result()  # all before it are through, and there is room again
    shadow.compare(challenger, Question(request, [[], []]), answer)
    assert told.missed == 3
    shadow._thread.shutdown()
    other = challenger.recommender.recommend(request, [[], []])
    expected = [difference(*pair)[0] for pair in zip(answer.results, other.results, strict=True)]
    assert told.overlaps == expected * (MAX_WAITING + 1)


def test_what_a_challenger_cannot_filter_by_is_left_out_of_the_comparison(bundles: list[Target], tmp_path: Path) -> None:
    bundle = write_random_bundle(tmp_path / "filtered", seed=0)
    write_item_columns(bundle, genres=["Drama"] * 200)
    champion, challenger = load(replace(bundles[0], bundle_dir=str(bundle))), load(bundles[1])
    asked = Question(RecommendRequest(users=["u1"], k=5, filters={"genres": ["Drama"]}), [[]])
    told = Told()
    shadow = Shadow(told)
    with capture_logs() as logged:
        shadow.compare(challenger, asked, champion.recommender.recommend(*asked))
        shadow._thread.shutdown()
    assert (told.missed, told.overlaps, logged) == (1, [], [])


# -- the challenger of a replica ------------------------------------------------------------------------------------------


class Events:
    """Remembers what happened."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def swapped(self, before: Target | None, now: Target) -> None:
        self.told.append(("swapped", now.model_version))

    def measured(self, target: Target, exactness: Exactness) -> None:
        assert self.told[-1] == ("swapped", target.model_version)

    def refused(self, target: Target) -> None:
        self.told.append(("refused", target.model_version))

    def settled(self, on_champion: bool) -> None:
        return

    def tried(self, before: Target | None, now: Target | None) -> None:
        self.told.append(("tried", "nobody" if now is None else now.model_version))


def test_a_challenger_is_held_while_it_is_tried_and_taken_over_when_it_is_promoted(bundles: list[Target]) -> None:
    champion, challenger = bundles
    events = Events()
    named = [champion]
    follower = Follower([champion], lambda: named[-1], events, 1, lambda: challenger)
    follower.look()
    assert follower.challenger is None
    follower.tries = True
    follower.look()
    held = follower.challenger
    assert held is not None
    assert (follower.live.target, held.target) == (champion, challenger)
    named.append(challenger)
    follower.look()
    assert follower.live is held  # not loaded once more
    assert follower.challenger is None
    follower.tries = False
    follower.look()
    assert events.told == [("swapped", "1"), ("tried", "2"), ("swapped", "2"), ("tried", "nobody")]


def test_a_refused_challenger_leaves_the_champion_and_is_told_once(bundles: list[Target], tmp_path: Path) -> None:
    champion, _ = bundles
    damaged = Target("9", "9" * 16, "/store", str(write_random_bundle(tmp_path / "damaged", seed=5)))
    (tmp_path / "damaged" / "users.json").write_text("{")
    events = Events()
    follower = Follower([champion], lambda: champion, events, 1, lambda: damaged)
    follower.tries = True
    for _ in range(4):
        follower.look()
    assert (follower.live.target, follower.challenger) == (champion, None)
    assert events.told.count(("refused", "9")) == 1

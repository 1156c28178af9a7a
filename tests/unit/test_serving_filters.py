"""Filters by columns of the items' table: what a bundle carries, what is answered, what is refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from components.errors import ArtifactError, ConfigError
from components.sideinfo.metadata import attribute
from components.train import attributes
from components.train.attributes import attributes_of
from components.train.config import TrainConfig
from serving.approximate import Exactness, ItemIndex
from serving.attributes import Attributes, FilterError, Filters
from serving.bundle import ATTRIBUTES_FILE
from serving.lifecycle import Target, load
from serving.lists import RankedLists
from serving.recommender import Recommender
from serving.schemas import Filter, Range, RecommendRequest
from serving.scorer import Scorer
from tests.bundles import write_bundle, write_factor_bundle, write_item_columns, write_random_bundle

NUM_ITEMS = 200
GENRES = [
    ", ".join(genre for genre, every in (("Comedy", 2), ("Drama", 3), ("War", 50)) if row % every == 0) for row in range(200)
]
YEARS = [str(1900 + row) if row % 10 else "" for row in range(NUM_ITEMS)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_random_bundle(tmp_path_factory.mktemp("filters") / "bundle", num_items=NUM_ITEMS)
    return write_item_columns(directory, genres=GENRES, year=YEARS)


@pytest.fixture(scope="module")
def recommender(bundle: Path) -> Recommender:
    return load(Target("7", "f" * 16, "", str(bundle))).recommender


def passes(row: int, filters: dict[str, Filter]) -> bool:
    """The definition, item by item."""
    genres, year = filters.get("genres"), filters.get("year")
    has_genre = genres is None or bool(set(GENRES[row].split(", ")) & set(genres if isinstance(genres, list) else ()))
    if not isinstance(year, Range):
        return has_genre
    least, most = (year.min or 0), (year.max or 9999)
    return has_genre and YEARS[row] != "" and least <= int(YEARS[row]) <= most


FILTERS: list[dict[str, Filter]] = [
    {"genres": ["Comedy"]},
    {"genres": ["War", "Drama"]},
    {"year": Range(min=1950)},
    {"genres": ["Comedy"], "year": Range(min=1932, max=1958)},  # both ends are of a comedy each
]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(
    ("user", "recent", "method"),
    [("u3", [], "personalised"), ("new", ["i4", "i7"], "fold_in"), ("new", [], "popularity")],
)
def test_every_rung_answers_with_the_best_of_the_items_that_pass(
    recommender: Recommender, user: str, recent: list[str], method: str, filters: dict[str, Filter]
) -> None:
    asked = {"users": [user], "k": 12, "recent": {user: recent}}
    (everything,) = recommender.recommend(RecommendRequest(**{**asked, "k": NUM_ITEMS}), [[]]).results
    (found,) = recommender.recommend(RecommendRequest(**asked, filters=filters), [[]]).results
    expected = [item.item_id for item in everything.items if passes(int(item.item_id[1:]), filters)][:12]
    assert found.method == method
    assert [item.item_id for item in found.items] == expected != []
    static = recommender.popular(NUM_ITEMS).recommend(RecommendRequest(**asked, filters=filters), [[]], "away")
    popular = [item for item in recommender.popular(NUM_ITEMS).debiased.items if item.item_id not in recent]
    wanted = [item.item_id for item in popular if passes(int(item.item_id[1:]), filters)][:12]
    assert [item.item_id for item in static.results[0].items] == wanted


def test_filters_go_with_allow_deny_and_compare(recommender: Recommender) -> None:
    request = RecommendRequest(
        users=["u1"],
        k=10,
        exclude_seen=False,
        allow=["i0", "i2", "i3", "i4", "i6"],
        deny=["i4"],
        filters={"genres": ["Comedy"]},
        compare=True,
    )
    (found,) = recommender.recommend(request, [[]]).results
    assert {item.item_id for item in found.items} == {item.item_id for item in found.factual or []} == {"i0", "i2", "i6"}
    assert sorted(item.factual_rank or 0 for item in found.items) == [1, 2, 3]  # among the candidates


def test_neither_lists_nor_an_index_give_a_short_or_another_answer(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    num_items, k = 3_000, 20
    directory = write_factor_bundle(tmp_path / "bundle", num_users=30, num_items=num_items, embedding_dim=8)
    write_item_columns(directory, tag=["rare" if row % 100 == 0 else "common" for row in range(num_items)])
    scorer, attributes = Scorer.load(directory), Attributes.read(directory, num_items)
    exact = Recommender(scorer, "1", attributes=attributes)
    index = ItemIndex(scorer, "float32")
    index.effort = index.num_cells  # looks everywhere
    best = [scorer.recommend(user, 40, exclude=scorer.seen(user)) for user in range(30)]
    lists = RankedLists(np.stack([one.rows for one in best]).astype(np.int32), np.stack([one.scores for one in best]))
    quick = [
        Recommender(scorer, "1", index=index, attributes=attributes),
        Recommender(scorer, "1", exactness=Exactness(lists="on"), lists=lists, attributes=attributes),
    ]
    for tag, count in (("rare", k), ("common", k)):
        request = RecommendRequest(users=[f"u{user}" for user in range(30)], k=k, filters={"tag": [tag]})
        wanted = exact.recommend(request, [[]] * 30).results
        for one in quick:
            for ours, theirs in zip(one.recommend(request, [[]] * 30).results, wanted, strict=True):
                assert len(ours.items) == count
                assert [item.item_id for item in ours.items] == [item.item_id for item in theirs.items]


@pytest.mark.parametrize(
    ("filters", "message", "hint"),
    [
        ({"genre": ["Comedy"]}, "cannot be filtered by 'genre'", "Did you mean 'genres'? Allowed: genres, year."),
        ({"genres": ["Comdy"]}, "no item has 'genres' = 'Comdy'", "Did you mean 'Comedy'? Allowed: Comedy, Drama, War."),
        (
            {"year": ["1950"]},
            "'year' has numbers, 1901 to 2099",
            '{"min": 1901, "max": 2099}, or with cllmr --filter year=1901..2099.',
        ),
        ({"genres": Range(min=1)}, "'genres' has values", "Comedy, Drama, War"),
    ],
)
def test_what_items_do_not_have_is_named_with_what_they_have(
    recommender: Recommender, filters: dict[str, Filter], message: str, hint: str
) -> None:
    with pytest.raises(FilterError) as caught:
        recommender.recommend(RecommendRequest(users=["u1"], filters=filters), [[]])
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_range_that_holds_nothing_is_refused() -> None:
    for wrong, reason in (({}, "needs min, max or both"), ({"min": 2, "max": 1}, "min = 2 is above max = 1")):
        with pytest.raises(ValidationError, match=reason):
            Range(**wrong)


def test_the_model_says_what_it_can_be_filtered_by(recommender: Recommender) -> None:
    found = recommender.describe(0).filters
    assert (found["genres"].kind, found["genres"].values, found["genres"].num_items) == (
        "values",
        ["Comedy", "Drama", "War"],
        133,
    )
    assert (found["year"].kind, found["year"].min, found["year"].max, found["year"].num_items) == ("numbers", 1901, 2099, 180)


@pytest.mark.parametrize(
    ("cells", "listed"),
    [
        ([f"Of {row}." for row in range(12)], []),  # descriptions of a small catalogue
        ([f"Of {row}, with love" if row < 5 else f"Of {row}" for row in range(12)], []),  # a phrase of some is no group
        ([f"Of {row // 2}" for row in range(12)], [f"Of {row}" for row in range(6)]),
        (["War"] * 6 + [""] * 90 + [f"Tag {row}" for row in range(6)], ["War", *(f"Tag {row}" for row in range(6))]),
        (["War, Tag 1", "War, Tag 2", "War, Tag 3"], ["War", "Tag 1", "Tag 2", "Tag 3"]),  # many values, but all are grouped
    ],
)
def test_values_are_listed_where_most_items_share_one_with_another(tmp_path: Path, cells: list[str], listed: list[str]) -> None:
    write_item_columns(tmp_path, column=cells)
    attributes = Attributes.read(tmp_path, len(cells))
    described = attributes.described()["column"]
    assert described.values == listed
    assert described.num_values == len({part.strip() for cell in cells for part in cell.split(",") if part})
    asked = attributes.matching({"column": [cells[0].split(",")[0]]})  # for one can be asked either way
    assert asked.penalty[0] == 0
    with pytest.raises(FilterError) as caught:
        attributes.matching({"column": ["Of 1000."]})
    assert ("Of 1" in caught.value.hint) == ("Of 1" in listed)


def test_what_filters_found_is_kept_and_bounded(recommender: Recommender) -> None:
    filters = Filters(recommender._attributes, cached_bytes=3 * 4 * NUM_ITEMS)
    first = filters.matching({"genres": ["Drama", "War"]})
    assert filters.matching({"genres": ["War", "Drama", "War"]}) is first
    for year in range(1901, 1911):
        filters.matching({"year": Range(min=year)})
    assert 0 < filters._found.currsize <= 3 * 4 * NUM_ITEMS


def test_a_bundle_of_before_can_be_filtered_by_nothing_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "bundle")
    old = load(Target("1", "f" * 16, "", str(directory))).recommender
    assert old.describe(0).filters == {}
    with pytest.raises(FilterError, match=r"train\.filter_columns"):
        old.recommend(RecommendRequest(users=["ann"], filters={"genres": ["Comedy"]}), [[]])
    pq.write_table(pa.table({"genres": pa.array([["Comedy"]], pa.list_(pa.string()))}), directory / ATTRIBUTES_FILE)
    with pytest.raises(ArtifactError, match="1 rows for 4 items"):
        load(Target("1", "f" * 16, "", str(directory)))
    pq.write_table(pa.table({"genres": ["Comedy"] * 4}), directory / ATTRIBUTES_FILE)
    with pytest.raises(ArtifactError, match="type string"):
        load(Target("1", "f" * 16, "", str(directory)))
    (directory / ATTRIBUTES_FILE).write_bytes(b"\x80\x04.")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(Target("1", "f" * 16, "", str(directory)))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told while columns are chosen."""
    lines: list[str] = []
    monkeypatch.setattr(attributes, "emit", lambda event, **fields: lines.append(fields["message"]))
    return lines


def test_columns_are_chosen_and_typed_by_what_they_hold(told: list[str]) -> None:
    items = pd.DataFrame(
        {
            "genres": ["Comedy, Drama", "", "Drama", "War,War"] * 100,
            "year": ["1990", "1991.5", "", "-3"] * 100,
            "story": [f"Of {row}." for row in range(400)],
            "empty": [""] * 400,
        }
    )
    names = list(items.columns)
    table = attributes_of(items, names, TrainConfig())
    assert table.column_names == ["genres", "year"]
    assert table["genres"].to_pylist()[:4] == [["Comedy", "Drama"], [], ["Drama"], ["War"]]
    assert table["year"].to_pylist()[:4] == [1990, 1991.5, None, -3]
    assert attributes_of(items, names, TrainConfig(filter_columns=("story",))).column_names == ["story"]
    assert attributes_of(items, names, TrainConfig(filter_columns=())).num_columns == 0
    whole = attributes_of(items, names, TrainConfig(filter_separator=None))
    assert whole["genres"].to_pylist()[0] == ["Comedy, Drama"]
    assert told == [], "a column of phrases is no filter, and nobody expects it"
    with pytest.raises(ConfigError, match=r"names 'genre', .* Did you mean 'genres'"):
        attributes_of(items, names, TrainConfig(filter_columns=("genre",)))
    with pytest.raises(ConfigError, match="no item has anything"):
        attributes_of(items, names, TrainConfig(filter_columns=("empty",)))


@pytest.mark.parametrize("mark", ["|", ", ", ";", " | "])
def test_values_of_one_cell_are_told_apart_as_profiles_tell_them_apart(mark: str) -> None:
    genres = [mark.join(("Comedy", "Drama")), "Drama", mark] * 2
    found = attributes_of(pd.DataFrame({"genres": genres}), ["genres"], TrainConfig())["genres"].to_pylist()
    assert found == [["Comedy", "Drama"], ["Drama"], []] * 2
    assert found[:2] == [attribute("genres", genres).of(item) for item in (0, 1)]


def test_marks_between_values_can_be_named_and_letters_and_repeated_marks_are_none() -> None:
    items = pd.DataFrame({"kinds": ["Clothing, Shoes | Women", "Women"]})
    found = attributes_of(items, ["kinds"], TrainConfig(filter_separator="|"))
    assert found["kinds"].to_pylist() == [["Clothing, Shoes", "Women"], ["Women"]]
    spaced = TrainConfig.parse({"filter_separator": " "}, "train")
    assert attributes_of(items, ["kinds"], spaced)["kinds"].to_pylist()[0] == ["Clothing,", "Shoes", "|", "Women"]
    for marks in (" / ", "and", "::", "||", "  ", "\t"):
        with pytest.raises(ConfigError, match=r"'train\.filter_separator' = .*: each character of it separates values"):
            TrainConfig.parse({"filter_separator": marks}, "train")


def test_columns_that_would_be_numbers_but_for_few_texts_are_told_where_none_is_named(told: list[str]) -> None:
    rows = range(400)
    items = pd.DataFrame(
        {
            "price": [f"{row}.5" if row else "N/A" for row in rows],
            "stars": [str(row % 5) if row % 9 else "many" for row in rows],
            "episode": [f"{row % 90}a" if row % 9 == 0 else str(row % 90) for row in rows],
            "isbn": [f"{row:09d}{'X' if row % 11 == 0 else row % 10}" for row in rows],
            "cast": [f"Person {row % 201}, Person {row % 50}, Person {row % 49}" for row in rows],
            "story": [f"Of {row}, told." for row in rows],
        }
    )
    names = list(items.columns)
    assert attributes_of(items, names, TrainConfig()).column_names == ["stars", "episode"]
    meant = "Where numbers are meant, empty or correct them"
    assert told == [
        f"'price' is no filter: 1 of 400 cells hold no number, for example 'N/A'. {meant}",
        f"'stars' is filtered by its values and not by numbers: 45 of 400 cells hold no number, for example 'many'. {meant}",
    ]
    told.clear()
    assert attributes_of(items, names, TrainConfig(filter_columns=tuple(names))).column_names == names
    assert told == [], "a column that is named is what its owner knows it to be"

"""The ingest stage as a whole: what arrives, what does not and why, what decides the fingerprint."""

import json
import os
import random
import shlex
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.artifacts import sha256_file
from components.errors import ArtifactError, ConfigError
from components.ids import SPLITS, TEST, TRAIN, VALIDATION
from components.ingest import build as builder
from components.ingest import readers, tables
from components.ingest.config import IngestConfig
from components.ingest.dataset import Dataset, load_newcomers
from components.ingest.stage import STAGE, run

HEADER = "user_id,item_id,rating,timestamp"


def block(users: int = 4, items: int = 5) -> list[str]:
    """Every user with every item, rated 5; user 3's items come at one time."""
    return [f"{user},{item},5,{1000 if user == 3 else 1000 + item}" for user in range(users) for item in range(items)]


def write(folder: Path, name: str, lines: list[str]) -> str:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def catalogue(folder: Path) -> str:
    return write(folder, "items.csv", ["item_id,title,genre,year", *(f"{i},Film {i},Drama,{1990 + i}" for i in range(5))])


def settings(folder: Path, lines: list[str] | None = None, **more: object) -> dict:
    interactions = write(folder, "interactions.csv", [HEADER, *(block() if lines is None else lines)])
    return {"source": "files", "interactions": interactions, "items": catalogue(folder), "k_core": 1, **more}


def build(folder: Path, lines: list[str] | None = None, **more: object) -> tuple[Dataset, dict, pd.DataFrame]:
    """The data set, its card and the removed rows."""
    path = run(settings(folder, lines, **more), str(folder / "store")).path()
    card = json.loads((path / "data_card.json").read_text(encoding="utf-8"))
    return Dataset.load(path), card, pq.read_table(path / "removed.parquet").to_pandas()


@pytest.fixture(scope="module")
def sample_run(tmp_path_factory):
    return run({}, str(tmp_path_factory.mktemp("store")))


def test_the_sample_becomes_a_five_core_split_three_to_one_to_one(sample_run):
    dataset = Dataset.load(sample_run.path())
    assert dataset.name == "ml-100k"
    facts = sample_run.facts
    assert (facts["users"], facts["items"], facts["interactions"]) == (938, 1008, 54_413)
    assert facts["removed_by_reason"] == {"below_min_rating": 44_625, "item_below_k_core": 948, "user_below_k_core": 14}
    assert facts["interactions"] + sum(facts["removed_by_reason"].values()) == 100_000
    assert facts["train"] + facts["validation"] + facts["test"] == 54_413
    degrees = dataset.interactions.groupby("user").size().to_numpy()
    assert facts["validation"] == facts["test"] == (degrees // 5).sum()
    assert facts["density"] == pytest.approx(54_413 / (938 * 1008), abs=1e-6)
    assert min(degrees.min(), dataset.interactions.groupby("item").size().min()) == 5
    assert dataset.items.set_index("item_id").loc["12"].to_dict() == {
        "item": 11,
        "title": "The Usual Suspects",
        "release_year": "1995",
        "genres": "Crime, Thriller",
    }


def test_the_files_have_the_columns_and_types_that_every_stage_relies_on(sample_run):
    path = sample_run.path()
    schemas = {name: pq.read_schema(path / f"{name}.parquet") for name in ("interactions", "users", "items")}
    assert {field.name: str(field.type) for field in schemas["interactions"]} == {
        "user_id": "string",
        "item_id": "string",
        "user": "int32",
        "item": "int32",
        "rating": "float",
        "timestamp": "int64",
        "split": "string",
    }
    assert schemas["users"].names == ["user", "user_id"]
    assert schemas["items"].names == ["item", "item_id", "title", "release_year", "genres"]
    dataset = Dataset.load(path)
    assert dataset.items["item"].tolist() == list(range(dataset.num_items))
    assert dataset.users["user_id"].astype(int).is_monotonic_increasing  # '9' before '10'
    merged = dataset.interactions.merge(dataset.items, on="item")
    assert (merged["item_id_x"] == merged["item_id_y"]).all()


def test_the_matrices_of_the_splits_are_binary_disjoint_and_complete(sample_run):
    dataset = Dataset.load(sample_run.path())
    parts = [dataset.matrix(name) for name in SPLITS]
    assert {matrix.shape for matrix in parts} == {(938, 1008)}
    assert {matrix.dtype for matrix in parts} == {np.dtype(np.float32)}
    assert all((matrix.data == 1).all() for matrix in parts)
    together = parts[0] + parts[1] + parts[2]
    assert together.max() == 1  # no pair is in two splits
    assert abs(together - dataset.matrix()).nnz == 0
    assert np.diff(parts[0].indptr).min() >= 1
    assert dataset.matrix(TRAIN, VALIDATION).nnz == parts[0].nnz + parts[1].nnz


def test_the_data_card_describes_what_is_handed_on(sample_run):
    card = json.loads((sample_run.path() / "data_card.json").read_text(encoding="utf-8"))
    dataset = Dataset.load(sample_run.path())
    popularity = np.sort(np.bincount(dataset.matrix(TRAIN).indices, minlength=dataset.num_items))[::-1]
    assert card["popularity_curve"]["10"] == pytest.approx(popularity[:101].sum() / popularity.sum(), abs=1e-4)
    assert card["cold_items"] == (popularity == 0).sum()
    assert card["rows_read"] == {"interactions": 100_000, "items": 1682, "users": 943}
    assert card["min_rating"] == 4.0
    assert card["time_range"]["first"] == "1997-09-20T03:05:10+00:00"


def test_two_runs_write_the_same_bytes(sample_run, tmp_path):
    again = run({}, str(tmp_path))
    assert again.fingerprint == sample_run.fingerprint
    assert again.files == sample_run.files
    parquet = {f"{name}.parquet" for name in ("interactions", "items", "removed", "users")}
    assert set(again.files) == {"data_card.json", *parquet}
    assert sha256_file(again.path() / "interactions.parquet") == sha256_file(sample_run.path() / "interactions.parquet")


def test_a_second_run_reuses_the_first_and_opens_no_table(tmp_path, monkeypatch):
    first = run(settings(tmp_path), str(tmp_path / "store"))
    monkeypatch.setattr(builder, "build", lambda *ignored: pytest.fail("built again"))
    assert run(settings(tmp_path), str(tmp_path / "store")) == first


@pytest.mark.parametrize("method", ["random", "temporal"])
def test_the_order_of_rows_changes_neither_the_interactions_nor_their_splits(tmp_path, method):
    lines = [*block(), "0,0,4,5000", "1,1,5,1001"]
    shuffled = list(lines)
    random.Random(3).shuffle(shuffled)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, card, _ = build(tmp_path / "one", lines, split={"method": method})
    other, _, _ = build(tmp_path / "other", shuffled, split={"method": method})
    pd.testing.assert_frame_equal(one.interactions, other.interactions)
    assert card["splits"] == {"train": 12, "validation": 4, "test": 4}


def test_the_temporal_split_tests_each_users_latest_and_draws_among_equal_times(tmp_path, monkeypatch):
    told, dataset, _ = warnings_of(tmp_path, monkeypatch, split={"method": "temporal"})
    by_user = dataset.interactions.pivot(index="user_id", columns="item_id", values="split").to_numpy().tolist()
    expected = [TRAIN, TRAIN, TRAIN, VALIDATION, TEST]
    assert by_user[:3] == [expected] * 3
    assert sorted(by_user[3]) == sorted(expected)  # one time for all
    assert not [one for one in told if "one time" in one]


def test_where_times_are_coarse_the_temporal_split_tests_no_items_more_than_others_and_says_so(tmp_path, monkeypatch):
    lines = [f"{user},{item},5,1700000000" for user in range(200) for item in range(5)]
    told, dataset, _ = warnings_of(tmp_path, monkeypatch, [*lines, "200,0,5,1"], split={"method": "temporal"})
    tested = dataset.interactions.query("split == 'test'")["item"].value_counts()
    # each of 5 items 40 times of 200 (binomial, sd 5.7; bounds at more than 4 sd)
    assert len(tested) == 5
    assert tested.between(15, 65).all()
    (line,) = [one for one in told if "one time" in one]
    assert line.startswith("200 of 200 users with more than one interaction have one time for all of them: which are tested is")


def test_times_that_are_all_zero_are_none(tmp_path):
    lines = [line.rpartition(",")[0] + ",0" for line in block()]
    _, card, _ = build(tmp_path, lines)
    assert (card["time_range"], card["timestamp_unit"]) == (None, None)
    with pytest.raises(ConfigError, match=r"'temporal' needs timestamps, and the interactions have none \(0 is none\)"):
        build(tmp_path, lines, split={"method": "temporal"})


def test_every_row_that_does_not_arrive_is_listed_with_its_reason_and_row_number(tmp_path):
    bad = [",0,5,1", "0,NaN,5,1", "0,0,good,1", "0,0,5,noon", "0,0,3.5,1", "0,0,5,999", "9,9,5,1"]
    dataset, card, removed = build(tmp_path, [*bad, *block()], k_core=2)
    assert card["removed_by_reason"] == {
        "below_min_rating": 1,
        "duplicate_interaction": 1,
        "missing_item_id": 1,
        "missing_user_id": 1,
        "rating_not_a_number": 1,
        "timestamp_not_a_number": 1,
        "user_below_k_core": 1,
    }
    rows = removed.set_index("row")
    assert rows["reason"].to_dict() == {
        0: "missing_user_id",
        1: "missing_item_id",
        2: "rating_not_a_number",
        3: "timestamp_not_a_number",
        4: "below_min_rating",
        5: "duplicate_interaction",
        6: "user_below_k_core",
    }
    assert rows["value"].to_dict() == {0: "", 1: "NaN", 2: "good", 3: "noon", 4: "3.5", 5: "999", 6: "2"}
    assert card["rows_read"]["interactions"] == len(bad) + 20
    assert len(dataset.interactions) == 20
    kept = dataset.interactions.query("user_id == '0' and item_id == '0'")
    assert kept["timestamp"].tolist() == [1000]  # the later of the two


def test_an_id_with_a_nul_byte_is_set_aside_and_nobody_gets_anothers_interactions(tmp_path):
    pairs = [(f"u{user}", f"i{item}") for user in range(3) for item in range(4)]
    bad = [("tenant\0anna", "i0"), ("tenant\0ben", "i1"), ("u0", "i0\0")]
    user_ids, item_ids = map(list, zip(*pairs, *bad, strict=True))
    pq.write_table(pa.table({"user_id": user_ids, "item_id": item_ids}), tmp_path / "clicks.parquet")
    items = pa.table({"item_id": ["i0", "i1\0a", "i1\0b"], "title": ["Film", "Spoon", "Fork"]})
    pq.write_table(items, tmp_path / "items.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("clicks", "items")}
    dataset, card, removed = build(tmp_path, interactions=files["clicks"], items=files["items"])
    assert list(zip(dataset.interactions["user_id"], dataset.interactions["item_id"], strict=True)) == pairs
    assert dataset.items["title"].tolist() == ["Film", "i1", "i2", "i3"]
    assert card["removed_by_reason"] == {"item_id_has_nul": 3, "user_id_has_nul": 2}
    assert removed["value"].tolist() == ["tenant\0anna", "tenant\0ben", "i0\0", "i1\0a", "i1\0b"]


def test_of_an_item_described_twice_the_first_row_counts(tmp_path):
    items = write(
        tmp_path, "twice.csv", ["item_id,title", "0,First", "0,Second", "0,Third", *(f"{i},Film" for i in range(1, 5))]
    )
    dataset, card, removed = build(tmp_path, items=items)
    assert dataset.items["title"].tolist()[0] == "First"
    assert card["removed_by_reason"] == {"duplicate_item_id": 2}
    assert removed[["table", "row", "item_id"]].to_numpy().tolist() == [["items", 1, "0"], ["items", 2, "0"]]


def test_items_without_a_row_are_kept_under_their_id_and_counted(tmp_path):
    short = write(tmp_path, "short.csv", ["item_id,title,genre", "0,Film 0,Drama", "1,,", "2,Film 2,Drama"])
    dataset, card, _ = build(tmp_path, items=short)
    assert dataset.items["title"].tolist() == ["Film 0", "1", "Film 2", "3", "4"]
    assert dataset.items["genre"].tolist() == ["Drama", "", "Drama", "", ""]
    assert card["items_without_row"] == 2
    assert card["interactions_of_items_without_row"] == 8


def test_without_a_file_of_items_their_ids_are_their_titles(tmp_path):
    dataset, card, _ = build(tmp_path, items=None)
    assert dataset.items.columns.tolist() == ["item", "item_id", "title"]
    assert dataset.items["title"].tolist() == ["0", "1", "2", "3", "4"]
    assert card["items_without_row"] == 5


def test_text_columns_are_all_others_the_listed_ones_or_none(tmp_path):
    assert build(tmp_path)[0].item_text_columns == ["genre", "year"]
    assert build(tmp_path, item_text_columns=["genre"])[0].item_text_columns == ["genre"]
    assert build(tmp_path, item_text_columns=[])[0].item_text_columns == []
    saved_with_index = write(tmp_path, "saved.csv", [",item_id,title,kind", *(f"{i},{i},Film {i},new" for i in range(5))])
    assert build(tmp_path, items=saved_with_index)[0].item_text_columns == ["kind"]


def test_users_have_the_text_that_was_asked_for_and_rows_of_their_own_when_the_file_has_none(tmp_path):
    users = write(tmp_path, "users.tsv", ["user_id\tjob\tage", "0\twriter\t30", "1\t\t40"])
    dataset, card, _ = build(tmp_path, users=users, user_text_columns=["job"])
    assert dataset.users.columns.tolist() == ["user", "user_id", "job"]
    assert dataset.users["job"].tolist() == ["writer", "", "", ""]
    assert card["users_without_row"] == 2
    assert build(tmp_path, users=users)[0].user_text_columns == []


def test_columns_of_users_that_nobody_named_are_told_and_not_read(tmp_path, monkeypatch):
    users = write(tmp_path, "users.csv", [",user_id,job,nurse's", *(f"{user},{user},nurse,likes trains" for user in range(4))])
    told, dataset, _ = warnings_of(tmp_path, monkeypatch, users=users)
    assert dataset.user_text_columns == []
    (line,) = [one for one in told if "users have no text" in one]
    told, commands = line.split("Name those that shall describe them: ")
    assert told == f"of file '{users}' no column but the id is read, and users have no text. "
    assert [shlex.split(command)[-2:] for command in commands.split("; ")] == [
        ["--set", """ingest.user_text_columns=["job", "nurse's"]"""],
        ["--set", "ingest.user_text_columns=[]"],
    ]
    for named in ([], ["job"]):
        told, _, _ = warnings_of(tmp_path, monkeypatch, users=users, user_text_columns=named)
        assert not [one for one in told if "users have no text" in one]


def test_users_with_a_text_and_without_interactions_are_handed_on_apart(tmp_path):
    users = write(tmp_path, "users.tsv", ["user_id\tjob", "0\twriter", "new\tpainter", "newer\t", "11\tnurse"])
    asked = settings(tmp_path, users=users, user_text_columns=["job"])
    path = run(asked, str(tmp_path / "store")).path()
    assert load_newcomers(path).to_dict("records") == [
        {"user_id": "11", "job": "nurse"},
        {"user_id": "new", "job": "painter"},
    ]
    assert json.loads((path / "data_card.json").read_text(encoding="utf-8"))["newcomers"] == 2
    assert not set(Dataset.load(path).users["user_id"]) & {"new", "newer", "11"}
    without = run(settings(tmp_path, users=users), str(tmp_path / "store")).path()
    assert load_newcomers(without).empty, "without text columns there is nothing to say of them"


def test_the_users_own_column_names_are_used(tmp_path):
    lines = ["reader,isbn,stars,when", *(line.replace("5", "9", 1) for line in block())]
    interactions = write(tmp_path, "own.csv", lines)
    items = write(tmp_path, "books.csv", ["isbn,name,title", *(f"{i},Book {i},Dr" for i in range(5))])
    names = {"user_id": "reader", "item_id": "isbn", "rating": "stars", "timestamp": "when", "title": "name"}
    config = {"source": "files", "interactions": interactions, "items": items, "columns": names, "k_core": 1}
    with pytest.raises(ValueError, match=r"has a column 'title' beside the one that ingest\.columns names"):
        run(config, str(tmp_path / "store"))
    dataset = Dataset.load(run({**config, "item_text_columns": []}, str(tmp_path / "store")).path())
    assert dataset.items["title"].tolist() == [f"Book {i}" for i in range(5)]
    assert dataset.name == "own-data"


def test_reviews_are_kept_with_their_interaction_where_the_file_has_them(tmp_path):
    lines = [f"{line},{'said ' + line[2] if line[0] == '1' else ''}" for line in block()]
    lines[-1] = lines[-1].removesuffix(",") + ',"two\nlines\x07 ""quoted"""'
    for name, header, columns in (("a", "review", {}), ("b", "opinion", {"columns": {"review": "opinion"}})):
        (tmp_path / name).mkdir()
        interactions = write(tmp_path / name, "reviewed.csv", [f"{HEADER},{header}", *lines])
        dataset, _, _ = build(tmp_path / name, **columns, interactions=interactions)
        found = dataset.interactions.set_index(["user_id", "item_id"])["review"]
        assert found["1", "4"] == "said 4"
        assert found["0", "0"] == ""
        assert found["3", "4"] == 'two lines "quoted"'
    without, _, _ = build(tmp_path / "b", interactions=interactions, columns={"review": None})
    assert "review" not in without.interactions


def test_a_threshold_without_ratings_is_ignored_and_says_so(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(builder, "emit", lambda event, **fields: told.append((event, fields["message"])))
    lines = [line.rsplit(",", 2)[0] for line in block()]
    config = settings(tmp_path) | {"interactions": write(tmp_path, "plain.csv", ["user_id,item_id", *lines])}
    manifest = run(config, str(tmp_path / "store"))
    dataset = Dataset.load(manifest.path())
    assert len(dataset.interactions) == 20
    assert dataset.interactions["rating"].isna().all()
    assert (dataset.interactions["timestamp"] == 0).all()
    message = "ingest.min_rating = 4 has no effect: the interactions have no rating, all count"
    assert ("warning", message) in told


def warnings_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str] | None = None, **more: object
) -> tuple[list[str], Dataset, dict]:
    told = []
    for module in (builder, tables, readers):
        monkeypatch.setattr(module, "emit", lambda event, **fields: told.append(fields["message"]))
    dataset, card, removed = build(folder, lines, **more)
    assert removed.empty
    return told, dataset, card


def reviewed(folder: Path, *reviews: str) -> str:
    """20 interactions in a file without quoting, the last column of each a review."""
    rows = [line.replace(",", "\t") for line in block()]
    texts = [*reviews, *["fine"] * (len(rows) - len(reviews))]
    lines = [HEADER.replace(",", "\t") + "\treview", *map("\t".join, zip(rows, texts, strict=True))]
    return write(folder, "reviewed.tsv", lines)


def test_rows_that_a_quotation_mark_swallows_are_told_and_without_quoting_all_arrive(tmp_path, monkeypatch):
    interactions = reviewed(tmp_path, "fine", '"Great read', "fine", "fine", "fine", '"Great again', "fine", '"Great" it is')
    told, dataset, card = warnings_of(tmp_path, monkeypatch, interactions=interactions)
    (line,) = [one for one in told if "swallowed" in one]
    assert line == (
        f"file '{interactions}' has 1 value(s) that hold whole rows, the first in row 1, which spans 5 lines: looks like 4 "
        "rows swallowed by a quotation mark; if values are not quoted: --set ingest.quoting=none"
    )
    assert (card["rows_read"]["interactions"], len(dataset.interactions)) == (16, 16)
    told, dataset, card = warnings_of(tmp_path, monkeypatch, interactions=interactions, quoting="none")
    assert not [one for one in told if "swallowed" in one]
    assert (card["rows_read"]["interactions"], len(dataset.interactions)) == (20, 20)
    found = dataset.interactions.set_index(["user_id", "item_id"])["review"]
    assert [found["0", item] for item in "01"] == ["fine", '"Great read']
    assert found["1", "2"] == '"Great" it is'
    # a column that is not read swallows as well
    told, _, _ = warnings_of(tmp_path, monkeypatch, interactions=interactions, columns={"review": None})
    assert line in told


def test_a_text_of_several_lines_in_which_none_looks_like_a_row_is_no_warning(tmp_path, monkeypatch):
    interactions = reviewed(tmp_path, '"two\nlines, and ""more"""')
    told, dataset, _ = warnings_of(tmp_path, monkeypatch, interactions=interactions)
    assert not [one for one in told if "swallowed" in one]
    assert len(dataset.interactions) == 20


def test_the_quoting_decides_the_fingerprint_of_files_and_not_that_of_the_sample(tmp_path):
    files = [IngestConfig(**settings(tmp_path), quoting=quoting).identity() for quoting in ("minimal", "none")]
    assert files[0] != files[1]
    assert IngestConfig(quoting="none").identity() == IngestConfig().identity()


def test_without_a_threshold_a_row_without_a_rating_counts_and_one_with_a_text_for_it_does_not(tmp_path):
    lines = [line.replace(",5,", f",{'' if line.startswith('0') else 5},") for line in block()]
    lines += ["7,0,null,1", "7,1,good,1", "1,0,,1000"]
    for method in ("random", "temporal", "stable"):
        dataset, card, _ = build(tmp_path, lines, min_rating=None, split={"method": method})
        assert card["removed_by_reason"] == {"duplicate_interaction": 1, "rating_not_a_number": 1}
        ratings = dataset.interactions.set_index(["user_id", "item_id"])["rating"]
        assert ratings.isna().groupby("user_id").sum().to_dict() == {"0": 5, "1": 0, "2": 0, "3": 0, "7": 1}
    _, card, _ = build(tmp_path, lines)
    assert card["removed_by_reason"] == {"rating_not_a_number": 8}


def test_users_without_a_row_are_told(tmp_path, monkeypatch):
    users = write(tmp_path, "users.csv", ["user_id,job", "0,writer", "1,painter"])
    told, _, card = warnings_of(tmp_path, monkeypatch, users=users, user_text_columns=["job"])
    assert card["users_without_row"] == 2
    assert "2 of 4 users have no row in the table of users: they have no text" in told


def test_a_text_column_named_twice_counts_once_and_id_and_title_are_none(tmp_path):
    users = write(tmp_path, "users.csv", ["user_id,job", "0,writer"])
    twice = {"item_text_columns": ["title", "genre", "genre"], "user_text_columns": ["job", "user_id", "job"]}
    dataset, card, _ = build(tmp_path, users=users, **twice)
    assert (dataset.item_text_columns, dataset.user_text_columns) == (["genre"], ["job"])
    assert (card["item_text_columns"], card["user_text_columns"]) == (["genre"], ["job"])
    sample = {"item_text_columns": ["title", "genres", "item_id"], "user_text_columns": ["age", "age"]}
    source = tables.load(IngestConfig(**sample))
    assert (source.items.text_columns, source.users.text_columns) == (["genres"], ["age"])
    assert list(source.items.table.columns) == ["title", "genres"]


def test_interactions_of_the_future_are_kept_counted_and_told_with_an_example(tmp_path, monkeypatch):
    lines = [*block(), "7,0,5,4102444800", "7,1,5,4102444801"]
    told, dataset, card = warnings_of(tmp_path, monkeypatch, lines)
    (line,) = [one for one in told if "future" in one]
    assert line.startswith("2 of 22 interactions lie in the future, for example row 20, at 2100-01-01T00:00:00+00:00: ")
    assert "--set ingest.columns.timestamp=null" in line
    assert card["in_the_future"] == 2
    assert len(dataset.interactions) == 22


def test_a_clock_that_is_a_little_ahead_is_not_the_future(tmp_path, monkeypatch):
    told, _, card = warnings_of(tmp_path, monkeypatch, [*block(), f"7,0,5,{int(time.time()) + 60}", "7,1,5,1000"])
    assert card["in_the_future"] == 0
    assert not [one for one in told if "future" in one]


def test_milliseconds_among_seconds_are_read_as_such_and_told(tmp_path, monkeypatch):
    lines = [*(line.replace(",10", ",17000010") for line in block()), "7,0,5,1700000000500", "7,1,5,1700000000"]
    told, dataset, card = warnings_of(tmp_path, monkeypatch, lines)
    (line,) = [one for one in told if "unit" in one]
    assert line.startswith(
        "1 of 22 timestamps would lie in 1970 or after the year 2262 if they were seconds like the rest, for "
    )
    assert "1700000000500 in row 20" in line
    assert "seconds and milliseconds in one column are the usual cause" in line
    theirs = dataset.interactions.query("user_id == '7'")
    assert theirs["timestamp"].tolist() == [1_700_000_000] * 2
    assert (card["in_the_future"], card["timestamp_unit"]) == (0, "seconds")


def test_seconds_among_milliseconds_are_read_as_such_and_told(tmp_path, monkeypatch):
    lines = [*(line.replace(",10", ",17000010") + "000" for line in block()), "7,0,5,1700000000", "7,1,5,1700000001"]
    told, dataset, card = warnings_of(tmp_path, monkeypatch, lines)
    (line,) = [one for one in told if "size" in one]
    assert line.startswith(
        "2 of 22 timestamps would lie in 1970 or after the year 2262 if they were milliseconds like the rest"
    )
    assert "1700000000 in row 20" in line
    assert dataset.interactions.query("user_id == '7'")["timestamp"].tolist() == [1_700_000_000, 1_700_000_001]
    assert card["timestamp_unit"] == "milliseconds"


def test_one_rating_for_all_is_fine_when_it_reaches_the_threshold(tmp_path):
    dataset, card, _ = build(tmp_path, min_rating=5)
    assert len(dataset.interactions) == 20
    assert card["removed_by_reason"] == {}


def test_users_of_one_item_are_below_the_k_core_and_counted(tmp_path):
    dataset, card, _ = build(tmp_path, [*block(), *(f"{user},0,5,1" for user in range(10, 17))], k_core=2)
    assert dataset.num_users == 4
    assert card["removed_by_reason"] == {"user_below_k_core": 7}


def test_cold_items_are_allowed_and_counted(tmp_path):
    lines = [f"{user},{item},5,{item}" for user in range(2) for item in range(5)]
    _, card, _ = build(tmp_path, lines, split={"method": "temporal"})
    assert card["cold_items"] == 2  # both users' latest two items are held out
    assert card["items"] == 5


def test_moving_a_file_keeps_the_fingerprint_and_a_changed_byte_does_not(tmp_path):
    here = run(settings(tmp_path), str(tmp_path / "store"))
    moved = tmp_path / "elsewhere.csv"
    os.rename(tmp_path / "interactions.csv", moved)
    config = {**settings(tmp_path), "interactions": str(moved)}
    assert run(config, str(tmp_path / "store")).fingerprint == here.fingerprint
    moved.write_text(moved.read_text(encoding="utf-8") + "0,0,5,1\n", encoding="utf-8")
    assert run(config, str(tmp_path / "store")).fingerprint != here.fingerprint


def test_settings_that_come_back_from_kubeflow_as_floats_are_the_same_settings():
    config = IngestConfig()
    floats = json.loads(json.dumps(config.model_dump(mode="json")), parse_int=float)
    assert IngestConfig.parse(floats, STAGE.name).identity() == config.identity()


def test_own_data_are_not_called_by_the_samples_name():
    assert IngestConfig.parse({"source": "files", "interactions": "a.csv"}, "ingest").name == "own-data"
    assert IngestConfig.parse({"source": "files", "interactions": "a.csv", "name": "books"}, "ingest").name == "books"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interactions": "a.csv"}, r"'ingest\.interactions' = 'a\.csv': it has no effect while ingest\.source is 'sample'"),
        ({"source": "files"}, r"'ingest\.interactions' = None: a CSV, TSV or Parquet file is needed"),
        (
            {"source": "files", "interactions": "a.csv", "user_text_columns": ["job"]},
            r"'ingest\.user_text_columns' = \['job'\]: these are columns of the file ingest\.users, which is not set",
        ),
        ({"kcore": 3}, r"unknown setting 'ingest\.kcore'\. Did you mean 'k_core'\?"),
        ({"columns": {"usr_id": "u"}}, r"unknown setting 'ingest\.columns\.usr_id'\. Did you mean 'user_id'\?"),
        ({"k_core": 0}, r"'ingest\.k_core' = 0: Input should be greater than 0"),
        (
            {"split": {"method": "leave-one-out"}},
            r"'ingest\.split\.method' = 'leave-one-out': .*'random', 'temporal' or 'stable'",
        ),
        ({"split": {"ratios": [0, 1, 1]}}, r"'ingest\.split\.ratios\.0' = 0: Input should be greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_their_value(values, message):
    with pytest.raises(ConfigError, match=message):
        IngestConfig.parse(values, STAGE.name)


def test_a_damaged_data_set_is_an_error_that_says_what_to_run(tmp_path):
    path = run(settings(tmp_path), str(tmp_path / "store")).path()
    for name, damaged in (("users.parquet", b"PAR1"), ("data_card.json", b"{}")):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"cannot be read: .* Run ingest again"):
            Dataset.load(path)
        (path / name).write_bytes(whole)

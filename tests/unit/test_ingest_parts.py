"""Filters, the data card's figures, titles of the sample, readers and row checks of the ingest stage, by hand."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from components.errors import DataError
from components.experiment.dataset import cleaned
from components.ids import ITEM_ID, MAX_ID_LENGTH, RATING, TIMESTAMP, USER_ID
from components.ingest import card, config, filters, readers, sample, tables, validation
from serving.schemas import ScoreRequest


def events(rows: list[tuple[str, str, float, int]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=[USER_ID, ITEM_ID, RATING, TIMESTAMP])
    return frame.astype({USER_ID: "category", ITEM_ID: "category"})


def test_of_repeated_interactions_the_latest_is_kept_and_of_equally_late_ones_the_best_rated():
    rows = [("u", "a", 5, 10), ("u", "a", 4, 20), ("u", "b", 4, 7), ("u", "b", 5, 7), ("v", "a", 4, 1)]
    assert filters.latest_events(events(rows)).tolist() == [False, True, False, True, True]
    assert filters.latest_events(events(rows[::-1])).tolist() == [True, True, False, True, False]


def test_the_k_core_is_taken_to_its_fixed_point_and_says_what_was_below_first():
    # users 0 and 1 with items 0 and 1 are a 2-core; user 2 hangs on items 2 and 3, of which each falls in its turn:
    # round 1: item 3 has one interaction; round 2: then user 2 has one; round 3: then item 2 has one
    users = np.array([0, 0, 1, 1, 2, 2, 0])
    items = np.array([0, 1, 0, 1, 2, 3, 2])
    verdict, rounds = filters.k_core(users, items, 2)
    kept, user_below, item_below = filters.KEPT, filters.USER_BELOW, filters.ITEM_BELOW
    assert verdict.tolist() == [kept, kept, kept, kept, user_below, item_below, item_below]
    assert rounds == 3


def test_a_k_core_of_one_removes_nothing_and_an_impossible_one_everything():
    users, items = np.array([0, 1, 2]), np.array([0, 0, 1])
    assert filters.k_core(users, items, 1)[0].tolist() == [filters.KEPT] * 3
    assert (filters.k_core(users, items, 4)[0] != filters.KEPT).all()
    assert len(filters.k_core(users[:0], items[:0], 3)[0]) == 0


def test_the_popularity_curve_and_gini_equal_hand_computed_values():
    counts = np.array([1, 1, 2, 6])
    # the first 1, 5, 10 and 20 % of four items are one item, 50 % are two
    assert card.popularity_curve(counts) == {"1": 0.6, "5": 0.6, "10": 0.6, "20": 0.6, "50": 0.8}
    # sum over i of (2 i - n - 1) x_i / (n sum x) = (-3 - 1 + 2 + 18) / 40
    assert card.gini(counts) == pytest.approx(0.4)
    assert card.gini(np.array([3, 3, 3])) == 0
    assert card.gini(np.array([0, 0, 0, 9])) == pytest.approx(3 / 4)


def test_degrees_and_times_are_summarised_and_unknown_times_do_not_count():
    assert card.degree_summary(np.array([1, 2, 9])) == {"min": 1, "median": 2.0, "mean": 4.0, "max": 9}
    assert card.time_range(np.array([0, 86_400, 0, 172_801])) == {
        "first": "1970-01-02T00:00:00+00:00",
        "last": "1970-01-03T00:00:01+00:00",
    }
    assert card.time_range(np.array([0, 0])) is None


@pytest.mark.parametrize(
    ("catalogued", "natural"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Affair to Remember, An", "An Affair to Remember"),
        ("Enfer, L'", "L'Enfer"),
        ("Tin Drum, The (Blechtrommel, Die)", "The Tin Drum (Die Blechtrommel)"),
        ("I, Worst of All (Yo, la peor de todas)", "I, Worst of All (Yo, la peor de todas)"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Toy Story", "Toy Story"),
    ],
)
def test_articles_that_catalogues_put_last_come_first(catalogued, natural):
    assert sample.natural_title(catalogued) == natural


def test_the_sample_is_found_without_importing_its_package_and_has_its_published_sizes():
    interactions, items, users = sample.interactions(), sample.items(), sample.users()
    assert (len(interactions), len(items), len(users)) == (100_000, 1682, 943)
    assert list(interactions.columns) == [USER_ID, ITEM_ID, RATING, TIMESTAMP]
    film = items.set_index(ITEM_ID).loc["12"]
    assert film.to_dict() == {"title": "The Usual Suspects", "release_year": "1995", "genres": "Crime, Thriller"}
    assert not items.isin(["unknown"]).any().any()


def test_a_missing_sample_names_the_package_and_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(config, "SAMPLE_DISTRIBUTION", "no-such-distribution")
    with pytest.raises(DataError, match=r"'no-such-distribution' is installed\. .*pip install --no-deps recbole==1\.2\.1"):
        config.sample_version()


def test_a_row_is_rejected_once_for_the_first_rule_it_breaks_with_the_text_that_broke_it():
    frame = pd.DataFrame(
        {
            USER_ID: ["u", "NaN", "u", "u", "u"],
            ITEM_ID: ["a", "", "null", "b", "c"],
            RATING: ["5", "x", "x", "4,5", "inf"],
            TIMESTAMP: ["1", "1", "1", "-5", "x"],
        },
        index=[10, 11, 12, 13, 14],
    )
    found = validation.rejections(frame, validation.interactions_schema(has_rating=True, has_timestamp=True))
    assert found.reset_index().to_numpy().tolist() == [
        [11, "missing_user_id", "NaN"],
        [12, "missing_item_id", "null"],
        [13, "rating_not_a_number", "4,5"],
        [14, "rating_not_a_number", "inf"],
    ]


def test_an_id_that_the_api_would_refuse_is_rejected_and_the_longest_it_takes_is_not():
    for length, answered in ((MAX_ID_LENGTH, True), (MAX_ID_LENGTH + 1, False)):
        name = "ü" * length  # characters count, not bytes
        frame = pd.DataFrame({USER_ID: ["u", name], ITEM_ID: [name, "a"]})
        found = validation.rejections(frame, validation.interactions_schema(has_rating=False, has_timestamp=False))
        assert found["reason"].tolist() == ([] if answered else ["item_id_too_long", "user_id_too_long"])
        assert len(validation.rejections(frame, validation.entities_schema(USER_ID))) == (0 if answered else 1)
        if answered:
            ScoreRequest(user_id=name, item_ids=[name])
        else:
            with pytest.raises(ValidationError, match=f"at most {MAX_ID_LENGTH} characters"):
                ScoreRequest(user_id=name, item_ids=[name])


def test_a_time_before_1970_is_out_of_range():
    frame = pd.DataFrame({USER_ID: ["u", "u"], ITEM_ID: ["a", "b"], TIMESTAMP: ["-1", "soon"]})
    found = validation.rejections(frame, validation.interactions_schema(has_rating=False, has_timestamp=True))
    assert found["reason"].tolist() == ["timestamp_out_of_range", "timestamp_not_a_number"]


@pytest.mark.parametrize(
    ("given", "unit"),
    [
        (881_250_949, "seconds"),
        (881_250_949_000, "milliseconds"),
        (881_250_949_000_000, "microseconds"),
        (881_250_949_000_000_000, "nanoseconds"),
    ],
)
def test_the_unit_of_time_is_told_by_its_size(given, unit):
    seconds, told, others = tables.unix_seconds(np.array([given, given], float))
    assert (seconds.tolist(), told, others.tolist()) == ([881_250_949] * 2, unit, [False] * 2)


def test_a_time_that_is_too_large_for_the_unit_of_the_rest_is_in_a_smaller_one():
    given = np.array([10, 1_700_000_000, 1_700_000_001_000, 1_700_000_002_000_000, 4_000_000_000, 1_700_000_000], float)
    seconds, unit, others = tables.unix_seconds(given)
    assert unit == "seconds"
    assert seconds.tolist() == [10, 1_700_000_000, 1_700_000_001, 1_700_000_002, 4_000_000_000, 1_700_000_000]
    assert others.tolist() == [False, False, True, True, False, False]


def test_a_time_that_is_too_small_for_the_unit_of_the_rest_is_in_a_larger_one():
    given = np.array([1_700_000_000_000] * 5 + [1_700_000_001, 0, 86_400_000, 1_700_000_002_000_000], float)
    seconds, unit, others = tables.unix_seconds(given)
    assert unit == "milliseconds"
    assert seconds.tolist() == [1_700_000_000] * 5 + [1_700_000_001, 0, 86_400, 1_700_000_002]
    assert others.tolist() == [False] * 5 + [True, False, False, True]


def test_times_that_count_from_zero_are_all_in_one_unit():
    days = np.arange(400.0)
    seconds, unit, others = tables.unix_seconds(days * 86_400_000)
    assert (unit, others.any()) == ("milliseconds", False)
    assert seconds.tolist() == (days * 86_400).tolist()


def test_no_time_that_is_accepted_lies_beyond_what_the_feature_store_can_hold():
    largest = np.nextafter(validation.LARGEST_TIME, 0)
    for unit in (1.0, 1e-3, 1e-6, 1e-9):
        seconds, _, _ = tables.unix_seconds(np.array([1_700_000_000, 1_700_000_000, largest * unit]))
        assert pd.Timestamp(int(seconds.max()), unit="s").as_unit("ns").year <= 2262


def test_csv_tsv_and_parquet_give_the_same_text_in_chunks_that_keep_their_row_numbers(tmp_path):
    rows = [("1", "a, b", "4"), ("2", "", "5"), ("3", "ü", "")]
    (tmp_path / "a.csv").write_text("id,text,n\n" + "".join(f'{a},"{b}",{c}\n' for a, b, c in rows), encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text("id\ttext\tn\n" + "".join(f"{a}\t{b}\t{c}\n" for a, b, c in rows), encoding="utf-8")
    # as pandas writes it: the missing number has made its column one of floats
    table = pa.table({"id": pa.array([1, 2, 3]), "text": ["a, b", None, "ü"], "n": pa.array([4.0, 5.0, float("nan")])})
    pq.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.parquet"):
        chunks = list(readers.read_chunks(str(tmp_path / name), {USER_ID: "id", "words": "text", RATING: "n"}, chunk_rows=2))
        assert [len(chunk) for chunk in chunks] == [2, 1]
        frame = pd.concat(chunks)
        assert list(frame.columns) == [USER_ID, "words", RATING]
        assert frame.to_numpy().tolist() == [list(row) for row in rows], name
        assert frame.index.tolist() == [0, 1, 2]


def test_parquet_times_become_unix_seconds_and_lists_one_text(tmp_path):
    times = pa.array([1_000, 2_000], pa.timestamp("ms"))
    pq.write_table(pa.table({"t": times, "tags": [["x", "y"], None]}), tmp_path / "a.parquet")
    frame = pd.concat(readers.read_chunks(str(tmp_path / "a.parquet"), {TIMESTAMP: "t", "tags": "tags"}))
    assert frame.to_numpy().tolist() == [["1", "x, y"], ["2", ""]]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array([[1.5, 2.0], None], pa.list_(pa.float32(), 2)), ["1.5, 2", ""]),
        (pa.array([[["War", "Sci-Fi"], None, [None, "Film"]], None, [], [["War"]]]), ["War, Sci-Fi, Film", "", "", "War"]),
        (pa.array([3_600_000, None], pa.time32("ms")), ["01:00:00.000", ""]),
        (pa.array([3_600_000_001, None], pa.time64("us")), ["01:00:00.000001", ""]),
        (pa.array([90, None], pa.duration("s")), ["90", ""]),
        (pa.array([b"caf\xc3\xa9", None]), ["café", ""]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
@pytest.mark.parametrize("name", ["anything", TIMESTAMP])  # a time of day where a point in time is expected is told row by row
def test_parquet_columns_of_rarer_types_become_text(tmp_path, column, texts, name):
    pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
    frame = pd.concat(readers.read_chunks(str(tmp_path / "a.parquet"), {name: "x"}))
    assert frame[name].tolist() == texts


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ([["Women"], ["Clothing, Shoes & Jewelry", "Women"], ["Clothing, Shoes & Jewelry"]], "'Clothing, Shoes & Jewelry'"),
        ([[["War|Peace"], ["Women"]], [["Women"], ["War|Peace"]]], "'War|Peace'"),
        ([["Women", "Clothing"], ["Women", "Clothing"]], None),
        ([["Soft, and warm.", "Blue."], ["Keeps dry, even in rain."]], None),  # sentences, which nobody counts
    ],
)
def test_values_of_lists_that_will_be_read_as_several_are_told(tmp_path, monkeypatch, column, value):
    told = []
    monkeypatch.setattr(readers, "emit", lambda event, **fields: told.append(fields["message"]))
    pq.write_table(pa.table({"kinds": column}), tmp_path / "a.parquet")
    assert list(readers.read_chunks(str(tmp_path / "a.parquet"), {"kinds": "kinds"}, chunk_rows=3))
    assert [f"for example {value}" in one and "a column 'kinds' of lists" in one for one in told] == [True] * bool(value)


def test_a_parquet_text_that_is_not_utf8_is_told_as_damage(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": ["Amelie"]}), path, compression="none", use_dictionary=False, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"Amelie", b"Am\xe9lie"))
    with pytest.raises(DataError, match=r"a.parquet' is not Parquet, or damaged: 'utf-8' codec can't decode byte 0xe9"):
        list(readers.read_chunks(str(path), {"x": "x"}))


def test_texts_are_one_clean_line_in_nfc():
    assert tables.clean_text("  Cafe\u0301\tau\nlait\x00 ") == "Café au lait"
    assert [tables.clean_text(text) for text in ("NaN", "NULL", "None ", "<NA>")] == [""] * 4
    assert tables.clean_text("None of us") == "None of us"


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("['Comedy', 'Drama']", "Comedy, Drama"),
        (" [\"Children's\", None, 'nan', [' Sci\\\\Fi\\n', 1995], True] ", "Children's, Sci\\Fi, 1995"),
        ("['a\\d', ' ']", "a\\d"),
        ("[]", ""),
        ("['Comedy' 'Drama']", "['Comedy' 'Drama']"),
        ("[{'id': 16, 'name': 'Comedy'}]", "[{'id': 16, 'name': 'Comedy'}]"),
        ("[{{}}]", "[{{}}]"),
        ("['a', [...]]", "['a', [...]]"),
        ("[REC]", "[REC]"),
        ("['Allo 'Allo!]", "['Allo 'Allo!]"),
        ("[" * 9999 + "]" * 9999, "[" * 9999 + "]" * 9999),
    ],
    ids=[
        "list",
        "nested",
        "a backslash",
        "empty",
        "as numpy writes it",
        "mappings",
        "a template",
        "no value",
        "a title",
        "a broken one",
        "too deep",
    ],
)
def test_a_list_as_python_writes_one_is_its_values_in_every_table_and_what_only_looks_like_one_is_text(cell, text):
    assert tables.clean_text(cell) == cleaned(cell) == text

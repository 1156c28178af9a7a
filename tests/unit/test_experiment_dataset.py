"""Reading data sets for experiments: what is read, and how what cannot be read is told."""

import gzip
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.errors import DataError
from components.experiment.dataset import cleaned, read, texts_of
from components.experiment.planted import write_blocks
from components.sideinfo import encoder
from tests.evaluate_parents import ingest, world

SPLITS: dict[str, Any] = {
    "trn": ([0, 0, 1, 2], [0, 1, 1, 2]),
    "val": ([0, 1], [2, 2]),
    "tst": ([0, 1, 2], [3, 0, 0]),
}


def write(folder: Path, **changed: Any) -> Path:
    """Three users and four items; a change is the arrays of a split by name."""
    folder.mkdir(exist_ok=True)
    for name, (row, col) in SPLITS.items():
        arrays = {"row": np.array(row), "col": np.array(col), "shape": np.array([3, 4])} | changed.get(name, {})
        np.savez(folder / f"{name}.npz", **{key: value for key, value in arrays.items() if value is not None})
    return folder


def write_items(folder: Path, lines: list[str]) -> None:
    with gzip.open(folder / "items.jsonl.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")


def test_the_splits_are_read_as_binary_matrices_and_repeated_rows_count_once(tmp_path: Path) -> None:
    data = read(write(tmp_path, trn={"row": np.array([0, 0, 1, 0]), "col": np.array([1, 0, 1, 0])}))
    assert data.train.toarray().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert data.validation.nnz == 2
    assert data.test.nnz == 3
    assert data.name == tmp_path.name
    assert not data.has_text
    assert data.embedded("all-MiniLM-L6-v2", tmp_path).user_text.shape == (3, 0)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"val": {"shape": np.array([3, 5])}}, r"val.npz has shape \(3, 5\), trn.npz has \(3, 4\)"),
        ({"tst": {"row": np.array([0, 3, 1])}}, r"tst.npz: row goes from 0 to 3, allowed: 0 to 2"),
        ({"tst": {"col": np.array([0, -1, 1])}}, r"tst.npz: col goes from -1 to 1, allowed: 0 to 3"),
        ({"trn": {"row": np.array([0.5, 1, 1, 2])}}, r"trn.npz: 'row' has type float64, not integers"),
        ({"trn": {"row": np.array(["a", "b", "c", "d"])}}, r"trn.npz: 'row' has type <U1, not integers"),
        ({"trn": {"row": np.array([0, None, 1, 2], dtype=object)}}, r"trn.npz cannot be read: Object arrays"),
        ({"trn": {"row": np.array([0, 1])}}, r"row has shape \(2,\) and col \(4,\)"),
        ({"trn": {"col": None}}, r"trn.npz has no array 'col'; seen: row, shape"),
        (
            {"val": {"row": np.array([0, 1]), "col": np.array([1, 2])}},
            r"1 interactions are in train and in validation, .* user 0, item 1",
        ),
        (
            {"tst": {"row": np.array([1]), "col": np.array([2])}},
            r"1 interactions are in validation and in test, .* user 1, item 2",
        ),
        ({"tst": {"row": np.array([], int), "col": np.array([], int)}}, r"has no test interaction"),
        ({"trn": {"shape": np.array([3])}}, r"shape is \[3\]"),
        (
            {"trn": {"row": np.array([0, 0, 1, 2**40]), "shape": np.array([2**40 + 1, 4])}},
            r"1,099,511,627,777 users and 4 items by its shape, but 4 interactions: no rows",
        ),
    ],
)
def test_what_is_wrong_with_the_splits_is_named(tmp_path: Path, changed: dict, part: str) -> None:
    with pytest.raises(DataError, match=part) as error:
        read(write(tmp_path, **changed))
    assert error.value.hint


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a directory"):
        read(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "val.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"val.npz cannot be read"):
        read(tmp_path)
    (tmp_path / "val.npz").unlink()
    with pytest.raises(DataError, match=r"val.npz is missing"):
        read(tmp_path)


def test_a_damaged_archive_is_named_whatever_is_wrong_with_it(tmp_path: Path) -> None:
    path = write(tmp_path) / "trn.npz"
    stored = path.read_bytes()
    np.savez_compressed(path, **{name: np.arange(500) for name in ("row", "col", "shape")})
    packed = bytearray(path.read_bytes())
    packed[57] = 255  # the first byte behind the head: a block of no type that there is
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    single = path.read_bytes()
    flipped = stored.replace(np.array([0, 0, 1, 2]).tobytes(), np.array([0, 0, 1, 1]).tobytes())
    for damaged, part in (
        (b"", "No data left in file"),
        (stored[:300], "not a zip file"),
        (flipped, "Bad CRC-32 for file 'row.npy'"),
        (bytes(packed), "while decompressing data"),
        (single, "a single array, without a name"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"trn.npz cannot be read: .*{part}"):
            read(tmp_path)


def test_damaged_compressed_texts_are_named(tmp_path: Path) -> None:
    path = write(tmp_path) / "items.jsonl.gz"
    write_items(tmp_path, [json.dumps({"iid": item, "title": "word " * item}) for item in range(4)])
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len("..........items.jsonl.")] = 255  # behind the head of the file: a block of no type that there is
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b"plain"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"items.jsonl.gz cannot be read: .*compressed by gzip"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"iid": 9}', "line 1: 'iid' is 9, allowed: 0 to 3"),
        ('{"iid": 1', "cannot be read"),
        ("[1]", "'iid' is None"),
        ('{"iid": 1}\n\n{"iid": 0}\n{"iid": 1}', "'iid' is 1 in line 1 and in line 4. Give every item one line"),
        ('{"iid": 1, "title": ' + "[" * 100_000 + "]" * 100_000 + "}", "cannot be read: maximum recursion depth exceeded"),
    ],
)
def test_what_is_wrong_with_the_texts_is_named(tmp_path: Path, line: str, part: str) -> None:
    write(tmp_path)
    write_items(tmp_path, [line])
    with pytest.raises(DataError, match=part):
        read(tmp_path)


def test_texts_may_be_compressed_or_not_but_not_both(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "items.jsonl").write_text('{"iid": 1, "title": "a plain file"}\n', encoding="utf-8")
    assert read(tmp_path).item_texts == [None, "a plain file.", None, None]
    write_items(tmp_path, ['{"iid": 1, "title": "a compressed one"}'])
    with pytest.raises(DataError, match=r"has items.jsonl.gz and items.jsonl. Leave one"):
        read(tmp_path)


def test_text_fields_are_found_and_identifiers_are_not() -> None:
    rows = [
        {"asin": f"B{number}", "code": f"x{number}", "title": f"Nut {number}", "kind": ["hardware", "steel"], "price": 3.5}
        for number in range(5)
    ]
    texts = [*(f"Nut {number}. hardware, steel." for number in range(5)), None]
    assert texts_of([*rows, {}]) == (texts, ["asin", "code"])
    assert texts_of([{"user_id": "a b c"}, {"user_id": "d e"}]) == ([None, None], ["user_id"])


@pytest.mark.parametrize("title", ["千と千尋の神隠し{}", "第{}集", "ภาพยนตร์{}", "영화{}", "ಚಿತ್ರ{}"])
def test_a_title_without_spaces_is_a_text_where_no_identifier_has_such_letters(title: str) -> None:
    rows = [{"title": title.format(number), "sku": f"ÄB-{number}", "модель": f"Я{number}"} for number in range(20)]
    assert texts_of(rows) == ([f"{row['title']}." for row in rows], ["sku", "модель"])


def test_text_is_cleaned_and_cut() -> None:
    assert cleaned("['a <b>bold</b> claim', 'two &amp; more']") == "a bold claim, two & more"
    assert cleaned("[not a list") == "[not a list"
    for nothing in (None, float("nan"), float("-inf"), "NaN", " <NA>", "None", "NULL", [float("nan"), "nan"]):
        assert cleaned(nothing) == ""
    assert texts_of([{"story": "word " * 150}])[0] == [" ".join(["word"] * 100)]


def test_half_an_emoji_is_replaced_and_a_whole_one_stays(tmp_path: Path) -> None:
    write(tmp_path)
    lines = [{"iid": 0, "title": "a cat \ud83d"}, {"iid": 1, "title": "\ude3a a dog"}, {"iid": 2, "title": r"['\ud83d\ude3a']"}]
    write_items(tmp_path, [json.dumps(line) for line in lines])
    data = read(tmp_path)
    assert data.item_texts == ["a cat \ufffd.", "\ufffd a dog.", "\N{SMILING CAT FACE WITH OPEN MOUTH}.", None]
    assert data.embedded("all-MiniLM-L6-v2", tmp_path / "cache").item_text is not None


def test_a_missing_number_is_no_text_and_makes_none_of_the_others(tmp_path: Path) -> None:
    write(tmp_path)
    write_items(
        tmp_path, ['{"iid": 0, "title": NaN, "price": 1.5}', '{"iid": 1, "title": "two nuts", "price": NaN}', '{"iid": 2}']
    )
    assert read(tmp_path).item_texts == [None, "two nuts.", None, None]


def test_users_are_the_mean_of_their_training_items_unless_they_have_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    write_items(
        tmp_path, [json.dumps({"iid": item, "title": text}) for item, text in enumerate(["a cat", "a dog", "a car", "a bus"])]
    )
    with gzip.open(tmp_path / "users.jsonl.gz", "wt") as file:
        file.write(json.dumps({"uid": 1, "about": "drives lorries"}) + "\n")
    data = read(tmp_path).embedded("all-MiniLM-L6-v2", tmp_path / "cache")
    assert data.item_text is not None
    mean = data.item_text[0] + data.item_text[1]
    assert data.user_text[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
    assert data.user_text[2] == pytest.approx(data.item_text[2], abs=1e-6)
    assert data.user_text[1] @ data.item_text[1] < 0.9  # not the mean of the items: own text
    assert np.linalg.norm(data.user_text, axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    (cached,) = (tmp_path / "cache").glob("*.npy")
    stamp = cached.stat().st_mtime_ns
    again = read(tmp_path).embedded("all-MiniLM-L6-v2", tmp_path / "cache")
    assert (again.item_text == data.item_text).all()
    assert cached.stat().st_mtime_ns == stamp
    whole, embeddings = cached.read_bytes(), np.load(cached)
    monkeypatch.setattr(encoder, "load", lambda name: name)
    monkeypatch.setattr(encoder, "encode", lambda *_: embeddings)
    others = (embeddings[:-1], embeddings[:, :100], embeddings[0], embeddings.astype(np.float64), np.nan * embeddings)
    for damaged in (
        *(b"", whole[:40], whole[:-1], b"PK\x03\x04" + whole[4:], whole[:8] + b"\n" + whole[9:]),
        *map(_as_npy, others),
    ):
        cached.write_bytes(damaged)
        again = read(tmp_path).embedded("all-MiniLM-L6-v2", tmp_path / "cache")
        assert (again.item_text == data.item_text).all()
        assert cached.read_bytes() == whole


def _as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_the_fingerprint_follows_what_is_read(tmp_path: Path) -> None:
    first = read(write(tmp_path / "a")).fingerprint()
    assert read(write(tmp_path / "b")).fingerprint() == first
    assert read(write(tmp_path / "b", val={"row": np.array([0]), "col": np.array([2])})).fingerprint() != first
    write_items(tmp_path / "a", ['{"iid": 0, "title": "new words"}'])
    assert read(tmp_path / "a").fingerprint() != first


def test_an_ingest_output_is_read_too(tmp_path: Path) -> None:
    data = read(ingest(str(tmp_path), world()).path())
    assert (data.num_users, data.num_items) == (60, 40)
    assert (data.train.nnz, data.validation.nnz, data.test.nnz) == (720, 240, 240)
    assert not data.has_text  # titles that are ids say nothing


def test_planted_blocks_are_a_data_set_whose_texts_are_found(tmp_path: Path) -> None:
    data = read(write_blocks(tmp_path / "blocks"))
    assert data.facts()["items_with_text"] == data.num_items == 144
    assert all("<p>" not in (text or "") for text in data.item_texts)


def test_planted_blocks_are_replaced_file_by_file_by_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_blocks(tmp_path, users_per_block=4, items_per_block=4)
    opened = {file: file.open("rb") for file in folder.iterdir()}  # as by another run in the same folder
    before = {file: stream.read() for file, stream in opened.items()}
    later = time.time() + 86400
    monkeypatch.setattr(time, "time", lambda: later)
    write_blocks(folder, users_per_block=4, items_per_block=4)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    for file, stream in opened.items():
        with stream:
            assert os.fstat(stream.fileno()).st_ino != file.stat().st_ino, "written in place"

"""A data set for experiments: a fixed split, and text of items and users where there is any.

Two kinds of folder are read: ``trn.npz``, ``val.npz``, ``tst.npz`` (arrays ``row``, ``col``, ``shape``) with optional
``items.jsonl`` and ``users.jsonl``, compressed (``.gz``) or not; and the output of the ingest stage. Texts are embedded
once and kept by content.
"""

import gzip
import hashlib
import html
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cells import text_of
from components.errors import DataError, first_line
from components.experiment.store import write_atomically
from components.ids import SPLITS
from components.ingest.dataset import DATA_CARD_FILE, INTERACTIONS_FILE, Dataset
from components.progress import emit
from components.sideinfo.config import SideinfoConfig

FILES = dict(zip(SPLITS, ("trn.npz", "val.npz", "tst.npz"), strict=True))
TEXT_FILES = {"items": ("items.jsonl", "iid"), "users": ("users.jsonl", "uid")}
"""Each plain or with ".gz"; and the field that holds the row number."""
RAW_IDS = 1000  # so many rows per interaction, of a million or more, are no row numbers
MAX_WORDS = 100
BATCH = 64  # texts embedded at once

FloatMatrix = npt.NDArray[np.float32]
Texts = list[str | None]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ExperimentData:
    """One split of one data set."""

    name: str
    train: sp.csr_array
    """Binary float32, (num_users, num_items), indices sorted; so are the other two, and the three are disjoint."""
    validation: sp.csr_array
    test: sp.csr_array
    item_texts: Texts
    """(num_items,), None where there is no text."""
    user_texts: Texts
    """(num_users,), None where the user has no text of their own."""
    item_text: FloatMatrix | None = None
    """Embeddings of the items' texts with unit rows, (num_items, dim), dim 0 without any text; None: not yet embedded."""
    own_user_text: FloatMatrix | None = None
    """Embeddings of the users' own texts, a zero row where there is none, (num_users, dim)."""
    identifiers: tuple[str, ...] = ()
    """Fields of items and users that were taken for identifiers, and so are in no text."""

    @property
    def num_users(self) -> int:
        """Rows of the interactions."""
        return int(self.train.shape[0])

    @property
    def num_items(self) -> int:
        """Columns of the interactions."""
        return int(self.train.shape[1])

    @property
    def has_text(self) -> bool:
        """Whether any item has text."""
        return any(self.item_texts)

    @property
    def user_text(self) -> FloatMatrix:
        """Unit rows, (num_users, dim): the user's own text, else the normalised mean of the training items' embeddings."""
        assert self.item_text is not None, "texts are embedded before they are used"
        assert self.own_user_text is not None, "users' texts are embedded with the items'"
        means = unit_rows(np.asarray(self.train @ self.item_text, dtype=np.float32))
        has_own = self.own_user_text.any(axis=1, keepdims=True)
        return np.where(has_own, self.own_user_text, means).astype(np.float32)

    def fingerprint(self) -> str:
        """Hash of the split and the texts: what decides every result on these data."""
        digest = hashlib.sha256(f"{self.num_users} {self.num_items}".encode())
        for matrix in (self.train, self.validation, self.test):
            digest.update(matrix.indptr.astype(np.int64).tobytes() + matrix.indices.astype(np.int64).tobytes())
        digest.update(json.dumps([self.item_texts, self.user_texts]).encode())
        return digest.hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """Sizes, as a result carries them."""
        return {
            "fingerprint": self.fingerprint(),
            "num_users": self.num_users,
            "num_items": self.num_items,
            "num_interactions": {"train": self.train.nnz, "validation": self.validation.nnz, "test": self.test.nnz},
            "items_with_text": sum(text is not None for text in self.item_texts),
            "users_with_own_text": sum(text is not None for text in self.user_texts),
        }

    def embedded(self, encoder: str, cache: Path, advance: Callable[[int], None] = lambda count: None) -> "ExperimentData":
        """These data with embeddings, from the cache folder if these texts were embedded before.

        Args:
            encoder: name or folder of a sentence-transformers model.
            cache: one file per (texts, encoder).
            advance: told how many texts more are done.

        Raises:
            ConfigError: the encoder cannot be loaded.
        """
        if not self.has_text:
            return replace(
                self,
                item_text=np.zeros((self.num_items, 0), np.float32),
                own_user_text=np.zeros((self.num_users, 0), np.float32),
            )
        identity = SideinfoConfig(encoder=encoder).identity()["encoder"]
        texts = [*self.item_texts, *self.user_texts]
        name = hashlib.sha256(json.dumps([identity, texts]).encode()).hexdigest()[:16]
        path = cache / f"{name}.npy"
        found = _cached(path, len(texts))
        if found is None:
            from components.sideinfo import encoder as encoders

            found = encoders.encode(encoders.load(encoder), texts, BATCH, advance)
            write_atomically(path, lambda file: np.save(file, found))
        return replace(self, item_text=found[: self.num_items], own_user_text=found[self.num_items :])


def _cached(path: Path, num_texts: int) -> FloatMatrix | None:
    """Embeddings that were kept, else None; a file that is damaged or holds anything else is reported and counts as none."""
    try:
        found: FloatMatrix = np.load(path)
        if found.dtype != np.float32 or found.ndim != 2 or len(found) != num_texts:
            raise ValueError(f"it holds {found.dtype} of shape {found.shape}, not float32 of shape ({num_texts}, dim)")
        lengths = np.linalg.norm(found, axis=1)
        if not (lengths.any() and np.minimum(lengths, np.abs(lengths - 1)).max() < 1e-3):  # not the columns that were written
            raise ValueError("its rows have other lengths than 0 and 1")
        return found
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy reads the header as Python and a file of another kind as a zip: errors of many kinds
        reason = first_line(error)
        emit("warning", stage="experiment", message=f"{path} cannot be used ({reason}): the texts are embedded again")
        return None


def read(directory: str | Path) -> ExperimentData:
    """Reads a data set folder or an ingest output.

    Raises:
        DataError: a file is missing or damaged, the shapes differ, an index is outside, or the splits overlap.
        ArtifactError: an ingest output is damaged.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise DataError(f"'{folder}' is not a directory.", f"Give a folder with {', '.join(FILES.values())}.")
    data = _from_ingest(folder) if (folder / INTERACTIONS_FILE).is_file() else _from_arrays(folder)
    _check_disjoint(folder, data)
    for split, matrix in zip(SPLITS, (data.train, data.validation, data.test), strict=True):
        if not matrix.nnz:
            raise DataError(f"'{folder}' has no {split} interaction.", "Every split needs some: split the data again.")
    return data


def _from_ingest(folder: Path) -> ExperimentData:
    dataset = Dataset.load(folder)
    train, validation, test = (dataset.matrix(split) for split in SPLITS)
    titles = [
        None if title == item_id else title
        for title, item_id in zip(dataset.items["title"], dataset.items["item_id"], strict=True)
    ]
    items = [
        {"title": title, **dict(zip(dataset.item_text_columns, values, strict=True))}
        for title, *values in zip(titles, *(dataset.items[name] for name in dataset.item_text_columns), strict=True)
    ]
    users = [
        dict(zip(dataset.user_text_columns, values, strict=True))
        for values in zip(*(dataset.users[name] for name in dataset.user_text_columns), strict=True)
    ] or [{} for _ in range(dataset.num_users)]
    return _with_texts(dataset.name, (train, validation, test), items, users)


def _from_arrays(folder: Path) -> ExperimentData:
    matrices: dict[str, sp.csr_array] = {}
    for split, name in FILES.items():
        matrix = _read_matrix(folder / name)
        if matrices and matrix.shape != matrices[SPLITS[0]].shape:
            first = FILES[SPLITS[0]]
            raise DataError(
                f"{folder / name} has shape {matrix.shape}, {first} has {matrices[SPLITS[0]].shape}.",
                "All three splits have shape (num_users, num_items).",
            )
        matrices[split] = matrix
    num_users, num_items = matrices[SPLITS[0]].shape
    items = _read_rows(folder, "items", num_items)
    users = _read_rows(folder, "users", num_users)
    return _with_texts(folder.resolve().name, tuple(matrices.values()), items, users)


def _with_texts(name: str, splits: tuple[sp.csr_array, ...], items: Rows, users: Rows) -> ExperimentData:
    (item_texts, of_items), (user_texts, of_users) = texts_of(items), texts_of(users)
    train, validation, test = splits
    return ExperimentData(name, train, validation, test, item_texts, user_texts, identifiers=(*of_items, *of_users))


def _read_matrix(path: Path) -> sp.csr_array:
    rows, columns, shape = _read_arrays(path)
    if shape.shape != (2,) or (shape <= 0).any():
        raise DataError(f"{path}: shape is {shape.tolist()}.", "Write two positive numbers: users, items.")
    if rows.ndim != 1 or rows.shape != columns.shape:
        raise DataError(
            f"{path}: row has shape {rows.shape} and col {columns.shape}.", "Write one row and one col per interaction."
        )
    for name, array, size in (("row", rows, shape[0]), ("col", columns, shape[1])):
        if len(array) and not 0 <= array.min() <= array.max() < size:
            raise DataError(
                f"{path}: {name} goes from {array.min()} to {array.max()}, allowed: 0 to {size - 1}.", "Correct it."
            )
    num_users, num_items = (int(size) for size in shape)
    if max(num_users, num_items) > max(1_000_000, RAW_IDS * len(rows)):
        raise DataError(
            f"{path}: {num_users:,} users and {num_items:,} items by its shape, but {len(rows):,} interactions: no rows.",
            "Number users and items from 0 on, without gaps.",
        )
    coordinates = (rows.astype(np.int32), columns.astype(np.int32))
    matrix = sp.csr_array((np.ones(len(rows), dtype=np.float32), coordinates), shape=(num_users, num_items))
    matrix.sum_duplicates()  # also sorts the indices
    matrix.data[:] = 1.0
    return matrix


def _read_arrays(path: Path) -> tuple[npt.NDArray[np.integer], ...]:
    """The file's row, col and shape."""
    names = ("row", "col", "shape")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds a single array, without a name")
        with loaded as file:
            found = {name: np.asarray(file[name]) for name in names if name in file}
            seen = ", ".join(file)
    except FileNotFoundError:
        expected = f"Give a folder with {', '.join(FILES.values())}, or the output of ingest ({DATA_CARD_FILE} and so on)."
        raise DataError(f"{path} is missing.", expected) from None
    except Exception as error:  # zipfile, zlib and numpy have errors of their own for a damaged file; all mean the same here
        reason = first_line(error)
        raise DataError(f"{path} cannot be read: {reason}.", "Write row, col and shape as integers with numpy.savez.") from None
    for name in names:
        if name not in found:
            raise DataError(f"{path} has no array '{name}'; seen: {seen}.", "Write row, col and shape with numpy.savez.")
    for name, array in found.items():
        if array.dtype.kind not in "iu":
            raise DataError(f"{path}: '{name}' has type {array.dtype}, not integers.", "Write row numbers from 0 on.")
    return tuple(found.values())


def _check_disjoint(folder: Path, data: ExperimentData) -> None:
    parts = dict(zip(SPLITS, (data.train, data.validation, data.test), strict=True))
    for left, right in (("train", "validation"), ("train", "test"), ("validation", "test")):
        common = sp.csr_array(parts[left].multiply(parts[right]))
        if common.nnz:
            user, item = (int(index[0]) for index in common.nonzero())
            raise DataError(
                f"'{folder}': {common.nnz} interactions are in {left} and in {right}, for example user {user}, item {item}.",
                "An interaction belongs to one split: split the data again.",
            )


# -- text -------------------------------------------------------------------------------------------------------------------


def _read_rows(folder: Path, kind: str, count: int) -> list[dict[str, Any]]:
    """Fields by row number; empty ones where the file says nothing or is not there."""
    name, key = TEXT_FILES[kind]
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    paths = [path for path in (folder / f"{name}.gz", folder / name) if path.is_file()]
    if not paths:
        return rows
    if len(paths) == 2:
        raise DataError(f"'{folder}' has {name}.gz and {name}.", "Leave one: they may differ.")
    (path,) = paths
    seen: dict[int, int] = {}  # line of each row
    try:
        for number, line in _lines(path):
            fields = json.loads(line)
            row = fields.get(key) if isinstance(fields, dict) else None
            if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < count:
                raise DataError(
                    f"{path}, line {number}: '{key}' is {row!r}, allowed: 0 to {count - 1}.", f"Give every {kind[:-1]} its row."
                )
            if row in seen:
                raise DataError(
                    f"{path}: '{key}' is {row} in line {seen[row]} and in line {number}.", f"Give every {kind[:-1]} one line."
                )
            seen[row] = number
            rows[row] = {field: value for field, value in fields.items() if field != key}
    except (OSError, ValueError, EOFError, zlib.error, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        reason = first_line(error)
        raise DataError(
            f"{path} cannot be read: {reason}.",
            "Write one JSON object a line, in UTF-8; a name with .gz is compressed by gzip.",
        ) from None
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that hold something, with their numbers in the file, from 1."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def texts_of(rows: Rows) -> tuple[Texts, list[str]]:
    """One text per row from whatever fields say something: joined, cleaned, at most `MAX_WORDS` words; None for nothing.

    A field counts unless it holds identifiers: its name ends in "id", or nearly all values are single words in Latin, Greek or
    Cyrillic letters, all different.

    Returns:
        The texts, and the fields that hold identifiers.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    fields = {name: list(filter(None, (cleaned(row.get(name)) for row in rows))) for name in names}
    worded = {name: values for name, values in fields.items() if any(map(str.isalpha, "".join(values)))}
    told = [name for name, values in worded.items() if not _are_identifiers(name, values)]
    texts: Texts = []
    for row in rows:
        said = [text if text.endswith((".", "!", "?")) else f"{text}." for name in told if (text := cleaned(row.get(name)))]
        texts.append(" ".join(" ".join(said).split()[:MAX_WORDS]) or None)
    return texts, [name for name in worded if name not in told]


# letters beyond Latin, Greek and Cyrillic: a title in Chinese or Thai has no spaces either
_OTHER_LETTERS = re.compile(r"[^\x00-\u052f\W\d_]")


def _are_identifiers(name: str, values: Sequence[str]) -> bool:
    if name.lower().endswith("id"):
        return True
    if len(values) < 3:  # too few to tell
        return False
    single = sum(" " not in value and not _OTHER_LETTERS.search(value) for value in values) / len(values)
    return single >= 0.9 and len(set(values)) >= 0.9 * len(values)


_TAG = re.compile(r"<[^<>]+>")


def cleaned(value: Any) -> str:
    """A field as text, see `text_of`; HTML and superfluous space taken out."""
    return text_of(value, _without_html)


def _without_html(text: str) -> str:
    # half of a pair, as JSON may hold one (cut in the middle of an emoji), cannot be encoded and stops the tokenizer
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(_TAG.sub(" ", html.unescape(whole)).split())


def unit_rows(matrix: npt.NDArray[np.floating]) -> FloatMatrix:
    """Rows scaled to length 1; zero rows stay zero."""
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.asarray(matrix / np.where(lengths > 0, lengths, 1.0), dtype=np.float32)

"""The user's files as frames of text, chunk by chunk.

Every value comes out as text (missing = ""), so that a bad one can be shown as it was written; what it must be is the
business of ``components.ingest.validation``.
"""

import csv
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from components.cells import SEPARATORS as VALUE_SEPARATORS
from components.cells import are_shared
from components.errors import DataError, did_you_mean
from components.ids import TIMESTAMP
from components.ingest.config import Quoting
from components.progress import emit

CHUNK_ROWS = 500_000
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
_QUOTING: dict[Quoting, int] = {"minimal": csv.QUOTE_MINIMAL, "none": csv.QUOTE_NONE}
_UNQUOTED_HINT = "if values are not quoted: --set ingest.quoting=none"
_OTHER_SEPARATORS = ";\t|"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def open_source(path: str) -> IO[bytes]:
    """Opens a local path or a URI for reading; raises DataError naming the path when it cannot be."""
    try:
        if "://" in path:
            filesystem, inner = pafs.FileSystem.from_uri(path)
            return cast(IO[bytes], filesystem.open_input_file(inner))
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(
            f"file '{path}' does not exist (looked from '{os.getcwd()}').", "Correct ingest.interactions, items or users."
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"file '{path}' cannot be read: {reason}.", "Check the path and its permissions.") from None


def sha256_source(path: str) -> str:
    """Hex SHA-256 of a source file's bytes; raises DataError when it cannot be read."""
    digest = hashlib.sha256()
    with open_source(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def extension(path: str) -> str:
    """ ".csv", ".tsv" or ".parquet"; raises DataError for any other."""
    found = os.path.splitext(path)[1].lower()
    if found not in SEPARATORS and found != PARQUET:
        raise DataError(
            f"file '{path}' has the extension '{found}'; allowed: {', '.join([*SEPARATORS, PARQUET])}.",
            "Save the table as one of these, or rename the file.",
        )
    return found


def column_names(path: str, quoting: Quoting = "minimal") -> list[str]:
    """The table's column names, see `read_chunks`; raises DataError when there is no table."""
    if extension(path) == PARQUET:
        with open_source(path) as file:
            return list(_parquet(path, file).schema_arrow.names)
    return list(next(_csv_chunks(path, 1, quoting)).columns)


def resolve(path: str, names: list[str], column: str, setting: str) -> str:
    """`column` when the table has it; raises DataError naming the columns seen and the setting to change."""
    if column in names:
        return column
    hint = f"Name yours: --column {setting.rpartition('.')[2]}=NAME (or --set {setting}=NAME)"
    separator = next((mark for mark in _OTHER_SEPARATORS if len(names) == 1 and mark in names[0]), None)
    if separator:
        hint = f"It seems to be separated by {separator!r}: save it with commas (.csv) or tabs (.tsv)"
    raise DataError(f"file '{path}' has no column '{column}'; columns seen: {', '.join(names)}.", hint)


def resolve_text(where: str, names: list[str], column: str, setting: str) -> str:
    """As `resolve`, for a column that the user listed in `setting`; the closest name is suggested."""
    if column not in names:
        raise DataError(
            f"setting '{setting}' names the column '{column}', which {where} does not have.", did_you_mean(column, names)
        )
    return column


def read_chunks(
    path: str, columns: Mapping[str, str], chunk_rows: int = CHUNK_ROWS, quoting: Quoting = "minimal"
) -> Iterator[Any]:
    """The chosen columns as text.

    Args:
        path: of a CSV, TSV or Parquet file.
        columns: the platform's name of a column -> the file's.
        chunk_rows: rows per frame.
        quoting: see ``IngestConfig.quoting``.

    Yields:
        DataFrames with the platform's names and str values; the index is the 0-based data row in the file.

    Raises:
        DataError: the file is empty, not UTF-8, or not a table; two columns have one name.
    """
    is_parquet = extension(path) == PARQUET
    chunks = _parquet_chunks(path, columns, chunk_rows) if is_parquet else _csv_chunks(path, chunk_rows, quoting)
    seen = 0
    for chunk in chunks:
        seen += len(chunk)
        yield chunk[list(columns.values())].set_axis(list(columns), axis=1)
    if not seen:
        raise DataError(f"file '{path}' has column names but no rows.", "Give it at least one row.")


def _csv_chunks(path: str, chunk_rows: int, quoting: Quoting) -> Iterator[Any]:
    import pandas as pd

    separator = SEPARATORS[extension(path)]
    options: dict[str, Any] = {"sep": separator, "dtype": str, "na_filter": False, "quoting": _QUOTING[quoting]}
    swallowed: list[tuple[int, int]] = []
    try:
        with open_source(path) as file, _Text(path, file) as text:
            # apart from the rows: pandas renames a column whose name it has seen
            first = pd.read_csv(text, header=None, nrows=1, **options).iloc[0]
            _refuse_twice(path, [name.strip() for name in first if name])
            text.seek(0)
            for chunk in pd.read_csv(text, chunksize=chunk_rows, **options):
                # not usecols: pandas then accepts rows with too many fields, and their values are in the wrong columns
                if not isinstance(chunk.index, pd.RangeIndex):
                    raise DataError(
                        f"file '{path}' has more fields in its rows than in its first line.",
                        "Name every column in the first line, and quote values that contain the separator.",
                    )
                chunk.columns = [str(name).strip() for name in chunk.columns]
                chunk = chunk.fillna("")  # a row with too few fields
                swallowed += _looks_like_rows(chunk, separator)
                yield chunk
    except pd.errors.EmptyDataError:
        raise DataError(f"file '{path}' is empty.", "Give a first line of column names and one row per entry.") from None
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except pd.errors.ParserError as error:
        reason = str(error).splitlines()[0].removeprefix("Error tokenizing data. C error: ")
        otherwise = _UNQUOTED_HINT if quoting == "minimal" else "quoted values need: --set ingest.quoting=minimal"
        raise DataError(
            f"file '{path}' is not a table: {reason}.", f"Quote values that contain the separator; {otherwise}"
        ) from None
    if swallowed:
        (row, lines), rows = swallowed[0], sum(lines - 1 for _, lines in swallowed)
        emit(
            "warning",
            stage="ingest",
            message=f"file '{path}' has {len(swallowed)} value(s) that hold whole rows, the first in row {row}, which spans "
            f"{lines} lines: looks like {rows} rows swallowed by a quotation mark; {_UNQUOTED_HINT}",
        )


class _Text(io.TextIOWrapper):
    """A file's text without NUL: pandas ends a field there, and ids that differ after it become one."""

    def __init__(self, path: str, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8-sig", newline="")  # with or without the mark that spreadsheets put first
        self._path = path

    def read(self, size: int | None = -1, /) -> str:
        text = super().read(size)
        if "\0" in text:
            number = next(number for number, line in enumerate(_lines(self._path), start=1) if b"\0" in line)
            raise DataError(
                f"file '{self._path}' has a NUL byte in line {number}, which no text has.",
                f"Remove it, for example: tr -d '\\000' < '{self._path}' > clean.csv (many of them: the file may be UTF-16)",
            )
        return text


def _looks_like_rows(chunk: Any, separator: str) -> Iterator[tuple[int, int]]:
    """Row and number of lines of each value in which a line has as many fields as the table has columns."""
    for _, column in chunk.items():
        if "\n" not in "".join(column):  # most columns, and much faster than to ask each value
            continue
        for row, value in column[column.str.contains("\n", regex=False)].items():
            lines = value.split("\n")
            if any(line.count(separator) == chunk.shape[1] - 1 for line in lines):
                yield row, len(lines)


def _lines(path: str) -> Iterator[bytes]:
    with open_source(path) as file:
        yield from io.BufferedReader(cast(io.RawIOBase, file))  # a file of pyarrow's has no lines


def _not_utf8(path: str) -> DataError:
    """Says which byte of which line cannot be decoded."""
    offset = 0
    for number, line in enumerate(_lines(path), start=1):
        if number == 1 and line[:2] in _UTF16_MARKS:
            return _encoding_error(path, "it begins with the mark of UTF-16", "UTF-16")
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte 0x{line[error.start]:02x} at offset {offset + error.start}, line {number}"
            return _encoding_error(path, where, "ISO-8859-1")
        offset += len(line)
    return _encoding_error(path, "its end is cut off", "ISO-8859-1")


def _encoding_error(path: str, where: str, likely: str) -> DataError:
    return DataError(
        f"file '{path}' is not UTF-8: {where}.", f"Convert it, for example: iconv -f {likely} -t UTF-8 '{path}' > utf8.csv"
    )


def _parquet(path: str, file: IO[bytes]) -> Any:
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
    _refuse_twice(path, table.schema_arrow.names)
    return table


def _refuse_twice(path: str, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"file '{path}' has more than one column '{twice[0]}'.", "Give each column a name of its own.")


def _damaged(path: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return DataError(f"file '{path}' is not Parquet, or damaged: {reason}.", "Write it again, or give the data as CSV.")


def _parquet_chunks(path: str, columns: Mapping[str, str], chunk_rows: int) -> Iterator[Any]:
    import pandas as pd

    start = 0
    parted: dict[str, str] = {}
    with open_source(path) as file:
        for batch in _batches(path, _parquet(path, file), list(dict.fromkeys(columns.values())), chunk_rows):
            texts = {name: _column(path, name, batch[name], name == columns.get(TIMESTAMP)) for name in batch.schema.names}
            yield pd.DataFrame(texts, index=pd.RangeIndex(start, start + len(batch)), dtype=object)
            start += len(batch)
            for name in batch.schema.names:
                if name not in parted and (value := _parted(batch[name])):
                    parted[name] = value
    for name, value in parted.items():
        emit(
            "warning",
            stage="ingest",
            message=f"file '{path}' has a column '{name}' of lists, whose values are joined by commas: one that has "
            f"{' or '.join(VALUE_SEPARATORS)} in it is read as several, for example {value!r}. Write it without",
        )


def _batches(path: str, table: Any, columns: list[str], rows: int) -> Iterator[Any]:
    """Record batches; a page that cannot be decoded is found here, long after the file was opened."""
    try:
        yield from table.iter_batches(rows, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _column(path: str, name: str, column: pa.Array, is_time: bool) -> list[str]:
    try:
        return _as_text(column, is_time)
    except UnicodeDecodeError as error:  # pyarrow does not look at the bytes of a text before it is asked for it
        raise _damaged(path, error) from None
    except pa.ArrowException:
        raise DataError(
            f"file '{path}' has a column '{name}' of type {column.type}, which cannot be read as text.",
            "Write it as text, or list the columns that describe without it: --set ingest.item_text_columns=[...] (of users: "
            "user_text_columns).",
        ) from None


def _as_text(column: pa.Array, is_time: bool) -> list[str]:
    """Values as a person would write them: 3 and not 3.0 for whole numbers, lists joined by commas, "" for null."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_list(column.type):
        values, ends = _flat(column)
        texts = _as_text(values, False)
        return [", ".join(filter(None, texts[start:end])) for start, end in pairwise(ends.tolist())]
    if is_time and (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)):  # a time of day is no point in time
        column = pc.cast(pc.cast(column, pa.timestamp("s"), safe=False), pa.int64())
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
        # ids become floats in pandas as soon as one of them is missing
        if pc.all(pc.equal(pc.floor(column), column)).as_py() and (pc.max(pc.abs(column)).as_py() or 0) < 2**53:
            column = pc.cast(column, pa.int64())
    return cast(list[str], pc.fill_null(pc.cast(column, pa.string()), "").to_pylist())


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _flat(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The values of lists, however nested, and where those of each row end, from 0 on; (num_rows + 1,)."""
    ends = np.arange(len(column) + 1)
    while _is_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        ends = np.concatenate([[0], np.cumsum(lengths)])[ends]
        column = column.flatten()  # leaves null lists out
    return column, ends


def _parted(column: pa.Array) -> str | None:
    """A value of lists that will be read as several; None where there is none, or where values are phrases, as any may be."""
    if not _is_list(column.type):
        return None
    values, _ = _flat(column)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return None
    found = values.filter(pc.match_substring_regex(values, f"[{VALUE_SEPARATORS}]"))
    if not len(found) or not are_shared(pc.count_distinct(values).as_py(), len(values)):
        return None
    return cast(str, found[0].as_py())

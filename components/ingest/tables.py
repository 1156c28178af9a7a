"""From a source to typed tables: interactions, items and users, with every rejected row and its reason."""

import json
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from components.cells import text_of
from components.errors import DataError
from components.ids import ITEM, ITEM_ID, RATING, REVIEW, TIMESTAMP, TITLE, USER, USER_ID
from components.ingest import readers, sample
from components.ingest.config import ColumnsConfig, IngestConfig
from components.ingest.validation import LARGEST_TIME, entities_schema, interactions_schema, numbers, rejections
from components.progress import emit

REASON, VALUE, TABLE, ROW = "reason", "value", "table", "row"
REMOVED_COLUMNS = (TABLE, ROW, USER_ID, ITEM_ID, REASON, VALUE)
_SHOWN = 5
_CLOCKS_DIFFER_S = 300
_FIRST_LOGS_S = 631_152_000  # 1990: nobody has clicks that are older
_UNTIMED_HINT = "Give Unix time as a number, or do without: --set ingest.columns.timestamp=null"
_TIME_UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
_UNITS_PER_SECOND = np.array([1, 10**3, 10**6, 10**9])
# from the limit on, a value lies after the year 2262 in the unit: none that counts, and none that a feature store can hold
_UNIT_LIMITS = LARGEST_TIME / 10**9 * _UNITS_PER_SECOND
# what pandas calls a column without a name: most often the index of the frame that was saved
_NAMELESS = re.compile(r"Unnamed: \d+|__index_level_\d+__")


@dataclass(frozen=True)
class Entities:
    """The items or the users as the source describes them."""

    table: pd.DataFrame
    """Indexed by raw id; `title` (items only) and the text columns, all str, "" where there is none."""
    text_columns: list[str]


@dataclass
class Source:
    """What was read."""

    interactions: pd.DataFrame
    """user_id, item_id (categories of str), rating (float64, NaN if there is none), timestamp (int64 Unix seconds, 0 if there
    is none), row (0-based data row of the file), and review (str, "" if there is none) where the source has such a column."""
    items: Entities
    users: Entities
    has_rating: bool
    has_timestamp: bool
    time_unit: str
    rows_read: dict[str, int] = field(default_factory=dict)
    """Rows of each file, by table."""
    removed: list[pd.DataFrame] = field(default_factory=list)
    """Rejected rows, columns `REMOVED_COLUMNS`."""


def load(config: IngestConfig) -> Source:
    """Reads and validates the tables of `config`.

    Raises:
        DataError: a file is missing, empty, not UTF-8 or not a table; a column is missing; no row is usable.
    """
    return _load_sample(config) if config.source == "sample" else _load_files(config)


def _load_sample(config: IngestConfig) -> Source:
    removed: list[pd.DataFrame] = []
    events = sample.interactions()
    items, users = sample.items(), sample.users()
    rows_read = {"interactions": len(events), "items": len(items), "users": len(users)}
    item_names = sample.ITEM_TEXT_COLUMNS if config.item_text_columns is None else config.item_text_columns
    item_texts = _listed("the sample's table of items", list(items.columns), item_names, "item")
    user_texts = _listed("the sample's table of users", list(users.columns), config.user_text_columns or (), "user")
    interactions, unit = typed_interactions([events], True, True, "the sample", removed)
    return Source(
        interactions,
        entities(items, ITEM_ID, item_texts, "items", removed),
        entities(users, USER_ID, user_texts, "users", removed),
        has_rating=True,
        has_timestamp=True,
        time_unit=unit,
        rows_read=rows_read,
        removed=removed,
    )


def _load_files(config: IngestConfig) -> Source:
    assert config.interactions is not None  # the config's validator says so
    removed: list[pd.DataFrame] = []
    rows_read: dict[str, int] = {}

    # headers first: a misspelt column is told at once, not after a long read
    chosen = _interaction_columns(config.interactions, config)
    item_columns = _item_columns(config.items, config) if config.items is not None else {}
    user_columns = _user_columns(config.users, config) if config.users is not None else {}

    def chunks(table: str, path: str, columns: dict[str, str]) -> Iterator[pd.DataFrame]:
        return _counted(readers.read_chunks(path, columns, quoting=config.quoting), table, rows_read)

    has_rating, has_timestamp = RATING in chosen, TIMESTAMP in chosen
    interactions, unit = typed_interactions(
        chunks("interactions", config.interactions, chosen),
        has_rating,
        has_timestamp,
        f"file '{config.interactions}'",
        removed,
        needs_rating=config.min_rating is not None,
    )
    items = users = Entities(pd.DataFrame(index=pd.Index([], dtype=object)), [])
    if config.items is not None:
        frame = pd.concat(chunks("items", config.items, item_columns))
        items = entities(frame, ITEM_ID, tuple(item_columns), "items", removed)
        _check_ids_meet("item", interactions[ITEM_ID], items.table.index, config.interactions, config.items)
    if config.users is not None:
        frame = pd.concat(chunks("users", config.users, user_columns))
        users = entities(frame, USER_ID, tuple(user_columns), "users", removed)
        _check_ids_meet("user", interactions[USER_ID], users.table.index, config.interactions, config.users)
    has_timestamp = bool(interactions[TIMESTAMP].any())  # 0 is none, in every later stage as well
    return Source(interactions, items, users, has_rating, has_timestamp, unit, rows_read, removed)


def typed_interactions(
    chunks: Iterable[pd.DataFrame],
    has_rating: bool,
    has_timestamp: bool,
    where: str,
    removed: list[pd.DataFrame],
    needs_rating: bool = True,
) -> tuple[pd.DataFrame, str]:
    """Validates chunks of text and gives them types.

    Args:
        chunks: columns user_id, item_id and, if there is one, rating, timestamp; all text; indexed by row of the file.
        has_rating: whether there is a rating.
        has_timestamp: whether there is a timestamp.
        where: name of the source in an error.
        removed: rejected rows are appended here.
        needs_rating: whether a row without a rating is rejected where there is a column of them.

    Returns:
        `Source.interactions`, and the unit in which the timestamps were given.

    Raises:
        DataError: no row is usable.
    """
    schema, parts = interactions_schema(has_rating, has_timestamp, needs_rating), []
    reasons: dict[str, int] = {}
    for chunk in chunks:
        chunk = chunk.assign(**{name: chunk[name].str.strip() for name in (USER_ID, ITEM_ID)})
        bad = rejections(chunk, schema)
        for reason, count in bad[REASON].value_counts().items():
            reasons[str(reason)] = reasons.get(str(reason), 0) + int(count)
        if len(bad):
            rows = chunk.loc[bad.index]
            removed.append(removal("interactions", bad.index, rows[USER_ID], rows[ITEM_ID], bad[REASON], bad[VALUE]))
        good = chunk.drop(index=bad.index)
        parts.append(
            pd.DataFrame(
                {
                    # categories: an id that occurs a thousand times is one string
                    USER_ID: good[USER_ID].astype("category"),
                    ITEM_ID: good[ITEM_ID].astype("category"),
                    RATING: numbers(good[RATING]) if has_rating else np.nan,
                    TIMESTAMP: numbers(good[TIMESTAMP]) if has_timestamp else 0.0,
                    ROW: good.index.to_numpy(np.int64),
                }
                | ({REVIEW: good[REVIEW].map(clean_text)} if REVIEW in good else {})
            )
        )
    if not any(len(part) for part in parts):
        counted = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        raise DataError(
            f"no interaction of {where} is usable: {sum(reasons.values())} rows, rejected as {counted}.",
            _UNTIMED_HINT
            if set(reasons) <= {"timestamp_not_a_number", "timestamp_out_of_range"}
            else "Check that ingest.columns names the right columns and that they are filled.",
        )
    interactions = pd.DataFrame(
        {name: pd.api.types.union_categoricals([part[name] for part in parts]) for name in (USER_ID, ITEM_ID)}
        | {name: np.concatenate([part[name].to_numpy() for part in parts]) for name in parts[0].columns[2:]}
    )
    given = interactions[TIMESTAMP].to_numpy()
    interactions[TIMESTAMP], unit, others = unix_seconds(given)
    if unit != "seconds":
        emit("warning", stage="ingest", message=f"timestamps are read as {unit} since 1970")
    if others.any():
        first = int(others.argmax())
        emit(
            "warning",
            stage="ingest",
            message=f"{others.sum()} of {len(others)} timestamps would lie in 1970 or after the year 2262 if they were {unit} "
            f"like the rest, for example {given[first]:.0f} in row {interactions[ROW].iloc[first]}: they are read in the unit "
            "that their size tells (seconds and milliseconds in one column are the usual cause)",
        )
    return interactions, unit


def unix_seconds(times: np.ndarray) -> tuple[np.ndarray, str, np.ndarray]:
    """Unix times in any unit as whole seconds.

    The unit is told by the size of the median; a value that is too large for it is in the next unit for which it is not. One
    that is too small (it would lie in 1970) is in the unit of its own size, if it and the median then lie in times that have
    logs: times that count from 0 have small values too.

    Args:
        times: float64, 0 to `LARGEST_TIME`, (n,).

    Returns:
        int64 seconds, (n,); the unit of most; bool, (n,), which values are in another.
    """
    median = np.median(times)
    unit = int(np.searchsorted(_UNIT_LIMITS[:-1], median, side="right"))
    own = np.searchsorted(_UNIT_LIMITS[:-1], times, side="right")
    is_dated = (median // _UNITS_PER_SECOND[unit] >= _FIRST_LOGS_S) & (times // _UNITS_PER_SECOND[own] >= _FIRST_LOGS_S)
    own = np.where((own > unit) | is_dated, own, unit)
    return (times // _UNITS_PER_SECOND[own]).astype(np.int64), _TIME_UNITS[unit], own != unit


def in_the_future(interactions: pd.DataFrame, now: float) -> pd.DataFrame:
    """The interactions that happened after `now` (Unix seconds), and not because two clocks differ a little."""
    return interactions[interactions[TIMESTAMP] > now + _CLOCKS_DIFFER_S]


def entities(frame: pd.DataFrame, id_column: str, texts: Sequence[str], table: str, removed: list[pd.DataFrame]) -> Entities:
    """Validates a table of items or users; the first row of an id counts, the others are rejected.

    Args:
        frame: text columns; indexed by row of the file.
        id_column: ITEM_ID or USER_ID.
        texts: the text columns to keep; the id and the title are none, and twice is once.
        table: "items" or "users", for `removed`.
        removed: rejected rows are appended here.
    """
    frame = frame.assign(**{id_column: frame[id_column].str.strip()})
    bad = rejections(frame, entities_schema(id_column))
    if len(bad):
        ids = {id_column: frame.loc[bad.index, id_column]}
        removed.append(removal(table, bad.index, ids.get(USER_ID, ""), ids.get(ITEM_ID, ""), bad[REASON], bad[VALUE]))
    kept = frame.drop(index=bad.index).set_index(id_column)
    texts = [name for name in dict.fromkeys(texts) if name not in (id_column, TITLE)]
    shown = [name for name in (TITLE, *texts) if name in kept.columns]
    return Entities(kept[shown].apply(lambda column: column.map(clean_text)), texts)


def usable_ids(chunk: pd.DataFrame, id_column: str) -> tuple[list[str], list[str]]:
    """The ids of a chunk of text that rows of a table may have, and the reasons against the others."""
    chunk = chunk.assign(**{id_column: chunk[id_column].str.strip()})
    bad = rejections(chunk, entities_schema(id_column, unique=False))
    return chunk[id_column].drop(index=bad.index).tolist(), bad[REASON].tolist()


def removal(table: str, rows: object, user_id: object, item_id: object, reason: object, value: object) -> pd.DataFrame:
    """Rows of removed.parquet, columns `REMOVED_COLUMNS`."""
    values = [np.asarray(given) for given in (table, rows, user_id, item_id, reason, value)]
    size = len(values[1])
    return pd.DataFrame({name: np.broadcast_to(given, size) for name, given in zip(REMOVED_COLUMNS, values, strict=True)})


def clean_text(text: str) -> str:
    """One line without control characters, Unicode NFC, see `text_of`; "" for what means that there is none."""
    return text_of(text, _one_line)


def _one_line(text: str) -> str:
    spaced = "".join(" " if unicodedata.category(char) == "Cc" else char for char in unicodedata.normalize("NFC", text))
    return " ".join(spaced.split())


def _interaction_columns(path: str, config: IngestConfig) -> dict[str, str]:
    names, columns = readers.column_names(path, config.quoting), config.columns
    chosen = {
        USER_ID: readers.resolve(path, names, columns.user_id, "ingest.columns.user_id"),
        ITEM_ID: readers.resolve(path, names, columns.item_id, "ingest.columns.item_id"),
    }
    for name, column in ((RATING, columns.rating), (TIMESTAMP, columns.timestamp), (REVIEW, columns.review)):
        default = ColumnsConfig.model_fields[name].default
        if column is not None and (column in names or column != default):
            chosen[name] = readers.resolve(path, names, column, f"ingest.columns.{name}")
    return chosen


def _item_columns(path: str, config: IngestConfig) -> dict[str, str]:
    names, columns, texts = readers.column_names(path, config.quoting), config.columns, config.item_text_columns
    chosen = {ITEM_ID: readers.resolve(path, names, columns.item_id, "ingest.columns.item_id")}
    if columns.title is not None:
        chosen[TITLE] = readers.resolve(path, names, columns.title, "ingest.columns.title")
    if texts is None:
        texts = tuple(name for name in names if not _NAMELESS.fullmatch(name))
    return chosen | _own_names(path, _listed(f"file '{path}'", names, texts, "item"), chosen, "item")


def _user_columns(path: str, config: IngestConfig) -> dict[str, str]:
    """What describes people is read where somebody has named it, and not because a file has it."""
    names, texts = readers.column_names(path, config.quoting), config.user_text_columns
    chosen = {USER_ID: readers.resolve(path, names, config.columns.user_id, "ingest.columns.user_id")}
    others = [name for name in names if name not in chosen.values() and not _NAMELESS.fullmatch(name)]
    if texts is None and others:
        all_of_them = shlex.quote(f"ingest.user_text_columns={json.dumps(others, ensure_ascii=False)}")
        emit(
            "warning",
            stage="ingest",
            message=f"of file '{path}' no column but the id is read, and users have no text. Name those that shall describe "
            f"them: --set {all_of_them}; for none: --set 'ingest.user_text_columns=[]'",
        )
    return chosen | _own_names(path, _listed(f"file '{path}'", names, texts or (), "user"), chosen, "user")


def _listed(where: str, names: list[str], texts: Sequence[str], entity: str) -> list[str]:
    return [readers.resolve_text(where, names, name, f"ingest.{entity}_text_columns") for name in texts]


def _own_names(path: str, names: list[str], chosen: dict[str, str], entity: str) -> dict[str, str]:
    """Text columns keep the names that the user gave them, unless the platform means something else by one."""
    others = [name for name in names if name not in chosen.values()]
    if clash := sorted({USER, USER_ID, ITEM, ITEM_ID, TITLE}.intersection(others)):
        raise DataError(
            f"file '{path}' has a column '{clash[0]}' beside the one that ingest.columns names; that name is taken.",
            f"Rename it in the file, or list the columns to use: --set ingest.{entity}_text_columns=[...]",
        )
    return {name: name for name in others}


def _counted(chunks: Iterator[pd.DataFrame], table: str, rows_read: dict[str, int]) -> Iterator[pd.DataFrame]:
    for chunk in chunks:
        rows_read[table] = rows_read.get(table, 0) + len(chunk)
        yield chunk


def _check_ids_meet(entity: str, ids: pd.Series, described: pd.Index, interactions: str, path: str) -> None:
    """Not one id in common means that the files use different ids, and every item (or user) would be without text."""
    seen = ids.cat.categories
    if seen.isin(described).any():
        return
    raise DataError(
        f"no {entity} of file '{interactions}' (ids {_some(seen)}) is in file '{path}' (ids {_some(described)}).",
        f"Check ingest.columns.{entity}_id: both files must use the same ids.",
    )


def _some(ids: Sequence[str] | pd.Index) -> str:
    return ", ".join(repr(str(raw)) for raw in sorted(ids)[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")

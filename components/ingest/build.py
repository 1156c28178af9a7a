"""What the ingest stage does: raw interactions, items and users -> the validated, filtered and split data set.

Steps: validate each row, apply the implicit-feedback threshold, keep one interaction per user and item, reduce to the k-core,
number users and items, split. Nothing is lost silently: each row that does not arrive is in removed.parquet with its reason.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.artifacts import write_json
from components.errors import ConfigError, DataError
from components.ids import ITEM, ITEM_ID, RATING, REVIEW, SPLIT, SPLITS, TIMESTAMP, TITLE, USER, USER_ID, Vocabulary
from components.ingest import card, filters, splits, tables
from components.ingest.config import IngestConfig
from components.ingest.dataset import (
    DATA_CARD_FILE,
    INTERACTIONS_FILE,
    ITEMS_FILE,
    NEWCOMERS_FILE,
    REMOVED_FILE,
    USERS_FILE,
    Dataset,
)
from components.ingest.tables import REASON, ROW, Entities, Source
from components.progress import emit

BELOW_MIN_RATING = "below_min_rating"
DUPLICATE = "duplicate_interaction"
FEWEST = 2
MANY = 0.5  # of the users: from there on the times that they have are told as too coarse


def build(directory: Path, config: IngestConfig) -> dict[str, Any]:
    """Writes the data set into `directory`; returns the manifest's facts."""
    source = tables.load(config)
    if config.split.method == "temporal" and not source.has_timestamp:
        raise ConfigError(
            "setting 'ingest.split.method' = 'temporal' needs timestamps, and the interactions have none (0 is none).",
            "Name their column (--set ingest.columns.timestamp=NAME) or set ingest.split.method=random",
        )
    interactions, removed, rounds = select(source, config)
    dataset = number_and_split(interactions, source, config)

    _write(directory / INTERACTIONS_FILE, dataset.interactions)
    _write(directory / USERS_FILE, dataset.users)
    _write(directory / ITEMS_FILE, dataset.items)
    newcomers = newcomers_of(source.users, dataset.users[USER_ID])
    if len(newcomers):
        _write(directory / NEWCOMERS_FILE, newcomers)
    _write(directory / REMOVED_FILE, removed.sort_values([tables.TABLE, ROW], kind="stable"))
    by_reason = {str(reason): int(count) for reason, count in removed[REASON].value_counts().sort_index().items()}
    described, late = card.describe(dataset), tables.in_the_future(source.interactions, time.time())
    data_card = {
        "name": config.name,
        "source": config.source,
        "rows_read": source.rows_read,
        "removed_by_reason": by_reason,
        "k_core_rounds": rounds,
        "min_rating": config.min_rating if source.has_rating else None,
        "timestamp_unit": source.time_unit if source.has_timestamp else None,
        "in_the_future": len(late),
        "items_without_row": _without_row(dataset.items[ITEM_ID], source.items),
        "interactions_of_items_without_row": _without_row(dataset.interactions[ITEM_ID], source.items),
        "users_without_row": _without_row(dataset.users[USER_ID], source.users) if "users" in source.rows_read else None,
        "newcomers": len(newcomers),
        "items_without_interaction": int((~source.items.table.index.isin(dataset.items[ITEM_ID])).sum()),
        "item_text_columns": source.items.text_columns,
        "user_text_columns": source.users.text_columns,
        "split": config.split.model_dump(mode="json"),
        **described,
    }
    write_json(directory / DATA_CARD_FILE, data_card)
    _tell(data_card, late)
    return {
        "name": config.name,
        **{name: described[name] for name in ("users", "items", "interactions")},
        **described["splits"],
        "density": described["density"],
        "removed_by_reason": by_reason,
    }


def select(source: Source, config: IngestConfig) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Threshold, one interaction per user and item, k-core.

    Returns:
        The interactions that count, all removed rows, and the rounds of the k-core.

    Raises:
        DataError: nothing, or less than two users or items, is left.
    """
    left, removed = source.interactions, list(source.removed)
    steps = {"read": source.rows_read["interactions"], "rejected": source.rows_read["interactions"] - len(left)}

    if config.min_rating is not None and source.has_rating:
        below = left[RATING].to_numpy() < config.min_rating
        if below.all():
            raise DataError(
                f"no interaction reaches ingest.min_rating = {config.min_rating:g}: "
                f"the {len(left)} ratings seen are {left[RATING].min():g} to {left[RATING].max():g}.",
                f"Lower it: --set ingest.min_rating={left[RATING].min():g} (null: every interaction counts)",
            )
        removed.append(_removed(left[below], BELOW_MIN_RATING, left[below][RATING].map("{:g}".format)))
        left, steps["below min_rating"] = left[~below], int(below.sum())
    elif config.min_rating is not None:
        emit(
            "warning",
            stage="ingest",
            message=f"ingest.min_rating = {config.min_rating:g} has no effect: the interactions have no rating, all count",
        )

    kept = filters.latest_events(left)
    removed.append(_removed(left[~kept], DUPLICATE, left[~kept][TIMESTAMP].astype(str)))
    left, steps["duplicates"] = left[kept], int((~kept).sum())

    verdict, rounds = filters.k_core(
        left[USER_ID].cat.codes.to_numpy(np.int64), left[ITEM_ID].cat.codes.to_numpy(np.int64), config.k_core
    )
    for code, reason in filters.K_CORE_REASONS.items():
        removed.append(_removed(left[verdict == code], reason, np.full(int((verdict == code).sum()), str(config.k_core))))
    left, steps["below the k-core"] = left[verdict == filters.KEPT], int((verdict != filters.KEPT).sum())

    counted = ", ".join(f"{count} {step}" for step, count in steps.items())
    lower = "Lower ingest.k_core or ingest.min_rating: --set ingest.k_core=1"
    if config.k_core == 1:
        lower = "Give more interactions, or lower ingest.min_rating: --set ingest.min_rating=null"
    if left.empty:
        raise DataError(f"no interaction is left after ingest.k_core = {config.k_core}: {counted}.", lower)
    users, items = left[USER_ID].nunique(), left[ITEM_ID].nunique()
    if min(users, items) < FEWEST:
        raise DataError(
            f"{users} user(s) and {items} item(s) are left, at least {FEWEST} of each are needed: {counted}.", lower
        )
    return left, pd.concat([part for part in removed if len(part)] or [removed[0]], ignore_index=True), rounds


def number_and_split(interactions: pd.DataFrame, source: Source, config: IngestConfig) -> Dataset:
    """Numbers the users and items that have an interaction, splits, and joins their texts."""
    user_ids, item_ids = interactions[USER_ID].astype(str).to_numpy(), interactions[ITEM_ID].astype(str).to_numpy()
    users, items = Vocabulary.build(user_ids), Vocabulary.build(item_ids)
    user, item = users.rows(user_ids), items.rows(item_ids)
    times = interactions[TIMESTAMP].to_numpy(np.int64)
    drawn = splits.draws(user_ids, item_ids, config.split.seed)
    match config.split.method:
        case "stable":
            parts = splits.stable(drawn, config.split.ratios)
        case "temporal":
            _tell_of_one_time(user, times)
            parts = splits.split(user, (times, drawn, item), config.split.ratios)
        case "random":
            parts = splits.split(user, (drawn,), config.split.ratios)
    table = pd.DataFrame(
        {
            USER_ID: user_ids,
            ITEM_ID: item_ids,
            USER: user.astype(np.int32),
            ITEM: item.astype(np.int32),
            RATING: interactions[RATING].to_numpy(np.float32),
            TIMESTAMP: times,
            SPLIT: parts,
        }
        | ({REVIEW: interactions[REVIEW].to_numpy()} if REVIEW in interactions else {})
    )
    table = table.sort_values([USER, ITEM], ignore_index=True)  # one row per pair, so the order is the same for any input order
    item_table = _entity_table(items, ITEM, ITEM_ID, source.items)
    if TITLE not in item_table.columns:
        item_table.insert(2, TITLE, "")
    item_table[TITLE] = item_table[TITLE].where(item_table[TITLE] != "", item_table[ITEM_ID])
    return Dataset(config.name, _entity_table(users, USER, USER_ID, source.users), item_table, table)


def _tell_of_one_time(users: npt.NDArray[np.integer], times: npt.NDArray[np.int64]) -> None:
    """Warns where times order next to nothing; a user with a single interaction has nothing to order."""
    theirs = pd.Series(times).groupby(users).agg(["size", "nunique"]).query("size > 1")
    unordered = int((theirs["nunique"] == 1).sum())
    if unordered and unordered >= MANY * len(theirs):
        emit(
            "warning",
            stage="ingest",
            message=f"{unordered} of {len(theirs)} users with more than one interaction have one time for all of them: which "
            "are tested is drawn. Give finer times, or say what the split is: --set ingest.split.method=random",
        )


def _entity_table(vocabulary: Vocabulary, row: str, raw_id: str, described: Entities) -> pd.DataFrame:
    """One row per user or item of the vocabulary; the texts of one that the source does not describe are ""."""
    texts = described.table.reindex(vocabulary.ids, fill_value="").reset_index(drop=True)
    numbered = pd.DataFrame({row: np.arange(len(vocabulary), dtype=np.int32), raw_id: vocabulary.ids})
    return pd.concat([numbered, texts], axis=1)


def newcomers_of(described: Entities, known: pd.Series) -> pd.DataFrame:
    """Users who have a text and no interaction that counts, by id: user_id and text columns."""
    table = described.table[~described.table.index.isin(known) & (described.table != "").any(axis=1)]
    return table.sort_index().rename_axis(USER_ID).reset_index()


def _without_row(ids: pd.Series, described: Entities) -> int:
    return int((~ids.isin(described.table.index)).sum())


def _removed(rows: pd.DataFrame, reason: str, value: Any) -> pd.DataFrame:
    user_ids, item_ids = (rows[name].astype(object) for name in (USER_ID, ITEM_ID))
    return tables.removal("interactions", rows[ROW], user_ids, item_ids, reason, value)


def _write(path: Path, frame: pd.DataFrame) -> None:
    """Parquet that is the same bytes for the same frame; object columns are text."""
    types = {np.dtype(np.int32): pa.int32(), np.dtype(np.int64): pa.int64(), np.dtype(np.float32): pa.float32()}
    schema = pa.schema([(name, types.get(frame[name].dtype, pa.string())) for name in frame.columns])
    pq.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False).replace_schema_metadata(None), path)


def _tell(data_card: dict[str, Any], late: pd.DataFrame) -> None:
    """Warnings about what is allowed but seldom meant; `late`: interactions of the future."""
    held_out = {name: data_card["splits"][name] for name in SPLITS[1:]}
    for name, count in held_out.items():
        if not count:
            emit("warning", stage="ingest", message=f"no interaction is in the {name} split: users have too few of them")
    if "items" not in data_card["rows_read"]:
        message = "there is no table of items (--items): their ids are their titles, and there is no text to learn from"
        emit("warning", stage="ingest", message=message)
    elif missing := data_card["items_without_row"]:
        emit(
            "warning",
            stage="ingest",
            message=f"{missing} of {data_card['items']} items have no row in the table of items: their id is their title",
        )
    if missing := data_card["users_without_row"]:
        emit(
            "warning",
            stage="ingest",
            message=f"{missing} of {data_card['users']} users have no row in the table of users: they have no text",
        )
    if len(late):
        emit(
            "warning",
            stage="ingest",
            message=f"{len(late)} of {data_card['rows_read']['interactions']} interactions lie in the future, for example "
            f"row {late[ROW].iloc[0]}, at {card.iso(int(late[TIMESTAMP].iloc[0]))}: they are kept, as their users' latest. "
            "Another unit than seconds or milliseconds, or a placeholder, is the usual cause; to do without times: "
            "--set ingest.columns.timestamp=null",
        )

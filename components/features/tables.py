"""The offline tables: one row per user or item, computed from the parents' data.

Everything but `user_history` is computed from training interactions, or from parents that saw nothing else, so it may be
read for training. Rows are in vocabulary order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from components.errors import ArtifactError
from components.ids import ITEM, ITEM_ID, SPLIT, TIMESTAMP, TRAIN, USER, USER_ID
from components.sideinfo.reader import embedded_texts
from feature_repo.store import UNTIMED

EVENT_TIMESTAMP = "event_timestamp"

_REBUILD = "Build it again: cllmr run --from {stage}"

_MAX_OFFSET = 2**31 - 1  # numbers in the lists, or bytes of the texts, of one Arrow array, whose offsets have 32 bits

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Nodes:
    """What is known of all users, or of all items, by vocabulary row."""

    ids: list[str]
    texts: list[str | None]
    """What was embedded: the profile, behind the row's own text where `sideinfo.own_text` says so."""
    embeddings: Floats
    """(len(ids), dim), rows L2-normalised."""
    spectrum: Floats
    """(len(ids), q)."""


@dataclass(frozen=True)
class Introductions:
    """What is known of users before they do anything."""

    users: Floats
    """Embeddings, (num_users, dim), zeros where there is none, or (num_users, 0) where nobody has any."""
    newcomers: Nodes
    """Users with such a text and no interactions; no spectrum."""


@dataclass(frozen=True)
class Inputs:
    """The parents' data."""

    users: Nodes
    items: Nodes
    interactions: pd.DataFrame
    """Columns user, item (rows), timestamp (Unix seconds, 0 if untimed), split."""
    introductions: Introductions


@dataclass(frozen=True)
class Window:
    """Event times from the first to the last interaction, both included, Unix seconds."""

    start: int
    end: int

    def dates(self) -> tuple[datetime, datetime]:
        """Both ends as aware datetimes."""
        return datetime.fromtimestamp(self.start, UTC), datetime.fromtimestamp(self.end, UTC)

    def facts(self) -> dict[str, str]:
        """Both ends as ISO 8601 text."""
        start, end = self.dates()
        return {"start": start.isoformat(), "end": end.isoformat()}


def load_inputs(ingest: Path, sideinfo: Path, spectrum: Path) -> Inputs:
    """Reads the three parents.

    Raises:
        ArtifactError: a parent describes other users or items than the ingest vocabulary does.
    """
    embeddings, spectra = load_file(sideinfo / "embeddings.safetensors"), load_file(spectrum / "spectrum.safetensors")
    users = _nodes(ingest, sideinfo, embeddings["users"], spectra["users"], "users", USER_ID)
    return Inputs(
        users=users,
        introductions=_introductions(sideinfo, embeddings, len(users.ids)),
        items=_nodes(ingest, sideinfo, embeddings["items"], spectra["items"], "items", ITEM_ID),
        interactions=pq.read_table(ingest / "interactions.parquet", columns=[USER, ITEM, TIMESTAMP, SPLIT]).to_pandas(),
    )


def _nodes(ingest: Path, sideinfo: Path, embeddings: Floats, spectrum: Floats, name: str, id_column: str) -> Nodes:
    ids = pq.read_table(ingest / f"{name}.parquet", columns=[id_column])[id_column].to_pylist()
    if len(set(ids)) != len(ids):  # Feast keeps one row per id and time, so the others would vanish without a word
        raise ArtifactError(
            f"ingest's {name}.parquet has {len(ids)} rows but {len(set(ids))} different ids.", _REBUILD.format(stage="ingest")
        )
    side = pq.read_table(sideinfo / f"{name}.parquet", columns=[id_column])
    if side[id_column].to_pylist() != ids:
        raise ArtifactError(
            f"sideinfo's {name}.parquet lists {side.num_rows} {name} that are not ingest's {len(ids)} in vocabulary order.",
            _REBUILD.format(stage="sideinfo"),
        )
    for stage, what, array in (("sideinfo", "embeddings", embeddings), ("spectrum", "spectrum", spectrum)):
        if len(array) != len(ids):
            raise ArtifactError(f"{stage} has {len(array)} rows of {what} for {len(ids)} {name}.", _REBUILD.format(stage=stage))
        if not np.isfinite(array).all():
            raise ArtifactError(f"{stage}'s {what} of {name} contain NaN or infinity.", _REBUILD.format(stage=stage))
    return Nodes(ids, embedded_texts(sideinfo / f"{name}.parquet"), embeddings.astype(np.float32), spectrum.astype(np.float32))


def _introductions(sideinfo: Path, embeddings: dict[str, Floats], num_users: int) -> Introductions:
    if "introductions" not in embeddings:
        nothing = np.empty((0, 0), np.float32)
        return Introductions(np.empty((num_users, 0), np.float32), Nodes([], [], nothing, nothing))
    found = embeddings["introductions"].astype(np.float32)
    texts = pq.read_table(sideinfo / "introductions.parquet", columns=[USER_ID, "profile"])
    told = found[num_users:].any(axis=1)
    # take would put the blocks of a column together, which may be more than one can hold
    newcomers = texts.slice(num_users).filter(pa.array(told))
    ids, profiles = (newcomers[name].to_pylist() for name in (USER_ID, "profile"))
    return Introductions(found[:num_users], Nodes(ids, profiles, found[num_users:][told], np.empty((len(ids), 0), np.float32)))


def window_of(timestamps: Ints) -> Window:
    """The materialisation window of some interactions; `UNTIMED` alone when they carry no time."""
    known = timestamps[timestamps != 0]
    if len(known) == 0:
        return Window(UNTIMED, UNTIMED)
    return Window(int(known.min()), int(known.max()))


def build_tables(inputs: Inputs, history_length: int) -> dict[str, pa.Table]:
    """All offline tables, by view name; each has its entity's id, `event_timestamp` and the view's features."""
    train = inputs.interactions[inputs.interactions[SPLIT] == TRAIN]
    snapshot = window_of(train[TIMESTAMP].to_numpy(np.int64)).end
    tables = {
        "item_side_information": item_side_information(inputs, snapshot),
        "user_side_information": user_side_information(inputs, snapshot),
    }
    for entity, column, id_column, nodes in (("item", ITEM, ITEM_ID, inputs.items), ("user", USER, USER_ID, inputs.users)):
        keys = {id_column: pa.array(nodes.ids, pa.string()), EVENT_TIMESTAMP: _times(np.full(len(nodes.ids), snapshot))}
        rows, times = train[column].to_numpy(), train[TIMESTAMP].to_numpy(np.int64)
        tables[f"{entity}_spectrum"] = pa.table(keys | {"spectrum": _float_lists(nodes.spectrum)})
        tables[f"{entity}_counts"] = pa.table(keys | counts(rows, times, len(nodes.ids)))
    tables["user_history"] = user_history(inputs, history_length)
    return tables


def counts(rows: Ints, times: Ints, size: int) -> dict[str, Ints]:
    """Interactions per row and the time of the latest, 0 where there is none.

    Args:
        rows: the vocabulary row of each training interaction, (interactions,).
        times: its Unix seconds, (interactions,).
        size: rows of the vocabulary.
    """
    latest = np.zeros(size, np.int64)
    np.maximum.at(latest, rows, times)
    return {"train_interactions": np.bincount(rows, minlength=size).astype(np.int64), "last_train_timestamp": latest}


def item_side_information(inputs: Inputs, snapshot: int) -> pa.Table:
    """Of the items; see `user_side_information`."""
    items = inputs.items
    return pa.table(
        {
            ITEM_ID: pa.array(items.ids, pa.string()),
            EVENT_TIMESTAMP: _times(np.full(len(items.ids), snapshot)),
            "embedding": _float_lists(items.embeddings),
            "profile": pa.array(items.texts, pa.string()),
        }
    )


def user_side_information(inputs: Inputs, snapshot: int) -> pa.Table:
    """Of the users, and behind them of the newcomers, whose introduction is all that there is.

    Args:
        inputs: the parents' data.
        snapshot: event time, Unix seconds.
    """
    users, introductions = inputs.users, inputs.introductions
    newcomers = introductions.newcomers
    ids = [*users.ids, *newcomers.ids]
    embeddings = np.concatenate([users.embeddings, newcomers.embeddings]) if newcomers.ids else users.embeddings
    introduced = np.concatenate([introductions.users, newcomers.embeddings]) if newcomers.ids else introductions.users
    return pa.table(
        {
            USER_ID: pa.array(ids, pa.string()),
            EVENT_TIMESTAMP: _times(np.full(len(ids), snapshot)),
            "embedding": _float_lists(embeddings),
            "introduction": _float_lists(introduced),
            "profile": pa.array([*users.texts, *newcomers.texts], pa.string()),
        }
    )


def user_history(inputs: Inputs, length: int) -> pa.Table:
    """Each user's latest `length` interactions of every split, most recent last; equal times are ordered by item row.

    A user without any has an empty list, dated at the start of the window.
    """
    events = inputs.interactions.sort_values([USER, TIMESTAMP, ITEM], kind="stable")
    latest = events[events.groupby(USER).cumcount(ascending=False) < length]
    size = len(inputs.users.ids)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(latest[USER], minlength=size))])
    times = latest[TIMESTAMP].to_numpy(np.int64)
    last_seen = np.zeros(size, np.int64)
    np.maximum.at(last_seen, latest[USER].to_numpy(), times)
    window = window_of(inputs.interactions[TIMESTAMP].to_numpy(np.int64))
    item_ids, items = pa.array(inputs.items.ids, pa.string()), latest[ITEM].to_numpy()
    held = np.concatenate([[0], np.cumsum(pc.binary_length(item_ids).to_numpy()[items])])[offsets]  # bytes before each user

    def lists(values: Callable[[slice], pa.Array], kind: pa.DataType) -> pa.ChunkedArray:
        blocks, start = [], 0
        while start < size:
            stop = max(start + 1, int(np.searchsorted(held, held[start] + _MAX_OFFSET, side="right")) - 1)
            own = offsets[start : stop + 1]
            blocks.append(pa.ListArray.from_arrays((own - own[0]).astype(np.int32), values(slice(own[0], own[-1]))))
            start = stop
        return pa.chunked_array(blocks, pa.list_(kind))

    return pa.table(
        {
            USER_ID: pa.array(inputs.users.ids, pa.string()),
            EVENT_TIMESTAMP: _times(np.where(last_seen == 0, window.start, last_seen)),
            "item_ids": lists(lambda rows: item_ids.take(pa.array(items[rows])), pa.string()),
            "timestamps": lists(lambda rows: pa.array(times[rows]), pa.int64()),
        }
    )


def _float_lists(rows: Floats) -> pa.ChunkedArray:
    """(n, dim) as one list per row."""
    dim = rows.shape[1]
    size = _MAX_OFFSET // max(1, dim)

    def block(start: int) -> pa.ListArray:
        chosen = np.ascontiguousarray(rows[start : start + size])
        offsets = np.arange(len(chosen) + 1, dtype=np.int32) * dim
        return pa.ListArray.from_arrays(offsets, pa.array(chosen.reshape(-1), pa.float32()))

    return pa.chunked_array(map(block, range(0, len(rows), size)), pa.list_(pa.float32()))


def _times(seconds: Ints) -> pa.Array:
    return pa.array(seconds.astype(np.int64) * 1_000_000, pa.int64()).cast(pa.timestamp("us", tz="UTC"))

"""Builds a feature set: Feast's registry and the filled online store, and reads it back."""

import contextlib
import io
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.errors import StorageError
from components.features.tables import EVENT_TIMESTAMP, Window
from components.progress import emit, progress
from feature_repo.store import REGISTRY_FILE, apply_definitions, open_store, write_settings

if TYPE_CHECKING:
    from feast import FeatureStore
    from google.protobuf.message import Message

READ_CHUNK = 1000  # entities per online read: SQLite takes at most 32766 variables, and a chunk bounds the memory
SAMPLED_ROWS = 20
ENTITIES_DIRECTORY = "entities"
PROBED_ROWS = 32


def build_feature_set(
    directory: Path, storage_root: str, project: str, online_store: str, tables: dict[str, pa.Table], window: Window
) -> dict[str, int]:
    """Writes the tables and the registry below `directory`, fills the online store, and reads it back.

    Returns:
        Rows per view, the same offline and online.

    Raises:
        StorageError: a view does not come back from the online store as it was written.
    """
    (directory / "data").mkdir()
    for view, table in tables.items():
        pq.write_table(table, directory / "data" / f"{view}.parquet")
    # the vocabularies, against which a reader checks that no entity is missing
    (directory / ENTITIES_DIRECTORY).mkdir()
    for name, view in (("items", "item_counts"), ("users", "user_counts")):
        pq.write_table(tables[view].select([0]), directory / ENTITIES_DIRECTORY / f"{name}.parquet")
    write_settings(directory, project, online_store)
    store = open_store(directory, storage_root)
    with quiet_feast():
        apply_definitions(store)
    with progress("features", len(tables), "views") as bar:
        for view in tables:
            with quiet_feast():
                store.materialize(*window.dates(), feature_views=[view])
            bar.advance()
    for view, table in tables.items():
        check_view(store, view, table)
    settle_registry(directory / REGISTRY_FILE, project, window)
    return {view: table.num_rows for view, table in tables.items()}


def check_view(store: "FeatureStore", view: str, table: pa.Table) -> None:
    """Compares a view in the online store with its offline table: every row is there, sampled rows have the same values.

    Raises StorageError naming the view and both counts, or the first value that differs.
    """
    key = id_column(table)
    ids = table[key].to_pylist()
    features = [name for name in table.column_names if name not in (key, EVENT_TIMESTAMP)]
    found = sum(
        _rows_found(store, f"{view}:{features[-1]}", key, ids[start : start + READ_CHUNK])
        for start in range(0, len(ids), READ_CHUNK)
    )
    hint = "Check that the online store has room and no other writer; cllmr run --from features writes the rows again."
    if found != len(ids):
        raise StorageError(f"the online store holds {found} rows of {view}, the offline table {len(ids)}.", hint)
    # take would put the blocks of a column together, which may be more than one can hold
    sample = pa.concat_tables(table.slice(row, 1) for row in evenly_spaced(len(ids), SAMPLED_ROWS))
    online = store.get_online_features(
        features=[f"{view}:{feature}" for feature in features],
        entity_rows=[{key: raw_id} for raw_id in sample[key].to_pylist()],
    ).to_dict()
    for feature in features:
        for raw_id, expected, seen in zip(sample[key].to_pylist(), sample[feature].to_pylist(), online[feature], strict=True):
            if not np.array_equal(np.asarray(seen), np.asarray(expected)):
                raise StorageError(
                    f"{view}:{feature} of {key} '{raw_id}' is {_short(seen)} in the online store, {_short(expected)} offline.",
                    hint,
                )


def probe_keys(project: str, tables: dict[str, pa.Table]) -> dict[str, list[str]]:
    """Redis keys, in hexadecimal, of some rows of every view, spread over the table (see `online.missing_probes`)."""
    from feast.infra.online_stores.helpers import _redis_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    probes = {}
    for view, table in tables.items():
        key = id_column(table)
        ids = table[key].take(evenly_spaced(table.num_rows, PROBED_ROWS)).to_pylist()
        entities = [EntityKey(join_keys=[key], entity_values=[Value(string_val=raw_id)]) for raw_id in ids]
        probes[view] = [_redis_key(project, entity).hex() for entity in entities]
    return probes


def settle_registry(path: Path, project: str, window: Window) -> None:
    """Makes the registry a function of the feature set: Feast stamps it with the clock and random ids, in the order of a set.

    Every time of writing becomes the window's end and every random id one made of the project's name; the version history,
    which only a later ``feast apply`` would read, is left out.
    """
    from feast.protos.feast.core.Registry_pb2 import Registry

    registry = Registry()
    registry.ParseFromString(path.read_bytes())
    registry.ClearField("feature_view_version_history")
    registry.version_id = str(uuid.uuid5(uuid.NAMESPACE_URL, project))
    for metadata in registry.project_metadata:
        metadata.project_uuid = registry.version_id
    for stamp in _times_of_writing(registry):
        stamp.FromSeconds(window.end)
    registry.data_sources.sort(key=lambda source: source.name)
    for objects in (registry.entities, registry.feature_views, registry.feature_services):
        objects.sort(key=lambda described: described.spec.name)
    path.write_bytes(registry.SerializeToString(deterministic=True))


@contextlib.contextmanager
def quiet_feast() -> Iterator[None]:
    """Runs Feast in one thread and keeps its prints and bars out of our logs; they are told when it fails."""
    import dask

    said = io.StringIO()
    try:
        with (
            columns_named_by_identity(),
            dask.config.set(scheduler="synchronous"),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            yield
    except Exception:
        emit("feast failed", output=said.getvalue()[-2000:])
        raise


@contextlib.contextmanager
def columns_named_by_identity() -> Iterator[None]:
    """Spares dask, Feast's offline store, the hashing of list columns.

    Dask names every step after the content of its data. A column of lists has no fast hash: it is pickled and unpickled
    dozens of times, which takes nine tenths of a retrieval. Within one retrieval an array's identity names it as well.
    """
    import dask.base

    names: Any = dask.base.normalize_token
    by_content = names.dispatch(np.ndarray)
    retrieval, seen = uuid.uuid4().hex, []

    def by_identity(array: np.ndarray) -> Any:
        if not array.dtype.hasobject:
            return by_content(array)
        seen.append(array)  # kept until the end, so that its id is not given to another
        return retrieval, id(array), array.shape

    names.register(np.ndarray, by_identity)
    try:
        yield
    finally:
        names.register(np.ndarray, by_content)


def id_column(table: pa.Table) -> str:
    """The join key of an offline table: its first column."""
    return str(table.column_names[0])


def evenly_spaced(size: int, count: int) -> list[int]:
    """At most `count` different rows from the first to the last of `size`."""
    return sorted({round(row) for row in np.linspace(0, size - 1, min(size, count))})


def _rows_found(store: "FeatureStore", feature: str, key: str, ids: list[str]) -> int:
    from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

    response = store.get_online_features(features=[feature], entity_rows=[{key: raw_id} for raw_id in ids]).proto
    column = list(response.metadata.feature_names.val).index(feature.split(":")[1])
    return sum(status == FieldStatus.PRESENT for status in response.results[column].statuses)


def _times_of_writing(message: "Message") -> Iterator[Any]:
    """The creation and update times anywhere inside a registry message."""
    from google.protobuf.message import Message

    for field, value in message.ListFields():
        for part in [value] if isinstance(value, Message) else value if field.message_type else ():
            if field.name in ("created_timestamp", "last_updated_timestamp", "last_updated"):
                yield part
            elif isinstance(part, Message):  # the keys of a map are not
                yield from _times_of_writing(part)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Reads views of two Feast projects from the online store they share, in one look-up.

A feature set is a Feast project of its own, and what belongs to none of them (`feature_repo.store.open_shared_store`) is in
another, which a new feature set must not forget. Feast looks up one project at a time, so a request that needs both would wait
for two round trips. Keys and values are Feast's own here, and so is each view's reading; only what is sent to Redis is sent
together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_repo.store import open_shared_store, open_store

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView
    from feast.infra.online_stores.redis import RedisOnlineStore
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value


@dataclass(frozen=True)
class Row:
    """What a view has of one entity."""

    event_time: float
    """Unix seconds; 0 where there is no row. From SQLite off by the hours between the time zones of writer and reader: Feast
    writes it by the local clock, and does not write by which."""
    _values: "Mapping[str, Value]"

    def __getitem__(self, feature: str) -> Any:
        """A feature's value, read now; None where there is none."""
        from feast.type_map import feast_value_type_to_python_type

        return feast_value_type_to_python_type(self._values[feature]) if feature in self._values else None


Rows = list[tuple[datetime | None, "dict[str, Value] | None"]]
"""As Feast's online stores give them, one per entity: event timestamp and values by feature."""


@dataclass(frozen=True)
class _Part:
    """A view that is read."""

    store: "FeatureStore"
    view: "FeatureView"
    features: list[str]


class JointStore:
    """Some views of some projects, looked up together; opened by `open_joint_store`.

    Args:
        parts: the views.
        join_key: of their one entity.
    """

    def __init__(self, parts: Sequence[_Part], join_key: str) -> None:
        self._parts, self._join_key = list(parts), join_key
        self._redis = _redis(self._parts)

    def ttl(self, view: str) -> float:
        """How long a row of a view may be used, seconds; 0 is without end, as Feast has it."""
        ttl = next(part.view.ttl for part in self._parts if part.view.name == view)
        return 0.0 if ttl is None else ttl.total_seconds()

    def read(self, ids: Sequence[str]) -> dict[str, list[Row]]:
        """By view, a row of each entity, in the order asked.

        Raises whatever the online store's client does.
        """
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        keys = [EntityKey(join_keys=[self._join_key], entity_values=[Value(string_val=raw_id)]) for raw_id in ids]
        found = self._one_by_one(keys) if self._redis is None else self._in_one_pipeline(self._redis, keys)
        return {
            part.view.name: [Row(0.0 if at is None else at.timestamp(), values or {}) for at, values in rows]
            for part, rows in found
        }

    def _one_by_one(self, keys: "list[EntityKey]") -> "Iterator[tuple[_Part, Rows]]":
        for part in self._parts:
            provider = part.store._get_provider()
            yield part, provider.online_read(part.store.config, part.view, keys, list(part.features))

    def _in_one_pipeline(self, redis: "RedisOnlineStore", keys: "list[EntityKey]") -> "Iterator[tuple[_Part, Rows]]":
        """One command per entity and project, of which all views are fields of one hash."""
        asked: dict[str, list[tuple[_Part, list[str], list[Any]]]] = {}
        for part in self._parts:
            names, fields = redis._generate_hset_keys_for_features(part.view, list(part.features))
            asked.setdefault(part.store.config.project, []).append((part, names, fields))
        commands = [
            (key, [field for _, _, fields in parts for field in fields])
            for parts in asked.values()
            for key in redis._generate_redis_keys_for_entities(parts[0][0].store.config, keys)
        ]
        replies = iter(redis._read_hash_fields(self._parts[0].store.config, commands))
        for parts in asked.values():
            hashes = [iter(next(replies)) for _ in keys]
            for part, names, fields in parts:
                values = [list(islice(reply, len(fields))) for reply in hashes]
                yield part, redis._convert_redis_values_to_protobuf(values, part.view.name, names)


def open_joint_store(
    directory: Path, storage_root: str, join_key: str, own: Mapping[str, list[str]], shared: Mapping[str, list[str]]
) -> JointStore:
    """Views of one entity, of a feature set and of what belongs to none.

    Args:
        directory: the feature set, see `feature_repo.store.open_store`.
        storage_root: tells where a SQLite online store lies.
        join_key: of the entity.
        own: features by view of the feature set.
        shared: features by view of the project that outlives feature sets.

    Raises FeatureStoreError as `open_store` does, and what Feast raises for a view that is not there.
    """
    stores = ((open_store(directory, storage_root), own), (open_shared_store(directory, storage_root), shared))
    parts = [
        _Part(store, store.get_feature_view(view, allow_registry_cache=True), features)
        for store, views in stores
        for view, features in views.items()
    ]
    return JointStore(parts, join_key)


def _redis(parts: Sequence[_Part]) -> "RedisOnlineStore | None":
    """The client of the one Redis that all of them are in; None where they are anywhere else."""
    online = [part.store.config.online_store for part in parts]
    if {store.type for store in online} != {"redis"} or len({store.connection_string for store in online}) > 1:
        return None
    from feast.infra.online_stores.redis import RedisOnlineStore

    return RedisOnlineStore()

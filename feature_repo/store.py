"""Opens a feature set that the features stage wrote.

A feature set is a directory that never changes: ``feature_store.yaml``, ``registry.db`` and ``data/<view>.parquet``. What does
change, the online store, lies outside: with SQLite in ``<storage_root>/online_store/<project>.db``, with Redis where
``CLLMR_ONLINE_STORE`` says. Each feature set is a Feast project of its own, so an older model finds its own features again.
What users do between two feature sets, and what batch scoring ranked for them, is in one project for all feature sets
(`open_shared_store`): it outlives a retraining.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

import yaml

from feature_repo.feast_import import import_feast

if TYPE_CHECKING:
    from feast import FeatureStore

ONLINE_STORE_VARIABLE = "CLLMR_ONLINE_STORE"
"""Environment variable with Redis' address: ``host:port[,key=value...]``, as Feast reads it."""

SQLITE = "sqlite"
REDIS = "redis"

CONFIG_FILE = "feature_store.yaml"
REGISTRY_FILE = "registry.db"

SHARED_PROJECT = "cllmr"
"""Feast project of what belongs to no feature set: that of a cluster's shared catalogue. Its rows are kept by raw user
id, so that two products need two storage roots, and with Redis two databases."""

UNTIMED = int(datetime(2000, 1, 1, tzinfo=UTC).timestamp())
"""Event time, Unix seconds, of data without timestamps: fixed, so that a run does not depend on when it is made. Such rows have
no age, so no ``ttl`` makes them stale."""

_TEMPLATES = {SQLITE: "feature_store.yaml", REDIS: "feature_store.redis.yaml"}
_REDIS_ADDRESS = re.compile(r"[^\s,:=@/]+:\d{1,5}(,\w+=[^,]*)*")
# redis-py waits without limit for a host that swallows packets and tries a dead one again for seconds; a reader that can
# degrade, and a stage that can be retried, want to know at once. The variable may set its own.
_REDIS_DEFAULTS = {"socket_connect_timeout": "5", "socket_timeout": "10", "retry": "null"}


class FeatureStoreError(ValueError):
    """A feature store that cannot be opened, with the next action in `hint`."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message} {hint}")
        self.message = message
        self.hint = hint


def open_store(directory: Path, storage_root: str, online: bool = True) -> "FeatureStore":
    """The Feast store of one feature set; nothing is written and no connection is made.

    Args:
        directory: the feature set, i.e. the features manifest's ``path()``.
        storage_root: the features manifest's ``storage_root``; tells where the SQLite online store lies.
        online: False for a store that only reads the offline tables and so needs no Redis address.

    Raises:
        FeatureStoreError: no feature set there, SQLite on a remote storage root, or no usable Redis address.
    """
    settings = load_settings(directory)
    if online:
        settings = _connected(settings, storage_root)
    else:
        settings["online_store"] = None
    return _opened(settings, directory)


def open_shared_store(directory: Path, storage_root: str) -> "FeatureStore":
    """The Feast store of the online history and of batch scoring's rankings, in the kind of online store a feature set has.

    Its definitions are registered in memory; with SQLite the tables are made if they are not there.

    Args:
        directory: a feature set, see `open_store`.
        storage_root: tells where the SQLite online store lies.

    Raises FeatureStoreError as `open_store` does.
    """
    settings = load_settings(directory)
    with tempfile.TemporaryDirectory() as registry:
        settings["project"] = SHARED_PROJECT
        settings["registry"]["path"] = str(Path(registry) / REGISTRY_FILE)
        settings = _connected(settings, storage_root)
        import_feast()
        from feature_repo.definitions import SHARED
        from feature_repo.feature_views import EVENTS_TTL

        if settings["online_store"]["type"] == REDIS:
            settings["online_store"]["key_ttl_seconds"] = int(EVENTS_TTL.total_seconds())
        else:
            Path(settings["online_store"]["path"]).parent.mkdir(parents=True, exist_ok=True)
        store = _opened(settings, directory)
        store.apply(SHARED)
        store.list_feature_views(allow_cache=True)  # from here on the registry is read from memory
    return store


def _connected(settings: dict[str, Any], storage_root: str) -> dict[str, Any]:
    """Settings with the online store's address filled in."""
    is_sqlite = settings["online_store"]["type"] == SQLITE
    address = str(sqlite_path(storage_root, settings["project"])) if is_sqlite else redis_connection()
    expanded: dict[str, Any] = _expand(settings, {ONLINE_STORE_VARIABLE: address})
    return expanded


def _opened(settings: dict[str, Any], directory: Path) -> "FeatureStore":
    import_feast()
    from feast import FeatureStore, RepoConfig

    config = RepoConfig(**settings)
    config.repo_path = Path(directory)
    return FeatureStore(repo_path=str(directory), config=config)


def load_settings(directory: Path) -> dict[str, Any]:
    """A feature set's ``feature_store.yaml``; the online store's address is still a variable in it.

    Raises FeatureStoreError when there is none.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FeatureStoreError(
            f"'{directory}' is not a feature set: {CONFIG_FILE} cannot be read ({error.strerror}).",
            "Pass the directory that the features stage wrote, or run: cllmr run --from features",
        ) from None
    return settings


def write_settings(directory: Path, project: str, online_store: str) -> None:
    """Writes a feature set's ``feature_store.yaml``: this repository's own, with the project and the registry filled in."""
    template = yaml.safe_load((Path(__file__).parent / _TEMPLATES[online_store]).read_text(encoding="utf-8"))
    settings = _expand(
        template,
        {
            "CLLMR_FEATURE_PROJECT": project,
            "CLLMR_FEATURE_REGISTRY": REGISTRY_FILE,
            ONLINE_STORE_VARIABLE: f"${{{ONLINE_STORE_VARIABLE}}}",
        },
    )
    (Path(directory) / CONFIG_FILE).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def apply_definitions(store: "FeatureStore") -> None:
    """``feast apply``: registers entities, sources, views and services, and makes the online tables."""
    from feature_repo.definitions import DEFINITIONS

    store.apply(DEFINITIONS)


def feature_refs(store: "FeatureStore", service: str, join_key: str) -> list[str]:
    """The features of a service that are looked up by one join key, as ``view:feature``.

    Args:
        service: ``training`` or ``serving``.
        join_key: ``user_id`` or ``item_id``.
    """
    return [
        f"{projection.name}:{feature.name}"
        for projection in store.get_feature_service(service).feature_view_projections
        if store.get_feature_view(projection.name).join_keys == [join_key]
        for feature in projection.features
    ]


def sqlite_path(storage_root: str, project: str) -> Path:
    """Where a project's SQLite online store lies: ``<storage_root>/online_store/<project>.db``.

    Raises FeatureStoreError when the storage root is not on this machine's file system.
    """
    parsed = urlparse(storage_root)
    if "://" in storage_root and parsed.scheme != "file":
        raise FeatureStoreError(
            f"the online store 'sqlite' needs a storage root on this machine, and '{storage_root}' is remote; "
            f"allowed online stores there: redis.",
            f"Set features.online_store=redis and {ONLINE_STORE_VARIABLE}=host:port.",
        )
    root = Path(unquote(parsed.path)) if parsed.scheme == "file" else Path(storage_root)
    return root.absolute() / "online_store" / f"{project}.db"


def redis_connection() -> str:
    """Redis' address from the environment, with time limits and no retries added where it sets neither.

    Raises FeatureStoreError when it is missing or malformed; its value may hold a password and is not repeated.
    """
    connection = os.environ.get(ONLINE_STORE_VARIABLE, "").strip()
    if not _REDIS_ADDRESS.fullmatch(connection):
        raise FeatureStoreError(
            f"{ONLINE_STORE_VARIABLE} is {'not set' if not connection else 'not of the form host:port[,key=value...]'}, "
            f"and the online store 'redis' needs it.",
            f"Set it in the environment, e.g. {ONLINE_STORE_VARIABLE}=localhost:6379 "
            "(more: localhost:6379,db=0,ssl=true,password=...), or set features.online_store=sqlite.",
        )
    missing = [f"{key}={value}" for key, value in _REDIS_DEFAULTS.items() if f",{key}=" not in connection]
    return ",".join([connection, *missing])


def _expand(value: Any, variables: Mapping[str, str]) -> Any:
    """Replaces ``${NAME}`` in the texts of a loaded YAML tree: after parsing, so that no value can change the structure."""
    if isinstance(value, dict):
        return {key: _expand(item, variables) for key, item in value.items()}
    return Template(value).substitute(variables) if isinstance(value, str) else value

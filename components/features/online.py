"""Checks of the online store that need no Feast, so that a finished stage is recognised in milliseconds."""

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.errors import ConfigError, StorageError
from components.progress import emit
from feature_repo.store import ONLINE_STORE_VARIABLE, REDIS, SQLITE, FeatureStoreError, redis_connection, sqlite_path

if TYPE_CHECKING:
    from redis import Redis

_SCANNED_KEYS = 1000
_PROJECT = re.compile(rb"cllmr_[0-9a-f]{16}\Z")  # ends the keys of a feature set's rows


def check_reachable(online_store: str, storage_root: str, project: str) -> None:
    """Makes sure the online store can be filled, before any work is done.

    Raises:
        ConfigError: it is not usable with this storage root or environment.
        StorageError: it cannot be reached or written.
    """
    with user_errors(online_store):
        if online_store == REDIS:
            with closing(redis_client()) as client:
                client.ping()
            return
        path = sqlite_path(storage_root, project)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(path)) as connection:
                connection.execute("PRAGMA schema_version").fetchone()
        except sqlite3.DatabaseError as error:
            discard_damaged(path, error)


def discard_damaged(path: Path, error: sqlite3.DatabaseError) -> None:
    """Removes a damaged SQLite online store: it holds nothing that the feature set cannot give again.

    Raises `error` when the file is not damaged but cannot be opened (permissions, a lock).
    """
    if isinstance(error, sqlite3.OperationalError):
        raise error
    emit("online store refused", path=str(path), reason=str(error))
    path.unlink()


def sqlite_rows(path: Path, project: str, views: Iterable[str]) -> dict[str, int]:
    """Rows per view of a project's SQLite online store, 0 for a view that is not there."""
    if not path.is_file():
        return dict.fromkeys(views, 0)
    rows = {}
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for view in views:
            table = f"{project}_{view}"
            query = f'SELECT COUNT(DISTINCT entity_key) FROM "{table}"'
            rows[view] = connection.execute(query).fetchone()[0] if table in tables else 0
    return rows


def missing_probes(client: "Redis", probes: Mapping[str, list[str]]) -> dict[str, int]:
    """How many of each view's probe rows are not in Redis; one round trip.

    Args:
        probes: per view the Redis keys, in hexadecimal, of some of its rows.
    """
    checks = [(view, bytes.fromhex(key)) for view, keys in probes.items() for key in keys]
    with client.pipeline(transaction=False) as pipe:
        for view, key in checks:
            # Feast's own field: the event timestamp of the view's row
            pipe.hexists(key, f"_ts:{view}")  # type: ignore[arg-type]  # the stubs know text keys only, Feast's are bytes
        found = pipe.execute()
    missing = dict.fromkeys(probes, 0)
    for (view, _), present in zip(checks, found, strict=True):
        missing[view] += not present
    return missing


def projects(online_store: str, storage_root: str) -> dict[str, int]:
    """Every feature set's project that has rows online, and their bytes below the storage root: 0 with Redis.

    Raises StorageError or ConfigError when the online store cannot be used.
    """
    with user_errors(online_store):
        if online_store == SQLITE:
            return {path.stem: path.stat().st_size for path in sqlite_path(storage_root, "").parent.glob("*.db")}
        with closing(redis_client()) as client:
            found = (_PROJECT.search(key) for key in client.scan_iter(count=_SCANNED_KEYS))
            return dict.fromkeys((project[0].decode() for project in found if project), 0)


def remove_rows(online_store: str, storage_root: str, project: str) -> None:
    """Takes a feature set's own project out of the online store; nothing happens if it has no rows.

    Of a project's name alone: rows may be left of a feature set that was never finished.
    """
    with user_errors(online_store):
        if online_store == SQLITE:
            sqlite_path(storage_root, project).unlink(missing_ok=True)
            return
        with closing(redis_client()) as client:
            keys = client.scan_iter(match=f"*{project}", count=_SCANNED_KEYS)  # Feast's keys end with the project
            while some := list(islice(keys, _SCANNED_KEYS)):
                client.unlink(*some)


def redis_client() -> "Redis":
    """A client for the Redis in ``CLLMR_ONLINE_STORE``; connects at the first command.

    Raises FeatureStoreError when the variable is missing or malformed.
    """
    from redis import Redis

    address, *options = redis_connection().split(",")
    host, port = address.split(":")
    return Redis(host=host, port=int(port), **dict(_option(option) for option in options))


def _option(text: str) -> tuple[str, Any]:
    """``key=value`` as Feast reads it: a value that is JSON is that JSON (true, 0), any other is text."""
    key, value = text.split("=", 1)
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


@contextmanager
def user_errors(online_store: str) -> Iterator[None]:
    """Turns what the online store's client raises into our errors; no message repeats the connection string."""
    kinds: tuple[type[Exception], ...] = (sqlite3.Error,)
    if online_store == REDIS:
        from redis.exceptions import RedisError

        kinds = (RedisError,)
    try:
        yield
    except FeatureStoreError as error:
        raise ConfigError(error.message, error.hint) from None
    except kinds as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise StorageError(
            f"the online store '{online_store}' cannot be used: {reason}.",
            f"Start Redis or correct {ONLINE_STORE_VARIABLE}, then run again; or set features.online_store=sqlite."
            if online_store == REDIS
            else "Check that <storage root>/online_store is writable and has room, or choose another with --storage.",
        ) from None

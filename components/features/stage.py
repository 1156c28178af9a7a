"""The features stage: side information, spectrum, counts and histories in a Feast feature set.

The artifact is a Feast repository of its own (settings, registry, offline tables). The online store is filled from it and
lies outside, so the stage counts as done only while its rows are still there. Rows of a feature set that is not finished go
when it fails; of a run that was killed a note tells, by which a clean-up finds them.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from components.artifacts import WORK, Manifest, Store, read_json, write_json
from components.errors import ArtifactError, UserError
from components.features import online
from components.features.config import FeaturesConfig
from components.ids import TIMESTAMP
from components.progress import emit
from components.stages import Stage, failure_told, fingerprint, run_stage
from feature_repo.store import REDIS, SQLITE, sqlite_path

STAGE = Stage("features", version=4)

PROBES_FILE = "probes.json"


def run(config: dict[str, Any], storage_root: str, ingest: Manifest, sideinfo: Manifest, spectrum: Manifest) -> Manifest:
    """Builds the feature set of its parents and fills the online store.

    Facts of the manifest: ``project`` (Feast project), ``online_store`` (kind), ``views`` (rows by view), ``window`` (first
    and last event time materialised, ISO 8601), ``snapshot`` (event time of the training views), ``users``, ``items``.

    Raises:
        ConfigError: an unknown or wrong setting, SQLite on a remote storage root, Redis without an address.
        ArtifactError: parents that do not describe the same users and items.
        StorageError: the online store cannot be reached, or does not give back what was written.
    """
    settings = FeaturesConfig.parse(config, STAGE.name)
    parents = {"ingest": ingest, "sideinfo": sideinfo, "spectrum": spectrum}
    inputs = {name: parent.fingerprint for name, parent in parents.items()}
    name = fingerprint(STAGE, settings.identity(), inputs)
    project = project_name(name)
    if settings.online_store == SQLITE:
        with failure_told(STAGE), online.user_errors(SQLITE):
            sqlite_path(storage_root, project)  # refuses a remote root before anything is asked of it

    def build(directory: Path) -> dict[str, Any]:
        from components.features.repository import build_feature_set, probe_keys
        from components.features.tables import build_tables, load_inputs, window_of

        online.check_reachable(settings.online_store, storage_root, project)
        data = load_inputs(ingest.path(), sideinfo.path(), spectrum.path())
        tables = build_tables(data, settings.history_length)
        window = window_of(data.interactions[TIMESTAMP].to_numpy())
        with _no_rows_left_behind(storage_root, name, settings.online_store), online.user_errors(settings.online_store):
            rows = build_feature_set(directory, storage_root, project, settings.online_store, tables, window)
            if settings.online_store == REDIS:
                write_json(directory / PROBES_FILE, probe_keys(project, tables))
        return {
            "project": project,
            "online_store": settings.online_store,
            "views": rows,
            "window": window.facts(),
            "snapshot": tables["item_counts"]["event_timestamp"][0].as_py().isoformat(),
            "users": len(data.users.ids),
            "items": len(data.items.ids),
        }

    manifest = run_stage(STAGE, settings, storage_root, parents, build, is_live)
    with failure_told(STAGE):
        Store(storage_root).remove_work(STAGE.name, name)  # only now: till there is a manifest it alone tells of the rows
    return manifest


def rows_note(features_fingerprint: str) -> tuple[str, ...]:
    """Where it is noted below the storage root which kind of online store has rows of a feature set that is not finished, and
    whose they are."""
    return STAGE.name, f"{WORK}{features_fingerprint}", "online_store"


def remove_unfinished_rows(storage_root: str, features_fingerprint: str) -> None:
    """Takes out of the online store what was written for a feature set that was never finished, and the note of it.

    Raises StorageError or ConfigError when the online store cannot be used; the note stays then.
    """
    store = Store(storage_root)
    note = store.read_note(*rows_note(features_fingerprint))
    if note and store.find(STAGE.name, features_fingerprint) is None:  # else a reader may have these rows
        online.remove_rows(note.split()[0], storage_root, project_name(features_fingerprint))
    store.remove_work(STAGE.name, features_fingerprint)


@contextmanager
def _no_rows_left_behind(storage_root: str, name: str, online_store: str) -> Iterator[None]:
    """Notes whose rows these are, and takes them out when the block fails; the next clean-up does where another run writes, or
    wrote, the same rows, or where it cannot be done."""
    store, mine = Store(storage_root), f"{online_store} {uuid4()}"
    is_alone = store.read_note(*rows_note(name)) is None
    store.write_note(mine, *rows_note(name))
    try:
        yield
    except BaseException:
        with suppress(UserError, OSError):
            if is_alone and store.read_note(*rows_note(name)) == mine:
                remove_unfinished_rows(storage_root, name)
        raise


def put_back(features: Manifest) -> bool:
    """Writes a feature set's online rows again if any are missing; whether it has.

    Raises:
        ArtifactError: what it was made from is gone, or this version of the stage makes another one.
        StorageError: the online store cannot be reached, or does not give back what was written.
    """
    if is_live(features):
        return False
    settings, store = FeaturesConfig.parse(features.config, STAGE.name), Store(features.storage_root)
    parents = {name: store.find(name, parent) for name, parent in features.parents.items()}
    whole = {name: parent for name, parent in parents.items() if parent is not None}
    if len(whole) < len(parents) or fingerprint(STAGE, settings.identity(), features.parents) != features.fingerprint:
        raise ArtifactError(
            f"feature set {features.fingerprint} cannot be written again: its inputs are gone, or this version of the stage "
            "makes another one.",
            "Run the pipeline and promote its model, or use the image of the run that made it.",
        )
    run(features.config, features.storage_root, **whole)
    return True


def project_name(features_fingerprint: str) -> str:
    """Feast project of a feature set: one each, so that no feature set overwrites another's online rows."""
    return f"cllmr_{features_fingerprint}"


def is_live(manifest: Manifest) -> bool:
    """Whether the online store still holds the rows of a feature set: all are counted in SQLite, some are probed in Redis.

    A store that cannot be reached holds nothing; building the feature set again then says what is wrong with it.
    """
    kind, project = manifest.facts["online_store"], manifest.facts["project"]
    try:
        with online.user_errors(kind):
            lost = _lost_in_redis(manifest) if kind == REDIS else _lost_in_sqlite(manifest)
    except UserError as error:
        emit("online store unreachable", project=project, online_store=kind, reason=error.message)
        return False
    if lost:
        emit("online store incomplete", project=project, online_store=kind, rows_missing=lost)
    return not lost


def _lost_in_sqlite(manifest: Manifest) -> dict[str, int]:
    project, views = manifest.facts["project"], manifest.facts["views"]
    path = sqlite_path(manifest.storage_root, project)
    try:
        rows = online.sqlite_rows(path, project, views)
    except sqlite3.DatabaseError as error:
        online.discard_damaged(path, error)
        rows = dict.fromkeys(views, 0)
    return {view: views[view] - rows[view] for view in views if rows[view] != views[view]}


def _lost_in_redis(manifest: Manifest) -> dict[str, int]:
    probes = read_json(manifest.path(PROBES_FILE) / PROBES_FILE)
    with closing(online.redis_client()) as client:
        return {view: count for view, count in online.missing_probes(client, probes).items() if count}

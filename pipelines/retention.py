"""Which outputs of earlier runs are kept, and the removal of the others.

Kept is whatever was made, or reused by a run, within a limit, which is a day at least: longer than a run at work goes without
writing anything; the newest models; every model that an alias of the registry points at (champion, challenger, previous), under
whatever name, or that an endpoint is configured with; and what any of these was made from, began with, or was evaluated and
served with. Answers of an LLM are kept while a kept output was made with that model's answers. A manifest goes before its data
and a marker before its shard, so that what a broken-off removal leaves does not exist for a run, and the next removal takes the
rest. Online rows that a killed run left go after a day, and so do data that an output which was built again has replaced in a
remote store: no run that reads them takes longer. Where a manifest cannot be read nobody knows what has to stay, and nothing is
removed. What bears no name that the platform gives is somebody else's, and stays: others have a "train" or "runs" too.

Online rows take memory, each feature set its own, and can be written again from what is kept. So they go, however young the
feature set is, unless it is that of a model that is pointed at or configured, or of a run of the last two days, and not while
a run is at work, or was when it was killed within a day. After a promotion of, or a rollback to, any other model answers are
degraded until `cllmr materialise` has written its rows; a run that reuses a feature set writes them itself.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from components.artifacts import MANIFEST, WORK, Manifest, Store, StoredFolder
from components.errors import ArtifactError, UserError
from components.launch import NOTES
from components.progress import emit
from pipelines.config import BATCH
from pipelines.local import runs_home

ANSWERS = "answers"
AFTER_TRAIN = ("evaluate", "promote", "serve")
"""Stages whose outputs belong to the model they judge: kept with it."""
LONGEST_RUN = timedelta(days=1)
"""Without writing anything below the storage root."""
FEATURES = "features"
ROWS_STAY = timedelta(days=2)
"""Online, of a run's feature set: its model may be promoted, or another run reuse it."""
_RUN = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
"""See `pipelines.local.make_run_directory`."""
_NOTE = re.compile(rf"{NOTES}/cllmr-[a-z]+-[0-9a-f]{{12}}\.(json|alive)")
"""See `components.launch.make_job`."""
_MARKER = re.compile(rf"{ANSWERS}/[^/]+/\d{{8}}T\d{{6}}-[0-9a-f]{{12}}\.json")
"""See `components.sideinfo.cache.AnswerCache.add`."""
_DECODING = ("model", "max_tokens", "temperature", "seed")


@dataclass(frozen=True)
class Removable:
    """One thing that nothing kept needs."""

    what: str
    """``output`` of a stage, online ``rows`` of a feature set that stays, ``replaced`` data of an output that was built again,
    or half of them, ``unfinished`` work of a killed run, ``answers`` of an LLM, ``note`` or ``log`` of a run."""
    where: str
    """Path below the storage root; of a log below its own folder."""
    bytes: int
    """Below the storage root, so none of rows in Redis."""
    manifest: Manifest | None = None
    """Of an output, or of the feature set with the rows."""


def removable(
    storage_root: str,
    stages: Collection[str],
    tracking_uri: str,
    keep: int,
    older_than: timedelta,
    deployed: Collection[str] = (),
) -> list[Removable]:
    """What can go, outputs first.

    Args:
        storage_root: an absolute path or a URI.
        stages: names of the pipeline's stages.
        tracking_uri: of the registry.
        keep: how many of the newest models are kept, whatever their age.
        older_than: whatever was made or reused since is kept; less than `LONGEST_RUN` counts as that.
        deployed: fingerprints of models that endpoints are configured with, whatever the registry says.

    Raises:
        RegistryError: the registry cannot be reached, or is not the one that a champion was made in, so nobody knows what is
            served.
        StorageError: the storage root cannot be read, so nobody knows what was made from what.
        ArtifactError: nor does anybody where a manifest is damaged.
    """
    from components.registry import pointed_at

    store, now = Store(storage_root), datetime.now(UTC)
    a_run_ago = now - LONGEST_RUN
    cutoff = min(now - older_than, a_run_ago)
    folders = [folder for stage in stages for folder in store.folders(stage)]  # first: what is finished meanwhile is no remnant
    outputs = [manifest for stage in stages for manifest in store.outputs(stage)]
    reused = [use for stage in stages for use in store.reuses(stage).items()]
    served = pointed_at(tracking_uri).union(_last_champion(outputs, storage_root, tracking_uri), deployed)
    kept = kept_outputs(outputs, served.union(name for name, when in reused if when >= cutoff), keep, cutoff)

    finished = {f"{one.stage}/{one.fingerprint}": one for one in outputs}
    found = [
        Removable("output", place, sum(file.bytes for file in one.files.values()), one)
        for place, one in finished.items()
        if one.fingerprint not in kept
    ]
    in_place = {*finished, *(one.place for one in outputs)}
    remnants = [folder for folder in folders if folder.path not in in_place]
    if all(folder.newest < a_run_ago for folder in remnants):  # else a run may be at work, with a feature set of long ago
        asked = served.union(name for name, when in reused if when >= now - ROWS_STAY)
        found += _unused_rows(outputs, kept, asked, storage_root)
    found += _removable_remnants(remnants, finished, kept, cutoff, a_run_ago, storage_root)
    in_use = [one.config for one in outputs if one.stage == "sideinfo" and one.fingerprint in kept]
    return [*found, *_unused_answers(store, in_use, cutoff), *_old_notes(store, cutoff), *_old_logs(storage_root, cutoff)]


def _removable_remnants(
    remnants: Iterable[StoredFolder],
    finished: Mapping[str, Manifest],
    kept: Collection[str],
    cutoff: datetime,
    a_run_ago: datetime,
    storage_root: str,
) -> Iterator[Removable]:
    """Of the folders that are no output: uploads that another has replaced, and what killed runs were building."""
    for folder in remnants:
        stage, name = folder.path.split("/")[:2]
        if output := finished.get(f"{stage}/{name}"):
            if max(folder.newest, datetime.fromisoformat(output.created_at)) < a_run_ago:  # a run may have the manifest before
                yield Removable("replaced", folder.path, folder.bytes)
            continue
        if folder.has_manifest and not name.startswith("."):  # what was being built when its run was killed may have one
            raise ArtifactError(
                f"{folder.path}/{MANIFEST} below '{storage_root}' cannot be read, so nobody knows what has to stay for it.",
                "Put back what was there or build it again; if nothing needs it, remove the folder by hand.",
            )
        # online rows of a killed run take memory, and no run takes longer to be finished
        limit = a_run_ago if folder.path.startswith(f"{FEATURES}/{WORK}") else cutoff
        if folder.newest < limit and name not in kept:
            yield Removable("unfinished", folder.path, folder.bytes)


def _unused_rows(
    outputs: Collection[Manifest], kept: Collection[str], asked: Collection[str], storage_root: str
) -> list[Removable]:
    """Online rows of feature sets that stay; none where the online store cannot be reached, which is told of."""
    from components.features.online import projects

    since = datetime.now(UTC) - ROWS_STAY
    used = {
        name
        for one in outputs
        if one.fingerprint in asked or datetime.fromisoformat(one.created_at) >= since
        for name in (one.fingerprint, one.parents.get(FEATURES))
    }
    unused = [one for one in outputs if one.stage == FEATURES and one.fingerprint in kept and one.fingerprint not in used]
    found: list[Removable] = []
    for kind in sorted({one.facts["online_store"] for one in unused}):
        try:
            sizes = projects(kind, storage_root)
        except UserError as error:
            emit("warning", message=f"rows in the online store stay: {error}")
            continue
        found += [
            Removable("rows", f"{FEATURES}/{one.fingerprint}", sizes[one.facts["project"]], one)
            for one in unused
            if one.facts["online_store"] == kind and one.facts["project"] in sizes
        ]
    return found


def _last_champion(outputs: Iterable[Manifest], storage_root: str, tracking_uri: str) -> set[str]:
    """The champion that a run told of last, if one did: it stays, for by it the next clean-up knows the registry again.

    Raises RegistryError where it is no version of this registry.
    """
    from components.mlflow_client import without_password
    from components.registry import Registry, RegistryError

    verdicts = [one for one in outputs if one.stage == "promote" and one.facts.get("champion")]
    if not verdicts:
        return set()
    last = max(verdicts, key=lambda one: one.created_at)
    champion, name = last.facts["champion"], last.config["model_name"]
    if Registry(tracking_uri, name).find(champion) is not None:  # its alias may have moved since
        return {champion}
    address = without_password(last.config.get("tracking_uri", ""))
    raise RegistryError(
        f"model '{name}' of the registry '{without_password(tracking_uri)}' has no version {champion}, but "
        f"promote/{last.fingerprint} below '{storage_root}' names it the champion: this store's runs register elsewhere.",
        f"Give the promote.tracking_uri of its runs{f': {address}' if address else ''}. "
        "If that registry was lost, cllmr run registers the champion again.",
    )


def kept_outputs(outputs: Iterable[Manifest], pointed_at: Collection[str], keep: int, cutoff: datetime) -> set[str]:
    """Fingerprints of the outputs that stay.

    Args:
        outputs: all there are.
        pointed_at: fingerprints of the train outputs that the registry points at.
        keep: how many of the newest train outputs stay.
        cutoff: whatever was made later stays.
    """
    outputs = list(outputs)
    models = sorted((one for one in outputs if one.stage == "train"), key=lambda one: one.created_at, reverse=True)
    kept = {one.fingerprint for one in outputs if datetime.fromisoformat(one.created_at) >= cutoff}
    kept |= {one.fingerprint for one in models[:keep]} | set(pointed_at)
    # itself alone, not what that began with in turn: it holds all that a later training needs
    kept |= {str(one.config.get("warm_start")) for one in models if one.fingerprint in kept}
    before = -1
    while len(kept) > before:
        before = len(kept)
        for one in outputs:
            parents = set(one.parents.values())
            if one.fingerprint in kept:
                kept |= parents
            elif _belongs_to_model(one) and parents <= kept:
                kept.add(one.fingerprint)
    return kept


def _belongs_to_model(one: Manifest) -> bool:
    """Rankings of all users may be what an endpoint answers with: serve.scoring.lists."""
    return one.stage in AFTER_TRAIN or (one.stage == BATCH and one.config["users"] is None)


def remove(storage_root: str, tracking_uri: str, found: Iterable[Removable]) -> list[Removable]:
    """Removes what `removable` found; what is gone.

    An output that cannot go (its online rows cannot be reached), or that a promotion or rollback needs since, is told of.
    """
    from components.registry import Registry, registered_models

    store, gone, found = Store(storage_root), [], list(found)
    models = [one.manifest.fingerprint for one in found if one.manifest and one.manifest.stage == "train"]
    for name in registered_models(tracking_uri):
        Registry(tracking_uri, name).forget(models, storage_root)
    needed = _needed_since(store, tracking_uri, found)  # only now: what was forgotten, no alias can move to any more
    for one in sorted(found, key=lambda one: one.what != "rows"):  # rows first: their models stay, and may be pointed at
        if one.what != "replaced" and not needed.isdisjoint(one.where.split("/")):
            emit("warning", message=f"{one.where} stays: the registry points at its model since it was listed")
            continue
        try:
            _remove(store, one, storage_root)
        except (UserError, OSError) as error:
            emit("warning", message=f"{one.where} stays: {error}")
        else:
            gone.append(one)
    return gone


def _needed_since(store: Store, tracking_uri: str, found: Iterable[Removable]) -> set[str]:
    """Fingerprints of what a model needs that an alias was moved to since, and `ANSWERS` where it needs anything of `found`."""
    from components.registry import pointed_at

    served = pointed_at(tracking_uri)
    going = [one.manifest for one in found if one.manifest and one.what == "output"]
    models = [model for model in (store.find("train", name) for name in sorted(served)) if model is not None]
    never = datetime.max.replace(tzinfo=UTC)
    needed = kept_outputs([*going, *models], served, 0, never)
    return needed | {ANSWERS} if any(one.fingerprint in needed for one in going) else needed


def _remove(store: Store, one: Removable, storage_root: str) -> None:
    from components.features.online import remove_rows
    from components.features.stage import remove_unfinished_rows

    if one.manifest is not None:
        if one.manifest.stage == FEATURES:
            remove_rows(one.manifest.facts["online_store"], storage_root, one.manifest.facts["project"])
        if one.what == "rows":
            return
        store.discard(one.manifest.stage, one.manifest.fingerprint)
    match one.what:
        case "log":
            with suppress(FileNotFoundError):  # another clean-up may be as quick
                shutil.rmtree(runs_home(storage_root) / one.where)
        case "answers":
            for suffix in (".json", ".parquet"):
                store.remove(f"{one.where}{suffix}")
        case "unfinished" if one.where.startswith(f"{FEATURES}/{WORK}"):
            remove_unfinished_rows(storage_root, one.where.removeprefix(f"{FEATURES}/{WORK}"))
        case _:
            store.remove(one.where)


def _unused_answers(store: Store, in_use: Iterable[Mapping[str, Any]], cutoff: datetime) -> list[Removable]:
    """Shards whose decoding no kept output has."""
    asked = [tuple(config.get(name) for name in _DECODING) for config in in_use]
    shelf, found = store.shelf(ANSWERS), []
    files = store.files(ANSWERS)
    sizes = {file.path: file.bytes for file in files}
    for marker in files:
        if not _MARKER.fullmatch(marker.path) or marker.written >= cutoff:
            continue
        shard = marker.path.removesuffix(".json")
        with (
            # another clean-up may have removed it since it was listed; of a damaged one nobody knows what it is for
            suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError),
            shelf.open_input_stream(marker.path.removeprefix(f"{ANSWERS}/")) as stream,
        ):
            decoding = json.loads(stream.read())["decoding"]
            if tuple(decoding.get(name) for name in _DECODING) not in asked:
                found.append(Removable("answers", shard, marker.bytes + sizes.get(f"{shard}.parquet", 0)))
    return found


def _old_notes(store: Store, cutoff: datetime) -> list[Removable]:
    """What jobs have left of what became of them."""
    notes = [file for file in store.files(NOTES) if file.written < cutoff and _NOTE.fullmatch(file.path)]
    return [Removable("note", note.path, note.bytes) for note in notes]


def _old_logs(storage_root: str, cutoff: datetime) -> list[Removable]:
    """Logs of runs of this machine."""
    found = []
    for path in sorted(path for path in runs_home(storage_root).glob("*") if _RUN.fullmatch(path.name)):
        with suppress(FileNotFoundError):  # a run under way removes files of its own, another clean-up all of them
            files = [file.stat() for file in path.rglob("*") if file.is_file()]
            newest = max((file.st_mtime for file in files), default=path.stat().st_mtime)
            if datetime.fromtimestamp(newest, UTC) < cutoff:
                found.append(Removable("log", path.name, sum(file.st_size for file in files)))
    return found

"""How a stage runs: it is skipped where what it would write is there already, and what it writes is committed as a whole.

The name of its output, the fingerprint, is known before it runs: see `components.artifacts`.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.artifacts import FINGERPRINT_LENGTH, STORAGE_HINT, FileEntry, Manifest, Store, is_whole, sha256_file
from components.errors import StorageError, UserError, first_line
from components.job import AGAIN_VARIABLE
from components.memory import peak_memory
from components.progress import configure_logging, emit
from components.settings import StageConfig


@dataclass(frozen=True)
class Stage:
    """A stage's name (the same word everywhere) and the version of what it writes; a changed output format or algorithm
    gets a new version, and so new fingerprints."""

    name: str
    version: int


def fingerprint(stage: Stage, identity: Mapping[str, Any], parents: Mapping[str, str]) -> str:
    """Name of a stage's output: a hash of all that decides it, and of nothing else."""
    described = {"stage": stage.name, "version": stage.version, "config": identity, "parents": dict(parents)}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:FINGERPRINT_LENGTH]


def run_stage(
    stage: Stage,
    config: StageConfig,
    storage_root: str,
    parents: Mapping[str, Manifest],
    build: Callable[[Path], dict[str, Any]],
    is_live: Callable[[Manifest], bool] = lambda manifest: True,
) -> Manifest:
    """Runs a stage, or reuses what it wrote before; what cannot be reused stays until the new output takes its place.

    Where it fails, and another run has written the output meanwhile, that is reused.

    Args:
        stage: name and version.
        config: the stage's own settings.
        storage_root: where artifacts live.
        parents: the manifests the stage reads.
        build: writes the output into the directory it is given and returns the manifest's facts.
        is_live: for a stage that also fills something outside its artifact (a database): whether that is still filled.

    Raises:
        StorageError: the storage root cannot be read or written.
        UserError: whatever the stage finds wrong with its input; nothing half-written is left.
    """
    inputs = {name: parent.fingerprint for name, parent in parents.items()}
    with failure_told(stage):  # a stage's identity may be the contents of a file that is not there, the store out of reach
        name = fingerprint(stage, config.identity_below(storage_root), inputs)
        store = Store(storage_root)
        done = store.find(stage.name, name)
        if done is not None and not is_asked_again(stage.name):
            store.note_reuse(done)  # before it is looked at: a clean-up may be about to remove it
            if is_whole(done) and is_live(done):
                config.check_reuse(done.facts)
                tell_reused(done)
                return done
    configure_logging()
    emit("stage started", stage=stage.name, fingerprint=name)
    with failure_told(stage), store.staging(stage.name) as built, peak_memory() as memory:
        started = time.monotonic()
        try:
            facts = build(built)
        except Exception as error:
            meanwhile = _committed_by_another(store, stage, name, done, is_live)
            if meanwhile is None:
                raise
            emit("warning", stage=stage.name, message=f"another run was first, and this one failed: {first_line(error)}")
            config.check_reuse(meanwhile.facts)
            tell_reused(meanwhile)
            return meanwhile
        manifest = Manifest(
            stage=stage.name,
            version=stage.version,
            fingerprint=name,
            storage_root=storage_root,
            config=config.model_dump(mode="json"),
            parents=inputs,
            files=_describe(built),
            facts=facts,
            seconds=round(time.monotonic() - started, 3),
            peak_memory_mb=memory(),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        manifest = store.commit(built, manifest, instead_of=done)
    tell_done(manifest)
    return manifest


def _committed_by_another(
    store: Store, stage: Stage, name: str, before: Manifest | None, is_live: Callable[[Manifest], bool]
) -> Manifest | None:
    """The output that another run has written since `before` was there, None where there is none or the store does not say.

    The first of two runs to commit removes what both were working with, which ends the other one.
    """
    with suppress(UserError, OSError):
        found = store.find(stage.name, name)
        if found is not None and found != before and is_whole(found) and is_live(found):
            return found
    return None


def tell_reused(manifest: Manifest) -> None:
    """The event that a stage's output was there."""
    emit("stage reused", stage=manifest.stage, fingerprint=manifest.fingerprint, uri=manifest.uri, seconds=manifest.seconds)


def tell_done(manifest: Manifest) -> None:
    """The event that a stage has written its output."""
    emit(
        "stage done",
        stage=manifest.stage,
        fingerprint=manifest.fingerprint,
        uri=manifest.uri,
        seconds=manifest.seconds,
        peak_memory_mb=manifest.peak_memory_mb,
        facts=manifest.facts,
    )


def is_asked_again(stage: str) -> bool:
    """Whether a stage is to build its output although it is there."""
    return stage in os.environ.get(AGAIN_VARIABLE, "").split(",")


@contextmanager
def failure_told(stage: Stage) -> Iterator[None]:
    """What the user can mend as an event, for whoever watches the stage from another process."""
    try:
        yield
    except UserError as error:
        emit("stage failed", stage=stage.name, code=error.code, message=error.message, hint=error.hint)
        raise
    except OSError as error:
        emit("stage failed", stage=stage.name, code=StorageError.code, message=first_line(error), hint=STORAGE_HINT)
        raise


def _describe(directory: Path) -> dict[str, FileEntry]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size) for path in files
    }

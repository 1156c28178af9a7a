"""Heavy stages go to Ray through this file; the stage itself never knows where it runs.

``placement.<stage>.launch`` says where: here (on a Ray of ``components.local_ray``), as a job on a standing Ray cluster
(``components.jobs_api``), or as a KubeRay RayJob (``components.kuberay``). A job runs the whole stage, ``python -m
components.launch`` in the cluster's own image, on the same storage; what comes back is the stage's manifest, or the stage's own
error. The job's name is made of run and stage, so a launcher that is started again finds the job of the one before it.
"""

import hashlib
import importlib
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from components.artifacts import Manifest, Store, is_whole
from components.errors import ConfigError, LaunchError, UserError, error_of
from components.job import ENDED, LAUNCH_VARIABLE, REQUEST_VARIABLE, RUN_ID_VARIABLE, Backend, Job, LaunchConfig, Seen
from components.progress import configure_logging, emit
from components.settings import StageConfig
from components.stages import Stage, failure_told, fingerprint, is_asked_again, tell_done, tell_reused

NOTES = "launched"
"""Folder below the storage root where jobs leave what became of them."""


# -- a stage as a job -------------------------------------------------------------------------------------------------------


def launch(stage: str, config: Mapping[str, Any], storage_root: str, parents: Mapping[str, Manifest]) -> Manifest:
    """Runs a stage where its placement says, and returns its manifest.

    Raises:
        UserError: what the stage itself raised, wherever it ran.
        LaunchError: the job failed, took too long or vanished; it has been cancelled. Or it is of another release.
    """
    settings = LaunchConfig.model_validate_json(os.environ.get(LAUNCH_VARIABLE) or "{}")
    if settings.backend == "here":
        return _run_here(stage, config, storage_root, parents)
    described = _described(stage)
    configure_logging()
    with failure_told(described):
        if (done := _done(described, config, storage_root, parents)) is not None:
            tell_reused(done)
            return done
        emit("stage started", stage=stage)
        job = make_job(stage, config, storage_root, parents, settings)
        manifest = run_job(backend_of(job, settings), store := Store(storage_root))
        try:
            _check_release(stage, described.version, manifest.version)  # a job of an earlier release does not refuse
        except LaunchError as error:
            _leave_error(store, job.name, error)  # instead of its manifest: the next try makes the job anew
            raise
    tell_done(manifest)
    return manifest


def make_job(
    stage: str, config: Mapping[str, Any], storage_root: str, parents: Mapping[str, Manifest], settings: LaunchConfig
) -> Job:
    """The job for one stage of this run; raises ConfigError when the environment does not say which run this is."""
    run_id = os.environ.get(RUN_ID_VARIABLE)
    if not run_id:
        raise ConfigError(f"{RUN_ID_VARIABLE} is not set.", "A job is named after its run: set it to the run's id.")
    name = f"cllmr-{stage}-{hashlib.sha256(run_id.encode()).hexdigest()[:12]}"
    request = {
        "job": name,
        "backend": settings.backend,
        "orphan_s": settings.orphan_s,
        "stage": stage,
        "version": _described(stage).version,
        "config": config,
        "storage_root": storage_root,
        "parents": {key: [one.storage_root, one.stage, one.fingerprint] for key, one in parents.items()},
    }
    return Job(name, run_id, stage, json.dumps(request, sort_keys=True))


def backend_of(job: Job, settings: LaunchConfig) -> Backend:
    """The backend that the settings name."""
    if settings.backend == "jobs":
        from components.jobs_api import JobsApi

        return JobsApi(job, settings)
    from components.kuberay import KubeRay

    return KubeRay(job, settings)


def run_job(backend: Backend, store: Store) -> Manifest:
    """Starts or finds a job and waits until it has ended; whatever else ends this call ends the job.

    Raises:
        UserError: the stage's own.
        LaunchError: the job failed, vanished, or waited or ran for longer than allowed.
        SystemExit: this process got SIGTERM.
    """
    job = backend.job
    with _sigterm_raises(), _signs_of_life(store, job, backend.config.orphan_s), ExitStack() as unless_ended:
        unless_ended.callback(_cancel, backend)
        backend.attach_or_create(lambda: store.remove_note(*_result(job.name)), lambda: "error" in _left(store, job))
        with backend.logs():
            seen = _follow(backend)
        if seen.phase in ENDED:
            unless_ended.pop_all()
    left = _left(store, job)
    if "error" in left:
        raise error_of(**left["error"])
    if seen.phase == "succeeded" and "manifest" in left:
        return Manifest.model_validate(left["manifest"])
    raise _no_result(backend, seen, store.root)


def _cancel(backend: Backend) -> None:
    emit("job cancelled", job=backend.job.name)
    try:
        backend.cancel()
    except UserError as error:  # the reason to cancel says more
        emit("warning", stage=backend.job.stage, message=f"{backend.title} was not cancelled: {error}")


def _no_result(backend: Backend, seen: Seen, storage_root: str) -> LaunchError:
    """Why a job left nothing, as far as its backend can say."""
    last = f" Its log ends: {backend.last_line}" if backend.last_line else ""
    match seen.phase:
        case "succeeded":
            return LaunchError(
                f"{backend.title} has ended well but left no {'/'.join(_result(backend.job.name))} below '{storage_root}'.",
                "Give the job's pods the same storage as the pipeline's, with the right to write there.",
            )
        case "failed":
            return LaunchError(f"{backend.title} failed: {seen.text}.{last}", backend.see)
        case "gone":
            return LaunchError(
                f"{backend.title} was deleted by somebody else before it had ended.{last}", "Run the step again."
            )
    setting = "timeout_s" if seen.phase == "running" else "queue_timeout_s"
    limit = _limit(seen, backend.config)
    return LaunchError(
        f"{backend.title} was cancelled: it has been {seen.phase} ({seen.text}) for {limit:g} s.{last}",
        f"If it needs longer, raise placement.{backend.job.stage}.launch.{setting}.",
    )


def _follow(backend: Backend) -> Seen:
    """Follows a job until it has ended or its time is up; the last that was seen of it."""
    config, told, since = backend.config, None, time.monotonic()

    def time_left() -> float:
        return max(0.0, _limit(told, config) - (time.monotonic() - since)) if told else config.resync_s

    for seen in backend.look(time_left):
        if seen != told:
            emit("job", job=backend.job.name, phase=seen.phase, state=seen.text)
        if told is None or seen.phase != told.phase:
            since = time.monotonic()
        told = seen
        if seen.phase in ENDED or time_left() == 0.0:
            return seen
    raise AssertionError("a backend never stops telling")


def _limit(seen: Seen, config: LaunchConfig) -> float:
    return config.timeout_s if seen.phase == "running" else config.queue_timeout_s


def _described(stage: str) -> Stage:
    described: Stage = importlib.import_module(f"components.{stage}.stage").STAGE
    return described


def _check_release(stage: str, asked: int | None, made: int) -> None:
    """Raises LaunchError when the step and its job, which have images of their own, differ in the stage's version.

    Fingerprints may differ: a folder with an encoder, which counts by its contents, may be in the job's image alone.
    """
    if asked != made:
        raise LaunchError(
            f"the step asks for version {asked or 'unknown'} of stage {stage}, and its job makes version {made}: they are of "
            "different releases.",
            "Upgrade the image of the job (RayJob templates in ConfigMap cllmr-rayjobs, or the standing Ray cluster) or of the "
            "pipeline, so that both are of one release.",
        )


def _run_here(stage: str, config: Mapping[str, Any], storage_root: str, parents: Mapping[str, Manifest]) -> Manifest:
    manifest: Manifest = importlib.import_module(f"components.{stage}.stage").run(config, storage_root, **parents)
    return manifest


def _done(stage: Stage, config: Mapping[str, Any], storage_root: str, parents: Mapping[str, Manifest]) -> Manifest | None:
    """What the stage wrote before, so that no cluster is started to find that out."""
    kind = getattr(importlib.import_module(f"components.{stage.name}.config"), f"{stage.name.capitalize()}Config")
    settings: StageConfig = kind.parse(config, stage.name)
    inputs = {key: parent.fingerprint for key, parent in parents.items()}
    store = Store(storage_root)
    found = store.find(stage.name, fingerprint(stage, settings.identity_below(storage_root), inputs))
    if found is None or is_asked_again(stage.name):
        return None
    store.note_reuse(found)
    if not is_whole(found):
        return None
    settings.check_reuse(found.facts)
    return found


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within, the first SIGTERM raises SystemExit: a job is cancelled as on any other exit. Further ones wait for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _signs_of_life(store: Store, job: Job, orphan_s: float) -> Iterator[None]:
    """Within, leaves a note for the job every tenth of `orphan_s` that somebody waits for it."""
    stop = threading.Event()

    def tell() -> None:
        waiting = True
        while waiting:
            try:
                store.write_note(secrets.token_hex(8), NOTES, f"{job.name}.alive")
            except OSError as error:  # the next one may succeed before the job misses it
                emit("warning", stage=job.stage, message=f"no sign of life could be left for {job.name}: {error}")
            waiting = not stop.wait(orphan_s / 10)

    thread = threading.Thread(target=tell, daemon=True, name="signs-of-life")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# -- what a job leaves ------------------------------------------------------------------------------------------------------


def _result(name: str) -> tuple[str, str]:
    """Where a job of this name leaves its manifest or its error."""
    return NOTES, f"{name}.json"


def _left(store: Store, job: Job) -> dict[str, Any]:
    return dict(json.loads(store.read_note(*_result(job.name)) or "{}"))


def _leave_manifest(store: Store, name: str, manifest: Manifest) -> None:
    store.write_note(json.dumps({"manifest": manifest.model_dump(mode="json")}), *_result(name))


def _leave_error(store: Store, name: str, error: UserError) -> None:
    told = {"code": error.code, "message": error.message, "hint": error.hint}
    store.write_note(json.dumps({"error": told}), *_result(name))


# -- in the job -------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Runs the stage that the environment asks for and leaves its manifest, or its error, for the launcher; the exit code."""
    request = json.loads(os.environ[REQUEST_VARIABLE])
    store = Store(request["storage_root"])
    # after an error that is told; not as a failure to KubeRay, which would try again, each time with a whole new cluster
    code = 0 if request["backend"] == "rayjob" else 2
    watched = (store, request["job"], request["orphan_s"], code)
    threading.Thread(target=_end_when_orphaned, args=watched, daemon=True, name="orphan-watch").start()
    try:
        _check_release(request["stage"], request.get("version"), _described(request["stage"]).version)
        parents = {}
        for key, (root, stage, name) in request["parents"].items():
            found = Store(root).find(stage, name)
            if found is None:
                raise LaunchError(
                    f"{stage}/{name} is not below '{root}', as this job sees it.",
                    "Give the job's pods the same storage as the pipeline's.",
                )
            parents[key] = found
        manifest = _run_here(request["stage"], request["config"], request["storage_root"], parents)
    except UserError as error:
        _leave_error(store, request["job"], error)
        sys.stderr.write(f"{error}\n")
        return code
    _leave_manifest(store, request["job"], manifest)
    return 0


def _end_when_orphaned(store: Store, name: str, orphan_s: float, code: int) -> None:
    """Ends this process with `code` when the launcher's sign of life has not changed for `orphan_s` seconds, by this machine's
    clock; with 1 when it could not tell so.
    """
    seen, since = None, time.monotonic()
    while time.monotonic() - since < orphan_s:
        time.sleep(orphan_s / 10)
        try:
            sign = store.read_note(NOTES, f"{name}.alive")
        except OSError:  # nothing is known, which is no reason to end
            since = time.monotonic()
            continue
        if sign != seen:
            seen, since = sign, time.monotonic()
    why = f"job {name} ends: nobody has waited for it for {orphan_s:g} s"
    sys.stderr.write(f"{why}\n")
    sys.stderr.flush()
    try:
        _leave_error(store, name, LaunchError(f"{why}.", "Run the step again."))
    except OSError:
        code = 1
    os._exit(code)  # of a driver: Ray ends its workers


if __name__ == "__main__":
    sys.exit(main())

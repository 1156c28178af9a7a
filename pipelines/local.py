"""Runs the compiled pipeline on this machine with ``kfp.local``, one process per task.

KFP's local runner works in a process of its own (``pipelines.kfp_runner``): its console output and that of the tasks go to the
run's log, its process group can be ended as a whole, and it ends by itself when this process dies. The tasks tell what they
do through the events file (``components.progress``), which this process draws.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import psutil

from components.artifacts import CACHE_HINT, Manifest, Store, cache_home
from components.errors import StorageError, error_of
from components.job import AGAIN_VARIABLE, RUN_ID_VARIABLE
from components.progress import EVENTS_VARIABLE, events_of
from pipelines.display import Display
from pipelines.plan import CompiledPipeline, built_again, check_order

LOG, EVENTS, PIPELINE = "log.txt", "events.jsonl", "pipeline.yaml"
_MAKES_FOLDER = "$(mktemp -d)"
"""In the command of a KFP task: for its program, and removed by nobody."""
_MAKES_IT_IN_THE_RUN = f"$(TMPDIR=${{{EVENTS_VARIABLE}%/*}} mktemp -d)"
SECONDS_TO_END = 5.0
SECONDS_BETWEEN_LOOKS = 0.1
LINES_SHOWN_OF_LOG = 15
FULL_DISK = 2**20
"""Bytes: with fewer free ones a run may have ended for want of room."""
_KFP_NOTE = re.compile(
    r"\d\d:\d\d:\d\d\.\d{3} - (INFO|ERROR) - |Pipeline '.*' finished with status|\s*\[KFP Executor .* INFO\]"
)


class StageCrashed(RuntimeError):
    """A stage ended in a way nobody foresaw: the traceback is in the log."""

    def __init__(self, stage: str, log: Path, tail: list[str]) -> None:
        super().__init__(f"stage {stage} crashed; see {log}")
        self.stage, self.log, self.tail = stage, log, tail


@dataclass(frozen=True)
class StageRun:
    """How one stage went."""

    manifest: Manifest
    reused: bool
    """Whether it had been done before, so that nothing ran."""


@dataclass
class PlatformRun:
    """How a run of the pipeline went."""

    run_id: str
    directory: Path
    """Log, events and KFP's outputs of this run."""
    storage_root: str
    stages: dict[str, StageRun] = field(default_factory=dict)
    """By stage name, in the pipeline's order."""
    seconds: float = 0.0
    """Wall-clock seconds of the whole run."""

    def manifest(self, stage: str) -> Manifest:
        """The manifest of a stage that ran."""
        return self.stages[stage].manifest

    @property
    def all_reused(self) -> bool:
        """Whether nothing had to be built."""
        return all(stage.reused for stage in self.stages.values())


def absolute_root(storage_root: str) -> str:
    """A local root as an absolute path, so that every process means the same place; a URI as it is."""
    return storage_root if "://" in storage_root else str(Path(storage_root).expanduser().absolute())


def runs_home(storage_root: str) -> Path:
    """Where the logs of runs lie: below a local storage root, else in this machine's cache, see `cache_home`."""
    return (cache_home() if "://" in storage_root else Path(storage_root)) / "runs"


def make_run_directory(storage_root: str, pipeline: str) -> Path:
    """A new directory for one run: the pipeline it runs, no event yet; raises StorageError when the place cannot be written."""
    path = runs_home(storage_root) / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    try:
        path.mkdir(parents=True)
        (path / PIPELINE).write_text(pipeline, encoding="utf-8")
        (path / EVENTS).touch()
        (path / LOG).touch()
    except OSError as error:
        what, hint = f"storage root '{storage_root}'", "Choose a directory you can write with --storage."
        if "://" in storage_root:
            what, hint = f"cache '{cache_home()}'", CACHE_HINT
        raise StorageError(f"{what} cannot be written: {error.strerror or error} ('{error.filename or path}').", hint) from None
    return path


def with_programs_in_the_run(pipeline: CompiledPipeline) -> CompiledPipeline:
    """The same pipeline, whose tasks write their programs into the run's directory, beside its events, and not into /tmp."""
    spec = deepcopy(pipeline.spec)
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        container["command"] = [part.replace(_MAKES_FOLDER, _MAKES_IT_IN_THE_RUN) for part in container["command"]]
    return CompiledPipeline(spec, pipeline.platforms)


def run(
    pipeline: CompiledPipeline,
    storage_root: str,
    display: Callable[[list[str]], Display],
    from_stage: str | None = None,
    until: str | None = None,
) -> PlatformRun:
    """Runs the pipeline here and waits for it.

    Args:
        pipeline: the whole compiled pipeline.
        storage_root: where artifacts live.
        display: makes what shows the events, given the names of the stages.
        from_stage: built again, with all after it, even where done; what is there stays until the new is in its place.
        until: the last stage to run.

    Raises:
        ConfigError: `from_stage` or `until` is no stage, or they exclude each other.
        StorageError: the storage root cannot be written.
        UserError: a stage refused its input; nothing half-written is left.
        StageCrashed: a stage ended unexpectedly.
        KeyboardInterrupt: the tasks have been ended.
    """
    started = time.monotonic()
    storage_root = absolute_root(storage_root)
    check_order(pipeline.stages(), from_stage, until)
    pipeline = pipeline.until(until)
    directory = make_run_directory(storage_root, with_programs_in_the_run(pipeline).to_yaml())
    events: list[dict[str, Any]] = []
    with display(pipeline.stages()) as shown:
        code = _watch(directory, storage_root, built_again(pipeline.stages(), from_stage), shown, events)
    if code != 0:
        raise _failure(events, pipeline.stages(), directory / LOG)
    result = PlatformRun(directory.name, directory, storage_root)
    ended = {event["stage"]: event for event in events if event["event"] in ("stage done", "stage reused")}
    for stage in pipeline.stages():  # KFP is free in the order of stages that do not depend on each other
        manifest = Store(storage_root).find(stage, ended[stage]["fingerprint"])
        assert manifest is not None, f"{stage} told of an output it did not commit"
        result.stages[stage] = StageRun(manifest, reused=ended[stage]["event"] == "stage reused")
    result.seconds = round(time.monotonic() - started, 3)
    return result


def _watch(directory: Path, storage_root: str, again: Collection[str], display: Display, events: list[dict[str, Any]]) -> int:
    """Runs KFP's local runner in a process group of its own; shows and collects events until it ends; its exit code."""
    with open(directory / LOG, "ab") as log, open(directory / EVENTS, encoding="utf-8") as told:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pipelines.kfp_runner",
                str(directory / PIPELINE),
                json.dumps({"storage_root": storage_root}),
            ],
            stdin=subprocess.PIPE,  # held open while this process lives: its end tells the runner to stop
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(directory, again),
            start_new_session=True,
        )
        try:
            running = True
            while running:
                running = process.poll() is None  # read once more after the end, so that no last event is missed
                for event in _new_events(told):
                    events.append(event)
                    display.show(event)
                display.tick()
                if running:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            _end(process)
        return process.returncode


def _new_events(told: TextIO) -> Iterator[dict[str, Any]]:
    while True:
        position = told.tell()
        line = told.readline()
        if not line.endswith("\n"):  # the end, or a line still being written
            told.seek(position)
            return
        yield from events_of([line])


def _environment(directory: Path, again: Collection[str]) -> dict[str, str]:
    """The tasks' environment: our Python first on the path, the events file, the stages that are built `again`, threads that do
    not fight over the cores.

    A pool as wide as the machine is a little faster when the machine is idle and many times slower when it is not.
    """
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    pinned = {name: os.environ.get(name, threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {
        **os.environ,
        **pinned,
        "PATH": path,
        EVENTS_VARIABLE: str(directory / EVENTS),
        RUN_ID_VARIABLE: directory.name,
        AGAIN_VARIABLE: ",".join(again),
        "PYTHONUNBUFFERED": "1",
    }


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the runner, its tasks and whatever they started, also where the runner has been killed and they have not."""
    if members := _members(process.pid):
        _signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_END
        while any(map(is_alive, members)) and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        for member in members:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue  # as it should be
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin:
        process.stdin.close()


def _members(group: int) -> list[psutil.Process]:
    """The processes of a group, and what they started in groups of its own."""
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group:
                members += [process, *process.children(recursive=True)]
    return members


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that only waits to be collected by its parent does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # nobody left


def _failure(events: list[dict[str, Any]], stages: list[str], log: Path) -> Exception:
    """The exception for a run that did not end well: the stage's own words when it had any."""
    ends = ("stage done", "stage reused", "stage failed")  # the last counts: a try may fail, or what follows the output
    ended = {event["stage"]: event["event"] for event in events if event["event"] in ends}
    finished = {stage for stage, end in ended.items() if end != "stage failed"}
    stage = next((name for name in stages if name not in finished), stages[-1])
    told = [event for event in events if event["event"] == "stage failed" and event["stage"] not in finished]
    if told:
        last = told[-1]
        return error_of(last["code"], f"{last['stage']}: {last['message']}", last.get("hint") or "")
    started = [event["stage"] for event in events if event["event"] == "stage started" and event["stage"] not in finished]
    tail = _tail(log.read_text(encoding="utf-8", errors="replace"))
    if (free := shutil.disk_usage(log.parent).free) < FULL_DISK:  # neither events nor log may tell of it
        tail.append(f"No room is left for '{log.parent}': {free:,} bytes are free. Make room and run the same again.")
    return StageCrashed(started[-1] if started else stage, log, tail)


def _tail(log: str) -> list[str]:
    """The last lines that the stage itself wrote: without KFP's colours, rules and notes."""
    lines = (re.sub(r"\x1b\[\d+m", "", line).rstrip() for line in log.splitlines())
    told = [line for line in lines if line.strip(" -") and not _KFP_NOTE.match(line)]
    return told[-LINES_SHOWN_OF_LOG:]

"""What a stage tells the world while it works: structured logs, progress and facts.

A stage runs in a process of its own (a KFP task). Under ``cllmr run`` that process appends events to the file named by
``CLLMR_EVENTS`` and the parent draws them (bars on a terminal, lines elsewhere); on a cluster there is no such file and the
same events are log lines of the pod.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

EVENTS_VARIABLE = "CLLMR_EVENTS"


def configure_logging() -> None:
    """Structured logs to standard error: readable on a terminal, JSON elsewhere."""
    import structlog  # here, not above: a stage that is reused tells one event and should cost no more than that

    is_terminal = os.isatty(2)  # not sys.stderr: Ray Serve's stand-in for it says that it is one
    renderers: list[Any] = [structlog.dev.ConsoleRenderer()]
    if not is_terminal:  # the other one writes errors by itself
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def emit(event: str, **fields: Any) -> None:
    """Tell one event: to the events file when there is one, to the log otherwise."""
    path = os.environ.get(EVENTS_VARIABLE)
    if not path:
        import structlog

        if not structlog.is_configured():
            configure_logging()
        structlog.get_logger().info(event, **fields)
        return
    line = json.dumps({"event": event, "time": time.time(), **fields}, default=str).encode() + b"\n"
    with open(path, "a+b") as file:  # one short write in append mode: events of parallel tasks do not mix
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a writer was killed, or the disk was full: that line is lost, this one is not
                line = b"\n" + line
        file.write(line)


def events_of(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The events of whole lines of an events file, without lines that were torn."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        yield event


class Progress:
    """Counts work done and tells it at most twice a second."""

    def __init__(self, stage: str, total: int, unit: str, every: float = 0.5) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, 0
        self._every, self._told = every, 0.0

    def advance(self, count: int = 1, **figures: Any) -> None:
        """`count` more units are done; `figures` (loss, metric) are shown beside the bar."""
        self.done += count
        now = time.monotonic()
        if self.done >= self.total or now - self._told >= self._every:
            self._told = now
            emit("progress", stage=self.stage, done=self.done, total=self.total, unit=self.unit, **figures)


@contextmanager
def progress(stage: str, total: int, unit: str) -> Iterator[Progress]:
    """A bar for one long piece of work of a stage: ``with progress("sideinfo", len(texts), "texts") as bar``."""
    bar = Progress(stage, total, unit)
    emit("progress", stage=stage, done=0, total=total, unit=unit)
    yield bar

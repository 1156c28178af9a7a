"""A replica's logs, which may not be writable: lines that are lost are counted, told of once, and cost an answer nothing.

Ray Serve makes a log file of all that a replica writes, standard error included. That is where Python's logging tells of a
line that it could not write: on a full disk this is the next line that cannot be written, and so on up to the recursion limit,
with a longer traceback each time. One answer waited 16 s for it.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from logging.handlers import MemoryHandler

from components.progress import configure_logging
from serving.metrics import LogMetrics

SERVE_LOGGER = "ray.serve"


def configure_replica_logging() -> None:
    """Structured logs as everywhere (`components.progress`), by handlers that stay quiet when they fail."""
    configure_logging()
    quiet_failures(logging.getLogger(SERVE_LOGGER).handlers, LogMetrics().lost.inc)


def quiet_failures(handlers: Iterable[logging.Handler], lost: Callable[[], object]) -> None:
    """Lets handlers tell `lost` of every record that they cannot write; the first is told of to the process itself."""
    told = False

    def handle_error(record: logging.LogRecord) -> None:
        nonlocal told
        lost()
        if not told:
            told = True
            reason = sys.exception()
            with suppress(OSError):  # it may go to the same disk
                os.write(2, f"logs cannot be written: {type(reason).__name__}: {reason}\n".encode())

    for handler in _with_targets(handlers):
        handler.handleError = handle_error  # type: ignore[method-assign]


def _with_targets(handlers: Iterable[logging.Handler]) -> Iterator[logging.Handler]:
    """These, and those that buffering ones pass their records to."""
    for handler in handlers:
        yield handler
        if isinstance(handler, MemoryHandler) and handler.target is not None:
            yield from _with_targets([handler.target])

"""Logs that cannot be written: counted, and no loop between logging and the standard error that is logged."""

import errno
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from logging.handlers import MemoryHandler

import pytest
from ray.serve._private.logging_utils import StreamToLogger

from serving import logs
from serving.metrics import LogMetrics


class FullDisk(io.StringIO):
    """Counts how often it was written to."""

    tries = 0

    def write(self, text: str) -> int:
        self.tries += 1
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk() -> FullDisk:
    return FullDisk()


@pytest.fixture
def logger(disk: FullDisk) -> Iterator[logging.Logger]:
    """As Ray Serve makes a replica's: a buffer before the file."""
    logger = logging.getLogger("replica-of-a-test")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(MemoryHandler(capacity=1, target=logging.StreamHandler(disk)))
    yield logger
    logger.handlers.clear()


def log_errors(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends standard error to the logger, as Ray Serve does; in the test itself, as pytest puts its own there before it."""
    monkeypatch.setattr(sys, "stderr", StreamToLogger(logger, logging.INFO, sys.stderr))


def test_a_line_that_cannot_be_written_is_tried_once_counted_and_told_of_once(
    logger: logging.Logger, disk: FullDisk, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lost = LogMetrics()
    monkeypatch.setattr(logs, "SERVE_LOGGER", logger.name)
    monkeypatch.setattr(logs, "LogMetrics", lambda: lost)
    monkeypatch.setattr(logs, "configure_logging", lambda: None)  # of this whole process
    counted: list[int] = []
    monkeypatch.setattr(lost.lost, "inc", lambda: counted.append(1))
    log_errors(logger, monkeypatch)
    logs.configure_replica_logging()
    logger.error("one")
    logger.error("two")
    assert (disk.tries, len(counted)) == (2, 2)
    assert capfd.readouterr().err == "logs cannot be written: OSError: [Errno 28] No space left on device\n"


def test_without_that_every_failure_is_the_next_line_that_fails(
    logger: logging.Logger, disk: FullDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_errors(logger, monkeypatch)
    with suppress(RecursionError):
        logger.error("one")
    assert disk.tries > 10

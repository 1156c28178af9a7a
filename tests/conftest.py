"""What every test wants."""

import inspect
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logs_of_its_own() -> Iterator[None]:
    """A test that sets logging up does so for itself: its standard error is closed when the next one begins."""
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True, scope="session")
def _metrics_soon() -> Iterator[None]:
    """Ray tells metrics every ten seconds, and tests wait for them; much more often, and it would forget ours in between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "4000")
        yield


@pytest.fixture(autouse=True, scope="session")
def _stacks_without_sources() -> Iterator[None]:
    """kfp 2.17 asks `inspect.stack` for the name of a caller at every setting of a task; with the thousands of modules that
    tests have loaded, and their deep stacks, the sources that nobody looks at took ten seconds of a pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", _stack)
        yield


def _stack(context: int = 0) -> list[inspect.FrameInfo]:
    frame: FrameType | None = sys._getframe(1)
    found = []
    while frame is not None:
        found.append(inspect.FrameInfo(frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None, None))
        frame = frame.f_back
    return found


def pytest_configure() -> None:
    """Processes that a test interrupts hear it: those of a test run in the background inherit that it is ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # the environment of vLLM has no pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from tests.scheduling import RayApart

    return RayApart(config, log)

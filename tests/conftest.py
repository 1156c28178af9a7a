"""What every test wants."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logs_of_its_own() -> Iterator[None]:
    """A test that sets logging up does so for itself: its standard error is closed when the next one begins."""
    yield
    structlog.reset_defaults()


@pytest.hookimpl(optionalhook=True)  # the environment of vLLM has no pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from tests.scheduling import RayApart

    return RayApart(config, log)

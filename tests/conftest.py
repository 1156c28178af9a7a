"""What every test wants."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import structlog
from xdist.scheduler import LoadFileScheduling


@pytest.fixture(autouse=True)
def _logs_of_its_own() -> Iterator[None]:
    """A test that sets logging up does so for itself: its standard error is closed when the next one begins."""
    yield
    structlog.reset_defaults()


class OneRay(LoadFileScheduling):
    """Gives a file at a time to every process, and those whose tests start Ray all to one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "ray" if _starts_ray(self.config.rootpath / file) else file


@cache
def _starts_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text(encoding="utf-8")


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneRay:
    """Ray alone keeps two cores busy: tests of two took longer side by side than one after another, and beyond their limits."""
    return OneRay(config, log)

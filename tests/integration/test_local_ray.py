"""A Ray of this process that does not come up: tried again, given up in the end, and nothing of it is left."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from components.errors import LaunchError
from components.local_ray import RAY_STARTS, start_local_ray

pytestmark = pytest.mark.ray

TOO_LATE = "The current node timed out during startup"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The warnings so far."""
    file = tmp_path / "events.jsonl"
    file.touch()
    monkeypatch.setenv("CLLMR_EVENTS", str(file))
    return lambda: [json.loads(line)["message"] for line in file.read_text().splitlines()]


@pytest.fixture
def bystanders() -> "Iterator[list[subprocess.Popen[bytes]]]":
    """Children of this process that begin while Ray does, as a stage does beside an endpoint."""
    begun: list[subprocess.Popen[bytes]] = []
    yield begun
    for process in begun:
        process.communicate()


def late(monkeypatch: pytest.MonkeyPatch, times: int, bystanders: "list[subprocess.Popen[bytes]]") -> list[set[psutil.Process]]:
    """Ray's node comes up too late so many times; gives Ray's processes at each time that was looked for it."""
    from ray._private import services

    look, running = services.get_node, []

    def looked(*args: object) -> object:
        running.append({child for child in psutil.Process().children() if "/ray/" in " ".join(child.cmdline())})
        bystanders.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        if len(running) <= times:
            raise TimeoutError(f"{TOO_LATE}.")
        return look(*args)

    monkeypatch.setattr(services, "get_node", looked)
    return running


def test_a_node_that_comes_up_too_late_is_started_again_and_nothing_of_it_is_left(
    monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]], bystanders: "list[subprocess.Popen[bytes]]"
) -> None:
    running = late(monkeypatch, 1, bystanders)
    try:
        start_local_ray(1)
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
        assert len(running[0]) >= 2, "the store of the cluster's state and the node"
        assert not any(process.is_running() for process in running[0])
        assert told() == [f"Ray did not start and is started again: {TOO_LATE}"]
    finally:
        ray.shutdown()


def test_a_node_that_never_comes_up_is_given_up_and_other_children_live_on(
    monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]], bystanders: "list[subprocess.Popen[bytes]]"
) -> None:
    running = late(monkeypatch, RAY_STARTS, bystanders)
    with pytest.raises(LaunchError, match=rf"Ray cannot start on this machine: {TOO_LATE}.*cllmr doctor"):
        start_local_ray(1)
    assert (len(running), len(told())) == (RAY_STARTS, RAY_STARTS - 1)
    assert not any(process.is_running() for process in set().union(*running))
    assert [process.poll() for process in bystanders] == [None] * RAY_STARTS

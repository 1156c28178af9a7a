"""Ray clusters on loopback for tests: nodes started as operators do, with `ray start`, a token, and ports that are free."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.stores import free_ports, until

REPOSITORY = Path(__file__).parents[1]
TOKEN = "0123456789abcdef0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
OBJECT_STORE_BYTES = 100 * 2**20


@dataclass(frozen=True)
class RayCluster:
    """A running cluster."""

    dashboard: str
    """URL of the dashboard, where the Jobs API and Serve's API are."""
    nodes: "list[subprocess.Popen[bytes]]"
    """The `ray start --block` of every node, the head's first; each leads a process group of its own."""

    def alive(self) -> int:
        """How many nodes the cluster counts."""
        try:
            found = httpx.get(f"{self.dashboard}/nodes?view=summary", headers=HEADERS, timeout=10)
        except httpx.HTTPError:
            return 0
        if found.status_code != 200:
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in found.json()["data"]["summary"])


@contextmanager
def ray_cluster(cpus: tuple[int, ...], environment: Mapping[str, str] | None = None) -> Iterator[RayCluster]:
    """A Ray cluster with one node for each number of CPUs, the head first; ended with all its processes.

    Args:
        cpus: CPUs that each node offers.
        environment: variables of all its processes, as a pod's.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CLLMR_"))}
    variables = {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        **(environment or {}),
    }
    gcs, dashboard, client = free_ports(3)
    address = f"http://127.0.0.1:{dashboard}"
    head = {"port": gcs, "dashboard-port": dashboard, "ray-client-server-port": client, "dashboard-host": "127.0.0.1"}
    # Sockets lie below it, and their names must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder, ExitStack() as nodes:
        cluster = RayCluster(address, [])
        for number, count in enumerate(cpus):
            role = {"head": True, "temp-dir": folder, **head} if number == 0 else {"address": f"127.0.0.1:{gcs}"}
            log = Path(folder) / f"node-{number}.log"
            node = nodes.enter_context(_node({**role, "num-cpus": count}, variables, log))
            cluster.nodes.append(node)
            until(lambda: node.poll() is not None or cluster.alive() > number, log.name)  # noqa: B023  # before the next one
            assert node.poll() is None, log.read_text()
        yield cluster


@contextmanager
def _node(options: Mapping[str, object], environment: Mapping[str, str], log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    names = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "node-manager-port",
        "object-manager-port",
        "metrics-export-port",
    )
    given = {**options, **dict(zip(names, free_ports(len(names)), strict=True)), "object-store-memory": OBJECT_STORE_BYTES}
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    with open(log, "w") as output:
        node = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "ray"),
                *("start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *flags),
            ],
            cwd=REPOSITORY,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield node
    finally:
        end_node(node)


def end_node(node: "subprocess.Popen[bytes]") -> None:
    """Ends a node in order, and what is left of it after a while by force; one that has ended already is left alone."""
    if node.poll() is None:
        node.terminate()
        try:
            node.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()

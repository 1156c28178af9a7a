"""Ray clusters on loopback for tests: nodes started as operators do, with `ray start`, a token, and ports that are free."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests import REPOSITORY
from tests.stores import free_ports
from tests.waiting import wait_until

TOKEN = "0123456789abcdef0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
OBJECT_STORE_BYTES = 100 * 2**20


@dataclass
class RayCluster:
    """A cluster of `ray start --block` processes, each of which leads a process group of its own."""

    folder: Path
    environment: Mapping[str, str]
    """Variables of all its processes, as a pod's."""
    running: ExitStack
    dashboard: str = ""
    """URL of the dashboard, where the Jobs API and Serve's API are."""
    gcs: str = ""
    """What other nodes join."""
    nodes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def start_node(self, cpus: int) -> "subprocess.Popen[bytes]":
        """Starts a node, the first one as the head, and waits until the cluster counts it."""
        if self.nodes:
            role: dict[str, object] = {"address": self.gcs}
        else:
            gcs, dashboard, client = free_ports(3)
            self.dashboard, self.gcs = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}"
            role = {"head": True, "temp-dir": self.folder, "port": gcs, "ray-client-server-port": client}
            role |= {"dashboard-host": "127.0.0.1", "dashboard-port": dashboard}
        log, before = self.folder / f"node-{len(self.nodes)}.log", self.alive() if self.nodes else set()
        for _ in range(3):  # Ray gives a node 30 s to start, which a busy machine may exceed
            node = self.running.enter_context(_node({**role, "num-cpus": cpus}, self.environment, log))
            wait_until(log.name, lambda: node.poll() is not None or self.alive() - before, seconds=120)  # noqa: B023  # called at once
            if node.poll() is None:
                self.nodes.append(node)
                return node
        raise AssertionError(log.read_text())

    def alive(self) -> set[str]:
        """Ids of the nodes that the cluster takes to be alive; one that is lost is for some seconds more."""
        try:
            found = httpx.get(f"{self.dashboard}/nodes?view=summary", headers=HEADERS, timeout=60)
        except httpx.HTTPError:
            return set()
        if found.status_code != 200:
            return set()
        nodes = [node["raylet"] for node in found.json()["data"]["summary"]]
        return {str(node["nodeId"]) for node in nodes if node.get("state") == "ALIVE"}


@contextmanager
def ray_cluster(cpus: tuple[int, ...], environment: Mapping[str, str] | None = None) -> Iterator[RayCluster]:
    """A Ray cluster with one node for each number of CPUs, the head first; ended with all its processes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CLLMR_"))}
    variables = {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_gcs_server_port_wait_time_s": "120",  # of a busy machine
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        **(environment or {}),
    }
    # sockets lie below it, and their names must be short
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder, ExitStack() as running:
        cluster = RayCluster(Path(folder), variables, running)
        for count in cpus:
            cluster.start_node(count)
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
            lose_node(node)


def lose_node(node: "subprocess.Popen[bytes]") -> None:
    """Kills a node and all its processes at once, as when its machine is taken away."""
    family = [*psutil.Process(node.pid).children(recursive=True)]
    for process in (psutil.Process(node.pid), *family):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()

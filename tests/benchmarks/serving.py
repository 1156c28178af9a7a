"""The endpoint beside servers written by hand, in one run: latency, requests per second, CPU per request.

    python -m tests.benchmarks.serving --sizes 10000 100000 --servers ours ours-fast-together numpy faiss-flat

Every server in turn, in as many rounds as asked for, gets a few seconds of each number of clients; of the rounds the least
disturbed counts (most requests per second), as the machine may have other work. Each client is a connection that asks again
when it is answered: one user, top 20. CPU is of the server's whole process tree, Ray's own processes included, the clients'
not. Every answer's status is checked, and the servers' answers for the same users are compared. The faiss servers need
faiss-cpu.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import psutil
import yaml
from rich.console import Console
from rich.table import Table

from components.batch import stage as batch
from serving.run import free_port, running_endpoint, wait_until_ready
from tests.bundles import stored_bundle, write_factor_bundle

NUM_USERS, DIM, K, LISTED = 1_000, 64, 20, 100
CLIENTS = (1, 16, 64)
WARM_SECONDS = 0.7
FAST = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
TOGETHER = {"composition": "together"}
OURS: dict[str, tuple[dict[str, str], dict[str, object]]] = {
    "ours": ({}, {}),
    "ours-together": ({}, TOGETHER),
    "ours-fast": (FAST, {}),
    "ours-fast-together": (FAST, TOGETHER),
    "ours-fast-together-cells": (FAST, {**TOGETHER, "scoring": {"ann_above": 1}}),
    "ours-fast-together-hnsw": (FAST, {**TOGETHER, "scoring": {"ann_above": 1, "ann_index": "hnsw"}}),
    "ours-fast-together-lists": (FAST, {**TOGETHER, "scoring": {"lists": True}}),
}
"""Environment and arguments of the application."""
EMPTY = {"empty": {}, "empty-fast": FAST}
"""Ray Serve and nothing behind it: environment."""
SERVERS = [*OURS, *EMPTY, "numpy", "faiss-flat", "faiss-hnsw"]
COMPARED_USERS = 20


@dataclass
class Cell:
    """One server under one number of clients."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """Per request."""
    failures: int


class Connection(asyncio.Protocol):
    """One client: sends the next request when the last one is answered, and takes the time."""

    def __init__(self, requests: list[bytes], start: int) -> None:
        self.seconds: list[float] = []
        self.failures = 0
        self._requests, self._next = requests, start
        self._answer = bytearray()
        self._transport: asyncio.Transport
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def connection_lost(self, reason: Exception | None) -> None:
        if reason is not None:
            self.failures += 1

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._is_whole():
            self.seconds.append(time.perf_counter() - self._sent)
            self.failures += not self._answer.startswith(b"HTTP/1.1 200")
            self._answer.clear()
            self._ask()

    def _is_whole(self) -> bool:
        head, found, body = bytes(self._answer).partition(b"\r\n\r\n")
        if not found:
            return False
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
        return body.endswith(b"0\r\n\r\n") if length is None else len(body) >= int(length.split(b":")[1])

    def _ask(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._requests[self._next % len(self._requests)])
        self._next += 1

    def close(self) -> None:
        """Ends the connection."""
        self._transport.close()


def requests_of(port: int) -> list[bytes]:
    """As a client sends them, one per user."""
    bodies = [json.dumps({"users": [f"u{row}"], "k": K}).encode() for row in range(NUM_USERS)]
    head = f"POST /v1/recommend HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: "
    return [head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body for body in bodies]


async def load(port: int, clients: int, seconds: float, server: psutil.Process) -> Cell:
    """Asks with so many clients at a time; the first moments do not count."""
    loop, requests = asyncio.get_running_loop(), requests_of(port)
    step = NUM_USERS // clients
    made = [await loop.create_connection(lambda n=n: Connection(requests, n * step), "127.0.0.1", port) for n in range(clients)]
    connections = [protocol for _, protocol in made]
    await asyncio.sleep(WARM_SECONDS)
    for one in connections:
        one.seconds.clear()
    started, cpu = time.perf_counter(), cpu_seconds(server)
    await asyncio.sleep(seconds)
    took, spent = time.perf_counter() - started, cpu_seconds(server) - cpu
    latencies = np.array([latency for one in connections for latency in one.seconds])
    for one in connections:
        one.close()
    if not len(latencies):
        return Cell(0.0, float("nan"), float("nan"), float("nan"), sum(one.failures for one in connections))
    p50, p99 = 1e3 * np.quantile(latencies, (0.5, 0.99))
    count = len(latencies)
    return Cell(count / took, p50, p99, 1e3 * spent / count, sum(one.failures for one in connections))


def cpu_seconds(server: psutil.Process) -> float:
    """CPU time of a process and all below it so far."""
    total = 0.0
    for process in [server, *server.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


@contextmanager
def started(name: str, bundle: Path, args: dict[str, object]) -> Iterator[tuple[int, psutil.Process]]:
    """A server in a process of its own, ready; yields its port and process."""
    port = free_port("127.0.0.1", 0)
    peer = "empty" if name in EMPTY else name
    module = [__spec__.name, "--serve"] if name in OURS else ["tests.benchmarks.serving_peers", peer]
    command = [sys.executable, "-m", *module, str(bundle), str(port)]
    variables, own_args = OURS.get(name, (EMPTY.get(name, {}), {}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables, "BENCHMARK_ARGS": json.dumps({**own_args, **args})}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}")
            if variables:
                time.sleep(3)  # HAProxy reads its configuration several times in the first seconds, and drops connections then
            yield port, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def serve(bundle: str, port: int) -> None:
    """Our endpoint until it is interrupted."""
    args = json.loads(os.environ["BENCHMARK_ARGS"])
    with tempfile.TemporaryDirectory() as folder:
        train = with_lists(bundle, folder) if args.get("scoring", {}).get("lists") else "0" * 16
        values = {"storage_root": folder, "train": train, "model_version": "1", "bundle_dir": bundle, **args}
        config = Path(folder) / "serve.yaml"
        config.write_text(yaml.safe_dump({"applications": [{"import_path": "serving.app:build_app", "args": values}]}))
        try:
            with running_endpoint(config, port=port):
                signal.pause()
        except KeyboardInterrupt:
            return


def with_lists(bundle: str, root: str) -> str:
    """Stores the bundle as a train artifact, has its users ranked as ``cllmr batch`` does, and returns its fingerprint."""
    train = stored_bundle(root, partial(shutil.copytree, bundle)).fingerprint
    batch.run({"train": train, "k": LISTED}, root)
    return train


def answers(port: int) -> list[list[tuple[str, float]]]:
    """Items and scores for some users."""
    found = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        for row in range(COMPARED_USERS):
            answer = http.post("/v1/recommend", json={"users": [f"u{row}"], "k": K}).raise_for_status().json()
            found.append([(item["item_id"], item["score"]) for item in answer["results"][0]["items"]])
    return found


def overlap(found: list[list[tuple[str, float]]], exact: list[list[tuple[str, float]]]) -> float:
    """Share of the exact items that were found."""
    pairs = zip(found, exact, strict=True)
    return statistics.mean(len({item for item, _ in a} & {item for item, _ in b}) / len(b) for a, b in pairs)


def main() -> None:
    """Measures and prints one table per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--servers", nargs="+", default=SERVERS, choices=SERVERS)
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--args", default="{}", help="arguments of our application, JSON")
    asked = parser.parse_args()
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as folder:
        for size in asked.sizes:
            bundle = write_factor_bundle(Path(folder) / str(size), NUM_USERS, size, DIM)
            cells: dict[tuple[str, int], list[Cell]] = {}
            answered: dict[str, list[list[tuple[str, float]]]] = {}
            for number in range(asked.rounds):
                for name in asked.servers[:: 1 if number % 2 == 0 else -1]:
                    with started(name, bundle, json.loads(asked.args)) as (port, process):
                        if name not in EMPTY:
                            answered[name] = answers(port)
                        for clients in asked.clients:
                            cell = asyncio.run(load(port, clients, asked.seconds, process))
                            cells.setdefault((name, clients), []).append(cell)
            console.print(table(size, asked.servers, asked.clients, cells, answered))
    parts = [f"{name} {version(name)}" for name in ("ray", "fastapi", "uvicorn", "numpy")]
    console.print(", ".join([platform.machine(), f"{os.cpu_count()} cores", f"load {os.getloadavg()[2]:.1f}", *parts]))


def table(
    size: int,
    servers: list[str],
    clients: list[int],
    cells: dict[tuple[str, int], list[Cell]],
    answered: dict[str, list[list[tuple[str, float]]]],
) -> Table:
    """Of the rounds of each server and number of clients, the one with most requests per second."""
    result = Table(title=f"{size:,} items, d = {DIM}, top {K}")
    for column in ("server", "clients", "requests/s", "p50 ms", "p99 ms", "CPU ms/request", "failures", "same items"):
        result.add_column(column, justify="left" if column == "server" else "right")
    exact = answered.get("numpy", next(iter(answered.values()), []))
    for name in servers:
        for count in clients:
            rounds = cells[name, count]
            best = max(rounds, key=lambda one: one.requests_per_second)
            figures = (f"{best.requests_per_second:.0f}", f"{best.p50_ms:.2f}", f"{best.p99_ms:.1f}", f"{best.cpu_ms:.2f}")
            failures = str(sum(one.failures for one in rounds))
            same = f"{overlap(answered[name], exact):.3f}" if name in answered else ""
            result.add_row(name, str(count), *figures, failures, same)
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()

"""The endpoint under more load than it can take, under a steady one for long, and under a growing one.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.serving_load overload --server ours-fast-together --items 300000
    OMP_NUM_THREADS=1 python -m tests.benchmarks.serving_load soak --minutes 10
    OMP_NUM_THREADS=1 python -m tests.benchmarks.serving_load scale --server ours-fast-together --items 300000 --rate 280

Requests arrive at a constant rate whether or not earlier ones are answered. Capacity is what 16 clients get that ask one after
another; the calm rate is half of it, the overload three times. `scale` begins with one gateway and allows two: a line every
five seconds says when the second is there and what it changes. Memory is private to the server's process tree (USS), all of
Ray's processes included.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
import numpy as np
import psutil

from tests.benchmarks.serving import NUM_USERS, OURS, K, load, started
from tests.bundles import write_factor_bundle

DIM = 64


async def arrivals(port: int, rate: float, seconds: float) -> list[tuple[str, float]]:
    """How each request ended, and after how many seconds."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:

        async def ask(number: int) -> tuple[str, float]:
            sent = time.perf_counter()
            try:
                body = {"users": [f"u{number % NUM_USERS}"], "k": K}
                async with session.post("/v1/recommend", json=body, timeout=aiohttp.ClientTimeout(30)) as answer:
                    await answer.read()
                    told = str(answer.status)
                    if answer.status == 503 and "Retry-After" not in answer.headers:
                        told = "503 without Retry-After"
            except TimeoutError:
                told = "hung"
            except aiohttp.ClientError as error:
                told = type(error).__name__
            return told, time.perf_counter() - sent

        began, tasks = time.perf_counter(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(number)))
        return list(await asyncio.gather(*tasks))


def grown(server: psutil.Process) -> tuple[float, int]:
    """MiB of private memory and open file descriptors of the process tree."""
    memory, files = 0, 0
    for process in [server, *server.children(recursive=True)]:
        try:
            memory += process.memory_full_info().uss
            files += process.num_fds()
        except psutil.NoSuchProcess:
            continue
    return memory / 2**20, files


def num_gateways(server: psutil.Process) -> int:
    """How many there are in the process tree."""
    found = 0
    for process in server.children(recursive=True):
        try:
            found += "ServeReplica:cllmr:Gateway" in " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found


def told(name: str, rate: float, ended: list[tuple[str, float]], server: psutil.Process) -> None:
    """One line."""
    seconds = [took for status, took in ended if status == "200"]
    p50, p99 = 1e3 * np.quantile(seconds, (0.5, 0.99)) if seconds else (float("nan"), float("nan"))
    memory, files = grown(server)
    counts = dict(Counter(status for status, _ in ended).most_common())
    print(f"{name}: {rate:.0f}/s, {counts}, p50 {p50:.0f} ms, p99 {p99:.0f} ms, {memory:.0f} MiB, {files} files", flush=True)  # noqa: T201


def main() -> None:
    """Measures and prints a line per phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overload", "soak", "scale"])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase of the overload")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second, for scale")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--server", choices=list(OURS), default="ours")
    parser.add_argument("--args", default="{}", help="arguments of the application, JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_factor_bundle(Path(folder) / "bundle", NUM_USERS, asked.items, DIM)
        args = json.loads(asked.args)
        if asked.what == "scale":
            args = {"gateway": {"max_replicas": 2, "max_ongoing_requests": 64}, **args}
        with started(asked.server, bundle, args) as (port, server):
            if asked.what == "scale":
                for window in range(12):
                    rate = asked.rate if window > 1 else asked.rate / 4
                    ended = asyncio.run(arrivals(port, rate, 5.0))
                    told(f"to second {5 * window + 5}, {num_gateways(server)} gateways", rate, ended, server)
                return
            capacity = asyncio.run(load(port, 16, 5.0, server)).requests_per_second
            print(f"capacity: {capacity:.0f}/s", flush=True)  # noqa: T201
            if asked.what == "overload":
                for name, share in (("calm", 0.5), ("overload", 3.0), ("calm again", 0.5)):
                    told(name, share * capacity, asyncio.run(arrivals(port, share * capacity, asked.seconds)), server)
                return
            for minute in range(max(1, round(asked.minutes))):
                ended = asyncio.run(arrivals(port, 0.5 * capacity, 60.0))
                told(f"minute {minute + 1}", 0.5 * capacity, ended, server)


if __name__ == "__main__":
    main()

"""The endpoint under more load than it can take, under a steady one for long, and under a growing one.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.serving_load overload --server ours-fast-together --items 300000 --limits 64 8
    OMP_NUM_THREADS=1 python -m tests.benchmarks.serving_load soak --minutes 10
    OMP_NUM_THREADS=1 python -m tests.benchmarks.serving_load scale --server ours-fast-together --items 300000 --rate 280

Capacity is what 16 clients get who ask one after another, or fewer, as many as the gateway takes on: nobody is refused, so what
is counted are answers. Calm is what two such clients find. Then requests arrive at a constant rate whether or not earlier ones
are answered: three times the capacity in the overload, half of it in the soak. Of the overload are told the answers' times
relative to calm ones, and how many of 100 requests were refused: with the first requests, that find an empty gateway and are
let in in a crowd, and without. `scale` begins with one gateway and allows two: a line every
five seconds says when the second is there and what it changes. Memory is private to the server's process tree (USS), all of
Ray's processes included.
"""

import argparse
import asyncio
import itertools
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
MOST_CLIENTS, CALM_CLIENTS = 16, 2
LATE_SECONDS = 0.5
FOUND_SECONDS = 2
"""After which a gateway has found how many it can take on."""


Ended = list[tuple[str, float]]
"""How each request ended, and after how many seconds."""


def connected(port: int) -> aiohttp.ClientSession:
    """What asks in all phases, so that the asking itself costs the same in all."""
    return aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=aiohttp.TCPConnector(limit=0))


async def ask(session: aiohttp.ClientSession, number: int) -> tuple[str, float]:
    """One request."""
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


async def arrivals(port: int, rate: float, seconds: float) -> Ended:
    """So many requests a second, whatever becomes of them."""
    async with connected(port) as session:
        began, tasks = time.perf_counter(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(session, number)))
        late = time.perf_counter() - began - seconds
        if late > LATE_SECONDS:
            print(f"the clients are {late:.1f} s late: they cannot ask so much, and cause part of the waits", flush=True)  # noqa: T201
        return list(await asyncio.gather(*tasks))


async def in_turn(port: int, clients: int, seconds: float) -> Ended:
    """Clients who each ask again when they are answered."""
    async with connected(port) as session:
        until = time.perf_counter() + seconds

        async def client(first: int) -> Ended:
            ended = []
            for number in itertools.count(first, clients):
                if time.perf_counter() > until:
                    break
                ended.append(await ask(session, number))
            return ended

        return list(itertools.chain(*await asyncio.gather(*(client(first) for first in range(clients)))))


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


def quantiles(ended: Ended) -> tuple[float, float]:
    """p50 and p99 of what was answered, milliseconds."""
    seconds = [took for status, took in ended if status == "200"]
    if not seconds:
        return float("nan"), float("nan")
    p50, p99 = 1e3 * np.quantile(seconds, (0.5, 0.99))
    return float(p50), float(p99)


def told(name: str, ended: Ended, server: psutil.Process, calm: Ended | None = None) -> None:
    """One line; `calm`: what its answers are compared with."""
    (p50, p99), (memory, files) = quantiles(ended), grown(server)
    counts = dict(Counter(status for status, _ in ended).most_common())
    beside = ""
    if calm is not None:
        calm_p50, calm_p99 = quantiles(calm)
        refused = 100 * counts.get("503", 0) / len(ended)
        beside = f" ({p50 / calm_p50:.1f} and {p99 / calm_p99:.1f} times calm), {refused:.0f} % refused"
    print(f"{name}: {counts}, p50 {p50:.0f} ms, p99 {p99:.0f} ms{beside}, {memory:.0f} MiB, {files} files", flush=True)  # noqa: T201


def overload(port: int, limit: int, seconds: float, server: psutil.Process) -> None:
    """Capacity, calm, three times the capacity, calm again."""
    clients = min(MOST_CLIENTS, limit)
    capacity = of_clients_who_are_not_refused(port, clients, server)
    print(f"limit {limit}: {clients} clients, capacity {capacity:.0f}/s", flush=True)  # noqa: T201
    calm = asyncio.run(in_turn(port, CALM_CLIENTS, seconds))
    told("calm", calm, server)
    ended = asyncio.run(arrivals(port, 3 * capacity, seconds))
    told(f"overload, {3 * capacity:.0f}/s", ended, server, calm)
    told(f"... from second {FOUND_SECONDS} on", ended[round(FOUND_SECONDS * 3 * capacity) :], server, calm)
    told("calm again", asyncio.run(in_turn(port, CALM_CLIENTS, seconds)), server, calm)


def of_clients_who_are_not_refused(port: int, clients: int, server: psutil.Process) -> float:
    """Answers a second; a refusal is quick, and would count as capacity."""
    cell = asyncio.run(load(port, clients, 5.0, server))
    if cell.failures:
        raise SystemExit(f"{cell.failures} requests of {clients} clients were not answered: that is no capacity.")
    return cell.requests_per_second


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
    parser.add_argument(
        "--limits", type=int, nargs="+", default=[64], help="of the overload: max_ongoing_requests of a gateway"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_factor_bundle(Path(folder) / "bundle", NUM_USERS, asked.items, DIM)
        args = json.loads(asked.args)
        if asked.what == "overload":
            for limit in asked.limits:
                limited = {**args, "gateway": {**args.get("gateway", {}), "max_ongoing_requests": limit}}
                with started(asked.server, bundle, limited) as (port, server):
                    overload(port, limit, asked.seconds, server)
            return
        if asked.what == "scale":
            args = {"gateway": {"max_replicas": 2, "max_ongoing_requests": 64}, **args}
        with started(asked.server, bundle, args) as (port, server):
            if asked.what == "scale":
                for window in range(12):
                    rate = asked.rate if window > 1 else asked.rate / 4
                    ended = asyncio.run(arrivals(port, rate, 5.0))
                    told(f"to second {5 * window + 5}, {num_gateways(server)} gateways, {rate:.0f}/s", ended, server)
                return
            rate = of_clients_who_are_not_refused(port, MOST_CLIENTS, server) / 2
            for minute in range(max(1, round(asked.minutes))):
                told(f"minute {minute + 1}, {rate:.0f}/s", asyncio.run(arrivals(port, rate, 60.0)), server)


if __name__ == "__main__":
    main()

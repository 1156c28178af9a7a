"""What a request's look-up in the feature store costs: the history alone, with the user's side-information embedding beside it,
and the two look-ups (history, events since) one after the other and at once.

    python -m tests.benchmarks.serving_features --storage .cllmr [--online-store redis]

The storage root is that of a run, whose latest feature set is built again elsewhere; Redis is the one in CLLMR_ONLINE_STORE.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.artifacts import Store
from components.features.stage import run
from feature_repo.store import open_store
from serving.events import OnlineHistory, open_history
from serving.features import HISTORY, JOIN_KEY, Histories, OnlineFeatures, open_history_reader
from serving.schemas import Event

EMBEDDING = "user_side_information:embedding"
ROUNDS, LOOK_UPS = 7, 200


def cpu_ms(look_up: Callable[[str], object], users: list[str]) -> float:
    """CPU milliseconds of this process per look-up."""
    started = time.process_time()
    for user in users:
        look_up(user)
    return 1000 * (time.process_time() - started) / len(users)


async def wall_ms(sources: list[OnlineFeatures], users: list[str], at_once: bool) -> float:
    """Milliseconds that one request waits for all sources."""
    started = time.perf_counter()
    for user in users:
        if at_once:
            await asyncio.gather(*(source.histories([user]) for source in sources))
        else:
            for source in sources:
                await source.histories([user])
    return 1000 * (time.perf_counter() - started) / len(users)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default=".cllmr")
    parser.add_argument("--online-store", default="sqlite", choices=("sqlite", "redis"))
    asked = parser.parse_args()
    known = Store(str(Path(asked.storage).absolute()))
    latest = known.outputs("features")[-1]
    parents: dict[str, Any] = {name: known.find(name, latest.parents[name]) for name in ("ingest", "sideinfo", "spectrum")}
    with tempfile.TemporaryDirectory() as root:
        features = run({"online_store": asked.online_store}, root, **parents)
        store = open_store(features.path(), root)
        users = pq.read_table(features.path() / "entities" / "users.parquet", columns=[JOIN_KEY])[JOIN_KEY].to_pylist()
        users = (users * LOOK_UPS)[:LOOK_UPS]
        history: OnlineHistory = open_history(root, features.fingerprint)
        now = int(time.time())
        history.write([Event(user_id=user, item_id=str(n), timestamp=now - n) for user in set(users) for n in range(5)])

        def ask(*names: str) -> Callable[[str], object]:
            return lambda user: store.get_online_features(features=list(names), entity_rows=[{JOIN_KEY: user}]).to_dict()

        alone, both = list[float](), list[float]()
        waits: dict[bool, list[float]] = {False: [], True: []}
        sources = [
            OnlineFeatures(lambda: open_history_reader(root, features.fingerprint), 5.0),
            OnlineFeatures(lambda: lambda user_ids: Histories(history.read(user_ids)), 5.0),
        ]
        for source in sources:
            source.wait(60)
        for _ in range(ROUNDS):  # in turn, so that other work on the machine meets all alike
            alone.append(cpu_ms(ask(HISTORY), users))
            both.append(cpu_ms(ask(HISTORY, EMBEDDING), users))
            for at_once, found in waits.items():
                found.append(asyncio.run(wall_ms(sources, users, at_once)))
        for source in sources:
            source.close()
    told = [
        f"{asked.online_store}, median of {ROUNDS} times {LOOK_UPS} look-ups:",
        f"CPU ms: history {statistics.median(alone):.2f}, with the embedding {statistics.median(both):.2f}",
        f"wait ms: one after the other {statistics.median(waits[False]):.2f}, at once {statistics.median(waits[True]):.2f}",
    ]
    sys.stdout.write("\n".join(told) + "\n")


if __name__ == "__main__":
    main()

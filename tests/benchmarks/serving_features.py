"""What a request's look-up in the feature store costs: of a history alone, and of all that a request is answered with, by two
look-ups at once (history and side information, events since), one for each Feast project, and by one for both.

    python -m tests.benchmarks.serving_features --storage .cllmr [--online-store redis]

The storage root is that of a run, whose latest feature set is built again elsewhere; Redis is the one in CLLMR_ONLINE_STORE.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.artifacts import Store
from components.features.stage import run
from feature_repo.store import open_store
from serving.events import OnlineHistory, open_history
from serving.feature_set import JOIN_KEY
from serving.features import HISTORY, INTRODUCTION, ITEM_IDS, SIDE_INFORMATION, Histories, OnlineFeatures, open_history_reader
from serving.schemas import Event

OWN = [f"{HISTORY}:{ITEM_IDS}", f"{SIDE_INFORMATION}:{INTRODUCTION}"]
ROUNDS, LOOK_UPS = 7, 200


def cpu_ms(look_up: Callable[[list[str]], object], users: list[str]) -> float:
    """CPU milliseconds of this process per look-up."""
    started = time.process_time()
    for user in users:
        look_up([user])
    return 1000 * (time.process_time() - started) / len(users)


async def wall_ms(sources: list[OnlineFeatures], users: list[str]) -> float:
    """Milliseconds that one request waits for all sources, asked at once."""
    started = time.perf_counter()
    for user in users:
        await asyncio.gather(*(source.histories([user]) for source in sources))
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
        events: OnlineHistory = open_history(root, features.fingerprint)
        now = int(time.time())
        events.write([Event(user_id=user, item_id=str(n), timestamp=now - n) for user in set(users) for n in range(5)])

        def by_feast(wanted: list[str]) -> Callable[[Sequence[str]], Histories]:
            def read(user_ids: Sequence[str]) -> Histories:
                rows = [{JOIN_KEY: user_id} for user_id in user_ids]
                return Histories(store.get_online_features(features=wanted, entity_rows=rows).to_dict()[ITEM_IDS])

            return read

        jointly = open_history_reader(root, features.fingerprint)
        readers: dict[str, list[Callable[[Sequence[str]], Histories]]] = {
            "history alone": [by_feast(OWN[:1])],
            "two look-ups": [by_feast(OWN), lambda user_ids: Histories(events.read(user_ids))],
            "one look-up": [jointly],
        }
        sources = {
            name: [OnlineFeatures(lambda reader=reader: reader, 5.0) for reader in own]  # type: ignore[misc]
            for name, own in readers.items()
        }
        for one in (source for own in sources.values() for source in own):
            one.wait(60)
        cpu, wait = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        for _ in range(ROUNDS):  # in turn, so that other work on the machine meets all alike
            for name, own in readers.items():
                cpu[name].append(sum(cpu_ms(reader, users) for reader in own))
                wait[name].append(asyncio.run(wall_ms(sources[name], users)))
        for one in (source for own in sources.values() for source in own):
            one.close()
    told = [f"{asked.online_store}, median of {ROUNDS} times {LOOK_UPS} look-ups, ms:"] + [
        f"{name}: CPU {statistics.median(cpu[name]):.2f}, wait {statistics.median(wait[name]):.2f}" for name in readers
    ]
    sys.stdout.write("\n".join(told) + "\n")


if __name__ == "__main__":
    main()

"""What a replica needs for a large catalogue, by how item vectors are stored: memory, loading, scoring, and what is lost.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.serving_memory --items 1000000 --dim 128

Each storage is loaded in a process of its own. Private is what only this process has once loaded, and at most while it loads;
peak is the largest resident memory, which includes pages of the model's file while it is read: the kernel takes these back when
memory is short. CPU times are the least of some repetitions.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from serving.approximate import prepare
from serving.recommender import Recommender
from serving.schemas import RecommendRequest
from serving.scorer import Scorer
from serving.settings import Scoring
from tests.bundles import write_factor_bundle

STORAGES = ("float32", "float16", "int8")
REPEATS = 3


def cpu_ms(work: Callable[[], object]) -> float:
    """Least CPU time of some repetitions."""
    spent = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return 1e3 * min(spent)


def memory_mib(field: str) -> float:
    """Of this process, as the kernel says it. The peak of getrusage is no use here: a child's begins with its parent's."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, f"no {field} in /proc/self/status"
    return int(found[1]) / 1024


@contextmanager
def most_private_mib() -> Iterator[Callable[[], float]]:
    """The largest anonymous memory of this process that was seen in the block."""
    most, stop = memory_mib("RssAnon"), threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.02):
            most = max(most, memory_mib("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most
    finally:
        stop.set()
        thread.join()


def measure(bundle: Path, storage: Any) -> dict[str, Any]:
    """Of this process."""
    started = time.process_time()
    with most_private_mib() as most_private:
        scorer = Scorer.load(bundle, storage)
        scorer.replay_golden()
    loading = time.process_time() - started
    gc.collect()
    private = psutil.Process().memory_full_info().uss
    peak_mib = memory_mib("VmHWM")
    recommender = Recommender(scorer, "1")
    asked = [RecommendRequest(users=[f"u{row}" for row in range(count)], k=20) for count in (1, 16)]
    one, sixteen = (cpu_ms(lambda ask=ask: recommender.recommend(ask, [[]] * len(ask.users))) for ask in asked)
    _, exactness = prepare(scorer, Scoring(item_storage=storage), bundle)
    return {
        "private_mib": private / 2**20,
        "most_private_mib": most_private(),
        "peak_mib": peak_mib,
        "loading_s": loading,
        "one_ms": one,
        "sixteen_ms": sixteen / 16,
        **exactness.model_dump(),
    }


def main() -> None:
    """Measures every storage and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--storages", nargs="+", default=list(STORAGES))
    asked = parser.parse_args()
    table = Table(title=f"{asked.items:,} items, d = {asked.dim}")
    for column in (
        "stored",
        "private MiB",
        "at most",
        "peak MiB",
        "load CPU s",
        "1 user, CPU ms",
        "16 users, each",
        "overlap@20",
        "NDCG@20",
    ):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_factor_bundle(Path(folder) / "bundle", 1_000, asked.items, asked.dim)
        for storage in asked.storages:
            command = [sys.executable, "-m", __spec__.name, "--measure", str(bundle), storage]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            whole = [f"{found[name]:.0f}" for name in ("private_mib", "most_private_mib", "peak_mib")]
            times = [f"{found[name]:.1f}" for name in ("loading_s", "one_ms", "sixteen_ms")]
            lost = [f"{found[name]:.4f}" if found[name] is not None else "" for name in ("storage_overlap", "storage_ndcg")]
            table.add_row(storage, *whole, *times, *lost)
    Console(width=130).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        sys.stdout.write(json.dumps(measure(Path(sys.argv[2]), sys.argv[3])))
    else:
        main()

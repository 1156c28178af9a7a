"""How the sideinfo stage's memory grows with rows: ``python -m tests.benchmarks.sideinfo_memory --items 25000 100000``.

Makes a data set of that many items and users, runs the stage on it in a process of its own, and prints that process's largest
resident memory beyond what it had after its imports, the seconds it took and its output's size. The text encoder is a stand-in
(its memory does not depend on rows); backend 'openai' asks the server of the tests.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tests.llm_server import WORDS, llm_server
from tests.sideinfo_parents import Small, write_ingest

CLICKS = 10
"""Training interactions of a user."""

_RUN = """
import json, sys, time
import numpy as np
import pyarrow.dataset
from components.artifacts import Manifest
from components.sideinfo import encoder, llm, metadata, openai, report, stage
from tests.benchmarks.sideinfo_memory import Encoder, resident
encoder.load = lambda name, truncate_dim: Encoder()
ingest = Manifest.read(sys.argv[1])
before, started = resident("VmRSS"), time.monotonic()
done = stage.run(json.loads(sys.argv[3]), sys.argv[2], ingest=ingest)
size = sum(path.stat().st_size for path in done.path().iterdir())
print(json.dumps([resident("VmHWM") - before, time.monotonic() - started, size]))
"""
_MAKE = "import sys; from tests.benchmarks.sideinfo_memory import make; make(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"


class Encoder:
    """A vector per text of the default encoder's length, at no cost."""

    def get_embedding_dimension(self) -> int:
        """As the default encoder."""
        return 384

    def encode(self, texts: list[str], **_: object) -> np.ndarray:
        """One that depends on the text's length alone."""
        return np.outer(np.array([1.0 + len(text) for text in texts], np.float32), np.ones(384, np.float32))


@dataclass(frozen=True)
class Used:
    """What a run took."""

    mib: float
    """Largest resident memory beyond what the process had before, MiB."""
    seconds: float
    output_mib: float


def resident(name: str) -> int:
    """A line of this process's status, bytes; VmHWM is its own largest memory, where getrusage's begins with its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def make(root: str, items: int, users: int) -> None:
    """An ingest output: items with title, two genres and a description of 600 characters; every user has `CLICKS`."""
    rng = np.random.default_rng(0)
    words = np.array([*WORDS, *(f"{one[:4]}{other[-3:]}" for one in WORDS for other in WORDS)])
    texts = {
        "title": [f"Film {row}" for row in range(items)],
        "genres": [", ".join(sorted(rng.choice(words[:28], 2, replace=False))) for _ in range(items)],
        "plot": [f"Part {row} of {' '.join(rng.choice(words, 85))}." for row in range(items)],
    }
    clicks = ((user, int(item)) for user in range(users) for item in rng.choice(items, CLICKS, replace=False))
    world = Small("films", tuple((user, item, "train") for user, item in clicks), texts, num_users=users)
    write_ingest(root, world).write(Path(root) / "ingest.json")


def used(items: int, users: int, backend: str, **settings: Any) -> Used:
    """Memory and time of the stage on so many rows."""
    with ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory())
        _python(_MAKE, root, str(items), str(users))
        config: dict[str, Any] = {"backend": backend, **settings}
        if backend == "openai":
            server = stack.enter_context(llm_server())
            config |= {"model": "tiny", "base_url": server.base_url, "tags": []}
        told = _python(_RUN, f"{root}/ingest.json", root, json.dumps(config))
        memory, seconds, size = json.loads(told.splitlines()[-1])
        return Used(memory / 2**20, seconds, size / 2**20)


def _python(code: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "CLLMR_EVENTS": os.devnull}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for every number of items."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[25_000, 100_000])
    parser.add_argument("--users", type=float, default=1.0, help="users for each item")
    parser.add_argument("--backend", choices=["metadata", "openai"], default="metadata")
    asked = parser.parse_args(arguments)
    console = Console(width=140)
    for items in asked.items:
        found = used(items, int(items * asked.users), asked.backend)
        told = f"{found.mib:.0f} MiB at most beyond the imports, {found.seconds:.0f} s; output {found.output_mib:.0f} MiB"
        console.print(f"{asked.backend}, {items} items, {int(items * asked.users)} users: {told}")


if __name__ == "__main__":
    main()

"""Makes the answers that come with the platform of a run's: ``python -m tests.benchmarks.sample_answers STORAGE_ROOT``.

The run is ``cllmr run --until sideinfo --preset smollm2`` with a server, as the preset says. One shard per prompt, in the
order of the keys; what was there before is replaced.
"""

import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq

from components.sideinfo.backends import Answer
from components.sideinfo.cache import DIRECTORY, AnswerCache
from components.sideinfo.config import SAMPLE_ROOT

OF_A_SHARD = ("answers", "sha256", "created_at")


def main() -> None:
    """Copies all committed shards."""
    spaces: dict[str, dict[str, Answer]] = {}
    about: dict[str, dict[str, object]] = {}
    for marker in sorted((Path(sys.argv[1]) / DIRECTORY).glob("*/*.json")):
        space = marker.parent.name
        about[space] = {name: value for name, value in json.loads(marker.read_text()).items() if name not in OF_A_SHARD}
        for row in pq.read_table(marker.with_suffix(".parquet")).to_pylist():
            spaces.setdefault(space, {}).setdefault(row["key"], Answer(**row))
    shutil.rmtree(SAMPLE_ROOT, ignore_errors=True)
    cache = AnswerCache(str(SAMPLE_ROOT), writable=True)
    for space, answers in spaces.items():
        cache.add(space, about[space], [answers[key] for key in sorted(answers)])
        sys.stdout.write(f"{about[space]['prompt']}: {len(answers)}\n")


if __name__ == "__main__":
    main()

"""The result table over several seeds: ``python -m tests.benchmarks.seeds --seeds 5 [--preset local] [--storage DIR]``.

Runs the pipeline up to evaluate once per training seed (same data, same split, same baselines) and prints mean and standard
deviation of every row, and what the users would get as if they were new. Minutes per seed, so it is not part of the tests.
"""

import argparse
import platform
import statistics
from datetime import date
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

from components.artifacts import read_json
from components.evaluate.config import LABELS
from components.train.config import TrainConfig
from pipelines import config, local
from pipelines.display import make_display
from pipelines.plan import compile_pipeline
from pipelines.retraining import retraining

METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")


def main() -> None:
    """Runs all seeds and prints the table as Markdown rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="local")
    parser.add_argument("--storage", default=".cllmr")
    parser.add_argument("--set", action="append", default=[], help="a setting, as of `cllmr run`")
    asked = parser.parse_args()
    console = Console(width=140)
    first = TrainConfig().seed
    found = []
    for seed in range(first, first + asked.seeds):
        settings = config.load(asked.preset, [], [*asked.set, f"storage_root={asked.storage}", f"train.seed={seed}"])
        run = local.run(
            compile_pipeline(retraining(settings)),
            settings.storage_root,
            lambda stages: make_display(console, stages),
            until="evaluate",
        )
        figures = read_json(run.manifest("evaluate").path() / "metrics.json")
        found.append(figures)
        console.print({name: run.manifest(name).seconds for name in run.stages}, "λ", figures["debias_strength"])
    table = Table("model", *METRICS, "ARP@10", "coverage@10", title=f"{asked.seeds} seeds, mean ± standard deviation")
    for name in LABELS:  # JSON does not keep the order
        if name not in found[0]["results"]:
            continue
        cells = [_spread([one["results"][name][metric]["mean"] for one in found]) for metric in METRICS]
        exposure = [one["bias"]["exposure"][name] for one in found]
        cells.append(_spread([one["average_popularity"] for one in exposure], 1))
        cells.append(_spread([one["coverage"] for one in exposure], 2))
        table.add_row(found[0]["labels"][name], *cells)
    console.print(table)
    for name, figures in found[0]["new_users"].items():
        told = ", ".join(f"{metric} {_spread([one['new_users'][name][metric] for one in found])}" for metric in figures)
        console.print(f"known users as if they were new, {name}: {told}")
    console.print("λ per seed:", [one["debias_strength"] for one in found])
    console.print("effective rank of z, users and items:", [one["effective_rank"] for one in found])
    console.print(
        f"dim {found[0]['embedding_dim']}, {date.today()}, {platform.machine()}, torch {version('torch')}, ray {version('ray')}"
    )


def _spread(values: list[float], digits: int = 4) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and statistics.stdev(values) > 0 else mean


if __name__ == "__main__":
    main()

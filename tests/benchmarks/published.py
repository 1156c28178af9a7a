"""Backbones under RLMRec's settings on RLMRec's own splits, beside the published test numbers (d = 32).

    OMP_NUM_THREADS=1 python -m tests.benchmarks.published --backbone lightgcn --dataset rlmrec-amazon --seeds 5
    OMP_NUM_THREADS=1 python -m tests.benchmarks.published --backbone lightgcn --dataset rlmrec-yelp --first 2025 --seeds 1

The data lie in $CLLMR_BENCHMARK_DATA. Settings are those of the published grid searches: Adam 1e-3, batch 4096 pairs, BPR (but
for AutoCF, which has its own loss), validation every 3 epochs, at most 5 without a better Recall@20. Published: Ren et al.,
WWW 2024, table 1, mean of 5 runs.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from components.cllmr.model import CLLMR
from components.evaluate.metrics import METRICS, rank
from components.experiment import dataset
from components.experiment.dataset import ExperimentData
from components.train.config import TrainConfig
from components.train.loop import SingleProcess, TrainData, fit

AUTOCF = {"loss": "softmax", "similarity": "inner_product", "temperature": 1.0, "num_negatives": 20_000}
"""Its ranking loss is a softmax over all items."""
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "rlmrec-amazon": {
        "gccf": {"num_layers": 2, "l2_weight": 1e-6, "edge_keep": 1.0},
        "lightgcn": {"num_layers": 3, "l2_weight": 1e-6, "edge_keep": 0.8},
        "sgl": {"num_layers": 3, "l2_weight": 1e-5, "ssl_weight": 0.1, "ssl_temperature": 0.2},
        "simgcl": {"num_layers": 3, "l2_weight": 1e-5, "ssl_weight": 0.1, "ssl_temperature": 0.2, "ssl_noise": 0.9},
        "dccf": {"num_layers": 2, "l2_weight": 1e-4, "ssl_weight": 1e-3, "ssl_temperature": 0.1},
        "autocf": {"num_layers": 2, "l2_weight": 1e-6, "ssl_weight": 5.0, **AUTOCF},
    },
    "rlmrec-yelp": {
        "gccf": {"num_layers": 2, "l2_weight": 1e-6, "edge_keep": 1.0},
        "lightgcn": {"num_layers": 3, "l2_weight": 1e-6, "edge_keep": 0.8},
        "sgl": {"num_layers": 3, "l2_weight": 1e-6, "ssl_weight": 1e-3, "ssl_temperature": 0.1},
        "simgcl": {"num_layers": 3, "l2_weight": 1e-5, "ssl_weight": 0.1, "ssl_temperature": 0.2, "ssl_noise": 0.9},
        "dccf": {"num_layers": 2, "l2_weight": 1e-4, "ssl_weight": 1e-3, "ssl_temperature": 0.1},
        "autocf": {"num_layers": 3, "l2_weight": 1e-7, "ssl_weight": 2.0, **AUTOCF},
    },
}
PUBLISHED = {
    "rlmrec-amazon": {
        "gccf": (0.0537, 0.0872, 0.1343, 0.0537, 0.0653, 0.0807),
        "lightgcn": (0.0570, 0.0915, 0.1411, 0.0574, 0.0694, 0.0856),
        "sgl": (0.0637, 0.0994, 0.1473, 0.0632, 0.0756, 0.0913),
        "simgcl": (0.0618, 0.0992, 0.1512, 0.0619, 0.0749, 0.0919),
        "dccf": (0.0662, 0.1019, 0.1517, 0.0658, 0.0780, 0.0943),
        "autocf": (0.0689, 0.1055, 0.1536, 0.0705, 0.0828, 0.0984),
    },
    "rlmrec-yelp": {
        "gccf": (0.0390, 0.0652, 0.1084, 0.0451, 0.0534, 0.0680),
        "lightgcn": (0.0421, 0.0706, 0.1157, 0.0491, 0.0580, 0.0733),
        "sgl": (0.0432, 0.0722, 0.1197, 0.0501, 0.0592, 0.0753),
        "simgcl": (0.0467, 0.0772, 0.1254, 0.0546, 0.0638, 0.0801),
        "dccf": (0.0468, 0.0778, 0.1249, 0.0543, 0.0640, 0.0800),
        "autocf": (0.0469, 0.0789, 0.1280, 0.0547, 0.0647, 0.0813),
    },
}
"""Recall@5, @10, @20, NDCG@5, @10, @20: the order of `METRICS`."""


def config_of(backbone: str, seed: int, settings: dict[str, Any]) -> TrainConfig:
    """How a backbone is trained as published, with `settings` of the model."""
    model: dict[str, Any] = {
        "backbone": backbone,
        "loss": "bpr",
        "embedding_dim": 32,
        "side_encoder": "none",
        "layer_combination": "sum",
    }
    model["embedding_std"] = 0.01  # of Xavier's uniform distribution for a table of that size
    return TrainConfig.parse(
        {
            "model": {**model, **settings},
            "learning_rate": 1e-3,
            "batch_size": 4096,
            "max_epochs": 600,
            "evaluate_every": 3,
            "patience": 5,
            "seed": seed,
        },
        "train",
    )


def run(name: str, backbone: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Test metrics, epochs and CPU seconds of one seed."""
    data = dataset.read(Path(os.environ["CLLMR_BENCHMARK_DATA"]) / name)
    config = config_of(backbone, seed, settings)
    start = time.process_time()
    trained, state = fit(TrainData(data.train, data.validation, None), config, SingleProcess())
    seconds = time.process_time() - start
    found = tested(trained, data)
    return {**found, "best_epoch": state.best_epoch, "cpu_seconds": round(seconds, 1)}


def tested(model: CLLMR, data: ExperimentData) -> dict[str, float]:
    """Metrics of a model on the test interactions."""
    users, items = model.representations().mediator
    return rank(lambda rows: (users[torch.from_numpy(rows)] @ items.T).numpy(), data.train, data.test).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=sorted(SETTINGS["rlmrec-amazon"]), default="lightgcn")
    parser.add_argument("--dataset", choices=sorted(SETTINGS), default="rlmrec-amazon")
    parser.add_argument("--seeds", type=int, default=5, help="how many, one after the other")
    parser.add_argument("--first", type=int, default=2023, metavar="SEED", help="the first of them: seeds can be run in parts")
    parser.add_argument("--set", default="{}", help="further settings of the model as JSON, for example '{\"ssl_noise\": 0.5}'")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    settings = {**SETTINGS[asked.dataset][asked.backbone], **json.loads(asked.set)}
    found = []
    for seed in range(asked.first, asked.first + asked.seeds):
        found.append(run(asked.dataset, asked.backbone, seed, settings))
        print(asked.dataset, asked.backbone, seed, {name: round(value, 4) for name, value in found[-1].items()}, flush=True)  # noqa: T201
    for metric, published in zip(METRICS, PUBLISHED[asked.dataset][asked.backbone], strict=True):
        mean = statistics.mean(one[metric] for one in found)
        print(f"{metric:10} {mean:.4f}  published {published:.4f}  {mean / published - 1:+.1%}")  # noqa: T201


if __name__ == "__main__":
    main()

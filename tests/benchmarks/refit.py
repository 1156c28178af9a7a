"""What it is worth to fit the recipe once more to all interactions.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.refit --dataset DIR --seeds 3

What has been chosen by the validation interactions is fitted again to them and the training interactions together, and both
models are asked for the test interactions, neither for what is known by then. What is served has learned from the test
interactions too, so nothing can measure it; this is the same step, one part of the data earlier.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from rich.console import Console

from components.cllmr.linear.ease import centred_unit_rows
from components.cllmr.linear.scores import LinearScores, mixed
from components.evaluate.metrics import PRIMARY, rank
from components.experiment import dataset
from components.experiment.dataset import ExperimentData
from components.sideinfo.config import DEFAULT_ENCODER
from components.spectrum.decompose import spectrum
from components.train.config import TrainConfig
from components.train.graph import trained_here
from components.train.members import RecipeData
from components.train.recipe import fit_again, fit_recipe
from components.train.strength import choose_strength, strength_curve


def recipe_data(data: ExperimentData) -> RecipeData:
    """The data as the train stage would get them."""
    assert data.item_text is not None
    user_text, item_text = (centred_unit_rows(rows) for rows in (data.user_text, data.item_text))
    found = spectrum(data.train, min(64, *data.train.shape))
    places = (rows.astype(np.float32) for rows in (found.users, found.items))
    return RecipeData(data.train, data.validation, user_text, item_text, *places)


def main() -> None:
    """Fits and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="as for cllmr experiment")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(".cllmr/experiments"), help="where embeddings are kept")
    asked = parser.parse_args()
    console, gains = Console(width=160), []
    data = dataset.read(asked.dataset).embedded(DEFAULT_ENCODER, asked.work / "embeddings")
    before = recipe_data(data)
    known = sp.csr_array(data.train + data.validation)
    after = replace(before, train=known, validation=sp.csr_array(known.shape, dtype=np.float32))

    def tested(model: LinearScores) -> float:
        return rank(model.score, known, data.test).mean()[PRIMARY]

    for seed in range(2024, 2024 + asked.seeds):
        config = TrainConfig.parse({"seed": seed, "num_workers": 1}, "train")
        start = time.process_time()
        first = fit_recipe(before, config, trained_here())
        curve = strength_curve(first.factual, first.counterfactual, data.train, data.validation, config.debias_grid)
        strength = choose_strength(curve, config.debias_tolerance)
        middle = time.process_time()
        again = fit_again(first.choices, after, config, trained_here())
        seconds = middle - start, time.process_time() - middle
        values = [tested(mixed(found.factual, found.counterfactual, strength)) for found in (first, again)]
        gains.append(values[1] / values[0] - 1)
        told, took = (" -> ".join(f"{value:.4f}" for value in values), " + ".join(f"{value:.0f}" for value in seconds))
        console.print(f"{data.name} seed {seed}: {PRIMARY} {told} ({gains[-1]:+.1%}), λ {strength:g}, CPU s {took}")
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    console.print(f"{data.name}: {statistics.mean(gains):+.1%} ± {spread:.1%}")


if __name__ == "__main__":
    main()

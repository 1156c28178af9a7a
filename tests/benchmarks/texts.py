"""What a side information is worth: ``python -m tests.benchmarks.texts --ingest DIR --text NAME=DIR --text NAME=DIR``.

``--ingest`` is an ingest output, each DIR an output of the stage sideinfo on it; "none" is always among them. Fits the default
recipe on the same split with each, members tuned on validation anew, and prints NDCG@10 over the seeds and what each member has
on validation. Without its graph member (``--graph`` takes it in), whose training takes minutes. ``--effect`` is a setting
of the train stage; "exposure" is the correlation of an item's places in the top tens with how much of its text the LLM writes
anyway, where it wrote references.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file

from components.cllmr.effects.base import centred
from components.cllmr.effects.reference_texts import share_written_anyway
from components.cllmr.linear.ease import centred_unit_rows
from components.cllmr.linear.scores import LinearScores, mixed
from components.evaluate.bias import correlation, exposure
from components.evaluate.metrics import PRIMARY, rank
from components.ids import TEST, TRAIN, VALIDATION
from components.ingest.dataset import Dataset
from components.sideinfo.reader import reference_embeddings
from components.spectrum.decompose import spectrum
from components.train.config import MEMBERS, TrainConfig
from components.train.graph import trained_here
from components.train.members import RecipeData
from components.train.recipe import FittedRecipe, fit_recipe
from components.train.strength import choose_strength


def recipe_data(dataset: Dataset, sideinfo: Path | None, rank_: int = 64) -> RecipeData:
    """The data as the train stage gets them; without text for None."""
    train = dataset.matrix(TRAIN)
    written = None if sideinfo is None else reference_embeddings(sideinfo, "item")
    if sideinfo is None:
        raw = [np.zeros((count, 384), np.float32) for count in train.shape]
    else:
        found = load_file(sideinfo / "embeddings.safetensors")
        raw = [found[side].astype(np.float32) for side in ("users", "items")]
    spectra = spectrum(train, rank_)
    places = [rows.astype(np.float32) for rows in (spectra.users, spectra.items)]
    references = None if written is None else centred(written, around=raw[1]).astype(np.float32)
    return RecipeData(train, dataset.matrix(VALIDATION), *map(centred_unit_rows, raw), *places, references)


def served(found: FittedRecipe, data: RecipeData, config: TrainConfig) -> tuple[float, float, LinearScores]:
    """Debias strength, validation NDCG@10 and the served scores."""
    at = partial(mixed, found.factual, found.counterfactual)
    curve = [{"debias": strength, PRIMARY: data.validation_ndcg(at(strength))} for strength in config.debias_grid]
    chosen = choose_strength(curve, config.debias_tolerance)
    return chosen, data.validation_ndcg(at(chosen)), at(chosen)


def main() -> None:
    """Fits and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ingest", type=Path, required=True)
    parser.add_argument("--text", action="append", default=[], help="NAME=DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--effect", default="counterfactual_log")
    asked = parser.parse_args()
    console = Console(width=160)
    dataset = Dataset.load(asked.ingest)
    test = dataset.matrix(TEST)
    texts: dict[str, Path | None] = {"none": None} | {
        name: Path(directory) for name, _, directory in (text.partition("=") for text in asked.text)
    }
    members = MEMBERS if asked.graph else tuple(name for name in MEMBERS if name != "graph")
    for name, directory in texts.items():
        data, chosen, rows = recipe_data(dataset, directory), None, []
        for seed in range(2024, 2024 + asked.seeds):
            effect = asked.effect if data.item_references is not None or asked.effect != "reference_texts" else "none"
            settings = {"seed": seed, "num_workers": 1, "recipe": {"members": members}, "effect": effect}
            config = TrainConfig.parse(settings, "train")
            found = fit_recipe(data, config, trained_here(), chosen)
            chosen = found.settings
            strength, validation, scores = served(found, data, config)
            models = {"factual": found.factual, "debiased": scores}
            rankings = {key: rank(model.score, data.train, test) for key, model in models.items()}
            figures = {"validation": validation} | {key: ranking.mean()[PRIMARY] for key, ranking in rankings.items()}
            if data.item_references is not None:
                anyway = share_written_anyway(data.item_text, data.item_references)
                for key, ranking in rankings.items():
                    shown = exposure(ranking.top_items[:, :10], len(anyway))
                    figures[f"exposure, {key}"] = correlation(shown, anyway) or 0.0
            rows.append(figures)
            alone = {member: round(value, 4) for member, value in found.validation.items()}
            told = {key: round(value, 4) for key, value in figures.items()}
            console.print(name, "seed", seed, told, "λ", strength, "alone on validation:", alone)
        for key in rows[0]:
            values = [row[key] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            console.print(f"{name}: {key} {statistics.mean(values):.4f} ± {spread:.4f}")


if __name__ == "__main__":
    main()

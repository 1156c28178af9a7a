"""The train stage: features through Feast in, model bundle out."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.artifacts import Manifest, Store, write_json
from components.errors import ArtifactError
from components.evaluate.metrics import PRIMARY as METRIC
from components.ids import ITEM_ID, TITLE, TRAIN, USER_ID, VALIDATION
from components.progress import emit
from components.stages import Stage, fingerprint, run_stage
from components.train.config import TrainConfig

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from components.cllmr.linear.kernel import NewItems
    from components.cllmr.linear.scores import LinearScores
    from components.features.reader import TrainingFeatures
    from components.ingest.dataset import Dataset
    from components.train.members import FloatMatrix, RecipeData
    from components.train.recipe import FittedRecipe
    from components.train.workers import Place

STAGE = Stage("train", version=17)


def run(config: dict[str, Any], storage_root: str, ingest: Manifest, features: Manifest) -> Manifest:
    """Fits the recipe and writes `bundle/`, curve.json, training.json, side_representations.safetensors, and what a later
    training can begin with (`components.train.warm`). Which output this one begins with has been decided before.

    With `refit`, `bundle/` has learned from all interactions, and `evaluated/` is the bundle without those that are held out,
    by which all was chosen; the other files are of that one.

    A killed run leaves the graph models' checkpoints; the same call goes on from them and ends with the same bundle.
    """
    settings = TrainConfig.parse(config, STAGE.name)
    parents = {"ingest": ingest, "features": features}
    name = fingerprint(STAGE, settings.identity(), {parent: manifest.fingerprint for parent, manifest in parents.items()})
    store = Store(storage_root)

    def build(out: Path) -> dict[str, Any]:
        return _build(out, settings, storage_root, ingest, features, name, store.work(STAGE.name, name))

    manifest = run_stage(STAGE, settings, storage_root, parents, build)
    store.remove_work(STAGE.name, name)  # only now: until the output is committed, the checkpoints are all there is
    return manifest


def _build(
    out: Path, config: TrainConfig, storage_root: str, ingest: Manifest, features: Manifest, name: str, work: "Place"
) -> dict[str, Any]:
    from safetensors.numpy import save_file

    from components.features.reader import training_features
    from components.ingest.dataset import Dataset
    from components.local_ray import ray_session
    from components.train import warm
    from components.train.attributes import attributes_of
    from components.train.recipe import fit_again, fit_recipe
    from serving.bundle import BUNDLE_DIRECTORY, EVALUATED_DIRECTORY

    dataset = Dataset.load(ingest.path())
    attributes = attributes_of(dataset.items, dataset.item_text_columns, config)  # first: a wrong column is told at once
    starts = warm.starts(config, storage_root, dataset)
    inputs = training_features(features)
    data = _recipe_data(dataset, inputs, _item_references(features, inputs) if config.effect == "reference_texts" else None)
    tell, bundles = _tell_fits(), _Bundles(config, name, dataset, attributes, features, inputs)
    with ray_session(**_room_for_workers(config)):
        from components.train.workers import trained_by_workers

        train_graph = trained_by_workers(work, starts)
        fitted = fit_recipe(data, config, train_graph, on_progress=tell)
        chosen = bundles.chosen(fitted, data)
        bundles.write(out / (EVALUATED_DIRECTORY if config.refit else BUNDLE_DIRECTORY), fitted, data, chosen)
        save_file(_side_representations(fitted, data.train.shape), out / "side_representations.safetensors")
        if fitted.graphs:
            tables = {run: found.table for run, found in fitted.graphs.items()}
            warm.write(out / warm.WARM_FILE, tables, config, storage_root, dataset)
        known = len(starts["factual"].rows) if "factual" in starts else 0
        training = _training(fitted, config, chosen, known)
        write_json(out / "curve.json", _graph_run(fitted)["curve"])
        learned_from = {"evaluated": data.train.nnz, "served": data.train.nnz}
        weights = {f"weight.{member}": weight for member, weight in fitted.weights.items()}
        embedding_dim = _item_vectors(fitted, data).shape[1]
        if config.refit:
            choices, data = fitted.choices, _with_all(data, dataset)
            learned_from["served"] = data.train.nnz
            del fitted  # its memory is needed
            again = fit_again(choices, data, config, train_graph, on_progress=tell)
            bundles.write(out / BUNDLE_DIRECTORY, again, data, chosen)
    write_json(out / "training.json", {**training, "learned_from": learned_from})
    kept = ("validation", "epochs", "best_epoch", "warm_start", "effect", "debias_strength", "num_workers")
    return {**{key: training[key] for key in kept}, **weights, "embedding_dim": embedding_dim, "learned_from": learned_from}


@dataclass(frozen=True)
class _Chosen:
    """What validation has chosen beside the recipe's own settings, for every bundle of it."""

    texts: "NewItems | None"
    """What items that are new will be scored by."""
    newcomers: dict[str, Any]
    """See `fit_newcomers`."""
    curve: list[dict[str, float]]
    """Validation NDCG@10 by debias strength."""
    strength: float
    """The one that is served."""


@dataclass(frozen=True)
class _Bundles:
    """Writes bundles of one training."""

    config: TrainConfig
    name: str
    """Fingerprint of the stage's output."""
    dataset: "Dataset"
    attributes: "pa.Table"
    features: Manifest
    """The feature set that the recipe is trained on, and served with."""
    inputs: "TrainingFeatures"

    def chosen(self, fitted: "FittedRecipe", data: "RecipeData") -> _Chosen:
        """What is chosen by the validation interactions of `data`."""
        from components.train.newcomers import fit_newcomers
        from components.train.strength import choose_strength, strength_curve

        config, models = self.config, _models(fitted)
        texts = _new_items(self.inputs, fitted, config, data) if data.has_text and _encoder(self.features) else None
        _, newcomers = fit_newcomers(self.inputs.user_introductions, data.train, data.validation, models, config.seed)
        grid = (0.0,) if fitted.counterfactual is fitted.factual else config.debias_grid
        curve = strength_curve(fitted.factual, fitted.counterfactual, data.train, data.validation, grid)
        return _Chosen(texts, newcomers, curve, choose_strength(curve, config.debias_tolerance))

    def write(self, directory: Path, fitted: "FittedRecipe", data: "RecipeData", chosen: _Chosen) -> None:
        """Writes the bundle of a recipe that has learned from the training interactions of `data`."""
        from components.train.attributes import write_attributes
        from components.train.bundle import model_tensors, write_bundle, write_newcomers, write_texts
        from components.train.newcomers import newcomers_of
        from serving.scorer import Scorer

        vectors, texts = _item_vectors(fitted, data), chosen.texts
        model = model_tensors(fitted, vectors, data.train)
        header = self._header(fitted, vectors.shape[1], chosen)
        ids = self.dataset.users[USER_ID].tolist(), _described_items(self.dataset.items, self.inputs.item_profiles)
        write_bundle(directory, Scorer(model, header, *ids), model, self.config.seed)
        write_attributes(directory, self.attributes)
        if texts is not None:
            write_texts(directory, texts)
        if chosen.newcomers["used"]:
            write_newcomers(directory, newcomers_of(self.inputs.user_introductions, _models(fitted), chosen.newcomers))

    def _header(self, fitted: "FittedRecipe", embedding_dim: int, chosen: _Chosen) -> dict[str, Any]:
        """The header of a bundle.

        Args:
            fitted: its recipe.
            embedding_dim: of the items' vectors: wider than the ID table where a backbone puts its layers side by side.
            chosen: beside that recipe.
        """
        from components.train.bundle import header

        config, texts, optional = self.config, chosen.texts, dict[str, Any]()
        if texts is not None:
            words = {} if texts.words is None else {"words": texts.words.share}
            optional["text"] = {"encoder": _encoder(self.features), "power": texts.power, **words}
        if chosen.newcomers["used"]:
            optional["newcomers"] = {name: chosen.newcomers[name] for name in ("l2", "popularity_weight")}
        return header(
            embedding_dim=embedding_dim,
            name=self.dataset.name,
            fingerprint=self.name,
            backbone=config.model.backbone,
            side_encoder=config.model.side_encoder,
            effect=config.effect,
            members=fitted.weights,
            counterfactual_members=fitted.counterfactual_weights,
            history_blocks=fitted.history_blocks,
            seed=config.seed,
            feature_project=self.features.facts["project"],
            feature_fingerprint=self.features.fingerprint,
            debias_strength=chosen.strength,
            **optional,
        )


def _models(fitted: "FittedRecipe") -> "dict[str, LinearScores]":
    return {"factual": fitted.factual, "counterfactual": fitted.counterfactual}


def _item_vectors(fitted: "FittedRecipe", data: "RecipeData") -> "FloatMatrix":
    """Whose cosine says which items are alike, (num_items, v)."""
    return data.item_text if fitted.graph is None else fitted.graph.items[:, :-1]  # without the mediator's offset


def _room_for_workers(config: TrainConfig) -> dict[str, int]:
    """What a Ray of this machine needs for all workers at once: Ray Train waits for ever where they do not fit."""
    return {
        "num_cpus": math.ceil(config.num_workers * config.cpus_per_worker),
        "num_gpus": config.num_workers if config.use_gpu else 0,
    }


def _recipe_data(dataset: "Dataset", inputs: "TrainingFeatures", references: "FloatMatrix | None") -> "RecipeData":
    """What the recipe learns from: the test interactions are left behind here."""
    from components.cllmr.linear.ease import centred_unit_rows
    from components.train.members import RecipeData

    train, validation = dataset.matrix(TRAIN), dataset.matrix(VALIDATION)
    user_text, item_text = (centred_unit_rows(rows) for rows in (inputs.user_embeddings, inputs.item_embeddings))
    return RecipeData(train, validation, user_text, item_text, inputs.user_spectrum, inputs.item_spectrum, references)


def _with_all(data: "RecipeData", dataset: "Dataset") -> "RecipeData":
    """The data with all interactions to learn from, and none held out."""
    import scipy.sparse as sp

    return replace(data, train=dataset.matrix(), validation=sp.csr_array(data.validation.shape, dtype=data.validation.dtype))


def _new_items(inputs: "TrainingFeatures", fitted: "FittedRecipe", config: TrainConfig, data: "RecipeData") -> "NewItems":
    """What items that are new will be scored by; as the member "text", or the first that it would try, where it is left out,
    and by the words of their texts where these help."""
    from components.cllmr.linear.kernel import NewItems
    from components.train.new_items import with_words

    member = fitted.members.get("text")
    power = config.recipe.text_power[0] if member is None else member.settings["power"]
    texts = NewItems.of(inputs.item_embeddings, float(power))
    return with_words(texts, inputs.item_profiles, data.train, data.validation, config.seed)


def _side_representations(fitted: "FittedRecipe", shape: tuple[int, int]) -> dict[str, "FloatMatrix"]:
    """z of `users` and `items`; of width 0 without a graph model."""
    import numpy as np

    z = (np.empty((count, 0), np.float32) for count in shape)
    if fitted.graph is not None:
        z = (np.ascontiguousarray(side) for side in (fitted.graph.user_side, fitted.graph.item_side))
    return dict(zip(("users", "items"), z, strict=True))


def _graph_run(fitted: "FittedRecipe") -> Mapping[str, Any]:
    """How the graph model's training went: "curve", "epochs", "best_epoch"."""
    return {"curve": [], "epochs": 0, "best_epoch": 0} if fitted.graph is None else fitted.graph.run


def _training(fitted: "FittedRecipe", config: TrainConfig, chosen: _Chosen, known: int) -> dict[str, Any]:
    """The contents of training.json, but for how many interactions each bundle has learned from.

    Args:
        fitted: the recipe.
        config: what it was fitted with.
        chosen: beside its settings.
        known: users and items that training began with.
    """
    run = _graph_run(fitted)
    return {
        "members": {
            member: {"weight": fitted.weights[member], "validation": round(fitted.validation[member], 6), **found.settings}
            for member, found in fitted.members.items()
        },
        "members_left_out": fitted.left_out,
        "members_tried": {member: len(found.tried) for member, found in fitted.members.items()},
        "validation": {METRIC: round(fitted.validation["ensemble"], 6)},
        "epochs": run["epochs"],
        "best_epoch": run["best_epoch"],
        "newcomers": chosen.newcomers,
        "warm_start": config.warm_start,
        "nodes_known_at_start": known,
        "effect": config.effect,
        "debias_curve": chosen.curve,
        "debias_strength": chosen.strength,
        "num_workers": config.num_workers,
    }


def _sideinfo(features: Manifest) -> Manifest | None:
    """What a feature set's texts come from, None if that has been removed."""
    return Store(features.storage_root).find("sideinfo", features.parents["sideinfo"])


def _encoder(features: Manifest) -> str | None:
    """Which text encoder made the embeddings of a feature set, None if that is not known any more."""
    sideinfo = _sideinfo(features)
    return None if sideinfo is None else sideinfo.facts.get("encoder")


def _item_references(features: Manifest, inputs: "TrainingFeatures") -> "FloatMatrix | None":
    """See `RecipeData`."""
    import numpy as np

    from components.cllmr.effects.base import centred
    from components.sideinfo.reader import reference_embeddings

    sideinfo = _sideinfo(features)
    if sideinfo is None:
        raise ArtifactError(
            f"the reference texts of feature set {features.fingerprint} are gone: sideinfo {features.parents['sideinfo']} has "
            "been removed.",
            "Run the pipeline from sideinfo, or choose another train.effect.",
        )
    found = reference_embeddings(sideinfo.path(), "item")
    return None if found is None else centred(found, around=inputs.item_embeddings).astype(np.float32)


def _tell_fits() -> Callable[..., None]:
    """Tells every fit beside the graph model's, which tells its epochs itself; how many there will be, the search decides."""
    done = 0

    def tell(**figures: Any) -> None:
        nonlocal done
        done += 1
        emit("progress", stage=STAGE.name, done=done, total=None, unit="fits", **figures)

    return tell


def _described_items(items: "pd.DataFrame", profiles: list[str]) -> list[dict[str, str]]:
    """item_id, title and profile text of every item, in row order."""
    rows = zip(items[ITEM_ID], items[TITLE], profiles, strict=True)
    return [{"item_id": item_id, "title": title, "profile": profile} for item_id, title, profile in rows]

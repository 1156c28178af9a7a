"""The train stage: features through Feast in, model bundle out."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.artifacts import Manifest, Stage, Store, fingerprint, run_stage, write_json
from components.ids import ITEM_ID, TITLE, TRAIN, USER_ID, VALIDATION
from components.train.config import TrainConfig

if TYPE_CHECKING:
    import pandas as pd

STAGE = Stage("train", version=2)


def run(config: dict[str, Any], storage_root: str, ingest: Manifest, features: Manifest) -> Manifest:
    """Trains the model and writes `bundle/`, curve.json, training.json and side_representations.safetensors.

    A killed run leaves its checkpoints; the same call goes on from them and ends with the same bundle.
    """
    settings = TrainConfig.parse(config, STAGE.name)
    parents = {"ingest": ingest, "features": features}
    name = fingerprint(STAGE, settings.identity(), {parent: manifest.fingerprint for parent, manifest in parents.items()})
    store = Store(storage_root)

    def build(out: Path) -> dict[str, Any]:
        return _build(out, settings, ingest, features, name, store.directory(STAGE.name, name))

    manifest = run_stage(STAGE, settings, storage_root, parents, build)
    store.remove_directory(STAGE.name, name)  # only now: until the output is committed, the checkpoints are all there is
    return manifest


def _build(out: Path, config: TrainConfig, ingest: Manifest, features: Manifest, name: str, work: Path) -> dict[str, Any]:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from components.features.reader import training_features
    from components.ingest.dataset import Dataset
    from components.launch import ray_session
    from components.train.bundle import header, model_tensors, write_bundle
    from components.train.strength import METRIC, choose_strength, strength_curve
    from serving.scorer import Scorer

    dataset = Dataset.load(ingest.path())
    train, validation = dataset.matrix(TRAIN), dataset.matrix(VALIDATION)
    with ray_session(num_cpus=config.num_workers, num_gpus=config.num_workers if config.use_gpu else 0):
        inputs = training_features(features)
        from components.train.workers import RESULT, pack, run_workers

        text = np.concatenate([inputs.user_embeddings, inputs.item_embeddings])
        spectrum = np.concatenate([inputs.user_spectrum, inputs.item_spectrum])
        checkpoint = run_workers(pack(train, validation, text, spectrum), config, work / "ray")
        tensors = load_file(checkpoint / RESULT)
        run = json.loads((checkpoint / "result.json").read_text(encoding="utf-8"))

    model = model_tensors(tensors, train)
    embedding_dim = model["item_factors"].shape[1] - 1  # wider than the ID table where a backbone puts its layers side by side
    described = header(
        embedding_dim=embedding_dim,
        name=dataset.name,
        fingerprint=name,
        backbone=config.model.backbone,
        side_encoder=config.model.side_encoder,
        seed=config.seed,
        feature_project=features.facts["project"],
        feature_fingerprint=features.fingerprint,
        debias_strength=0.0,
    )
    user_ids, items = dataset.users[USER_ID].tolist(), _described_items(dataset.items, inputs.item_profiles)
    curve = strength_curve(Scorer(model, described, user_ids, items), train, validation, config.debias_grid)
    described["debias_strength"] = choose_strength(curve, config.debias_tolerance)
    write_bundle(out / "bundle", Scorer(model, described, user_ids, items), model, config.seed)
    save_file({"users": tensors["user_side"], "items": tensors["item_side"]}, out / "side_representations.safetensors")
    write_json(out / "curve.json", run["curve"])
    best = next(point for point in run["curve"] if point["epoch"] == run["best_epoch"])
    training = {
        "epochs": run["epochs"],
        "best_epoch": run["best_epoch"],
        "validation": {key: best[key] for key in ("recall@20", METRIC)},
        "debias_curve": curve,
        "debias_strength": described["debias_strength"],
        "num_workers": config.num_workers,
    }
    write_json(out / "training.json", training)
    facts = {key: value for key, value in training.items() if key != "debias_curve"}
    return {**facts, "embedding_dim": embedding_dim}


def _described_items(items: "pd.DataFrame", profiles: list[str]) -> list[dict[str, str]]:
    """item_id, title and profile text of every item, in row order."""
    rows = zip(items[ITEM_ID], items[TITLE], profiles, strict=True)
    return [{"item_id": item_id, "title": title, "profile": profile} for item_id, title, profile in rows]

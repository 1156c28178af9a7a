"""Writes the model bundle: safetensors and JSON, everything that serving needs, nothing that runs code."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from safetensors.numpy import save_file

from components.artifacts import write_json
from serving.scorer import BUNDLE_FILE, GOLDEN_FILE, ITEMS_FILE, MODEL_FILE, SCHEMA_VERSION, USERS_FILE, Scorer, make_golden

Floats = npt.NDArray[np.float32]


def model_tensors(tensors: dict[str, Floats], train: sp.csr_array) -> dict[str, npt.NDArray[Any]]:
    """Everything of the bundle that is a tensor.

    Args:
        tensors: user_factors (num_users, dim + 1), item_factors (num_items, dim + 1), user_gate and item_gate.
        train: training interactions, binary, (num_users, num_items).
    """
    train = train.sorted_indices()
    names = ("user_factors", "item_factors", "user_gate", "item_gate")
    return {
        **{name: np.ascontiguousarray(tensors[name]) for name in names},
        "reference": tensors["item_factors"].mean(axis=0, dtype=np.float64).astype(np.float32),
        "popularity": np.bincount(train.indices, minlength=train.shape[1]).astype(np.int64),
        "seen_indptr": train.indptr.astype(np.int64),
        "seen_items": train.indices.astype(np.int32),
    }


def write_bundle(directory: Path, scorer: Scorer, model: dict[str, npt.NDArray[Any]], seed: int) -> None:
    """Writes a bundle and its golden requests, which the scorer itself answers.

    Args:
        scorer: of `model`; its `bundle` is the header.
        model: see `model_tensors`.
        seed: of the users whose requests become golden.
    """
    directory.mkdir()
    save_file(model, directory / MODEL_FILE)
    write_json(directory / BUNDLE_FILE, scorer.bundle)
    write_json(directory / USERS_FILE, scorer.user_vocabulary.ids)
    rows = zip(scorer.item_vocabulary.ids, scorer.titles, scorer.profiles, strict=True)
    write_json(directory / ITEMS_FILE, [{"item_id": item_id, "title": title, "profile": text} for item_id, title, text in rows])
    write_json(directory / GOLDEN_FILE, make_golden(scorer, seed=seed))


def header(*, embedding_dim: int, **values: Any) -> dict[str, Any]:
    """The contents of bundle.json: what every bundle says, and `values`."""
    versions = {name: version(name) for name in ("cllmr-platform", "torch", "ray", "numpy")}
    return {"schema_version": SCHEMA_VERSION, "embedding_dim": embedding_dim, "effect": "tnie", "versions": versions, **values}

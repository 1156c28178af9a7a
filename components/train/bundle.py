"""Writes the model bundle: safetensors and JSON, everything that serving needs, nothing that runs code."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from safetensors.numpy import save_file

from components.artifacts import write_json
from components.cllmr.linear.kernel import NewItems
from components.cllmr.linear.newcomers import Newcomers
from components.cllmr.linear.scores import LinearScores, as_tensors
from components.train.recipe import FittedRecipe
from serving.bundle import (
    BUNDLE_FILE,
    GOLDEN_FILE,
    ITEMS_FILE,
    MODEL_FILE,
    NEWCOMERS_FILE,
    SCHEMA_VERSION,
    SHARED_PARTS,
    TEXT_FILE,
    USERS_FILE,
)
from serving.scorer import Scorer, make_golden

Floats = npt.NDArray[np.float32]


def model_tensors(fitted: FittedRecipe, item_vectors: Floats, train: sp.csr_array) -> dict[str, npt.NDArray[Any]]:
    """Everything of the bundle that is a tensor.

    Args:
        fitted: the recipe; what its counterfactual model shares with the factual one is written once.
        item_vectors: whose cosine says which items are alike, (num_items, v).
        train: training interactions, binary, (num_users, num_items).
    """
    train, popularity = train.sorted_indices(), fitted.counterfactual_popularity
    return {
        **as_tensors(fitted.factual, "factual"),
        **_own_tensors(fitted.counterfactual, fitted.factual),
        "propensity": np.ascontiguousarray(fitted.propensity, dtype=np.float32),
        "item_vectors": np.ascontiguousarray(item_vectors, dtype=np.float32),
        "popularity": np.bincount(train.indices, minlength=train.shape[1]).astype(np.int64),
        "seen_indptr": train.indptr.astype(np.int64),
        "seen_items": train.indices.astype(np.int32),
        **({} if popularity is None else {"counterfactual_popularity": np.ascontiguousarray(popularity, dtype=np.float32)}),
    }


def _own_tensors(counterfactual: LinearScores, factual: LinearScores) -> dict[str, npt.NDArray[Any]]:
    if counterfactual is factual:
        return {}
    shared = [part for part in SHARED_PARTS if getattr(counterfactual, part) is getattr(factual, part)]
    tensors = as_tensors(counterfactual, "counterfactual")
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[1] not in shared}


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


def write_texts(directory: Path, texts: NewItems) -> None:
    """Adds what items that are new are scored by; half precision, as a cosine needs no more."""
    words = {} if texts.words is None else texts.words.tensors()
    save_file({"vectors": texts.side.astype(np.float16), "mean": texts.mean, **words}, directory / TEXT_FILE)


def write_newcomers(directory: Path, newcomers: Newcomers) -> None:
    """Adds how a user's own text alone is answered."""
    save_file(newcomers.tensors(), directory / NEWCOMERS_FILE)


def header(*, embedding_dim: int, **values: Any) -> dict[str, Any]:
    """The contents of bundle.json: what every bundle says, and `values`."""
    versions = {name: version(name) for name in ("cllmr-platform", "torch", "ray", "numpy")}
    return {"schema_version": SCHEMA_VERSION, "embedding_dim": embedding_dim, "versions": versions, **values}

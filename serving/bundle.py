"""A model bundle on disk: its files' names, where the store keeps it, and its reader, which refuses what does not fit together.

`components.train.bundle` writes it, `serving.scorer` scores with it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from components.artifacts import Manifest, Store
from components.cllmr.linear.compact import CompactItems, ItemStorage
from components.cllmr.linear.scores import LinearScores, from_tensors
from components.errors import ArtifactError, first_line
from serving.ranking import Floats

SCHEMA_VERSION = 2

SHARED_PARTS = ("users", "items", "history", "weights")
"""Of the factual model: the counterfactual one has them too where it has none of its own."""

BUNDLE_DIRECTORY = "bundle"
EVALUATED_DIRECTORY = "evaluated"
"""The same model fitted without what is held out; absent where that one is served."""
MODEL_FILE = "model.safetensors"
BUNDLE_FILE = "bundle.json"
USERS_FILE = "users.json"
ITEMS_FILE = "items.json"
GOLDEN_FILE = "golden.json"
TEXT_FILE = "text.safetensors"
"""Texts of the items, for items that are new: not read until one is asked for."""

NEWCOMERS_FILE = "newcomers.safetensors"
"""How a user's own text alone is answered; absent where users have none, or popularity does as well."""

ATTRIBUTES_FILE = "attributes.parquet"
"""What items can be filtered by: see serving.attributes."""

REBUILD = "Build it again: cllmr run --from train"

_Json = TypeVar("_Json", dict[str, Any], list[Any])


def find_trained(storage_root: str, fingerprint: str) -> Manifest:
    """The train artifact of a model.

    Raises ArtifactError when it is not there, StorageError when the store does not say.
    """
    manifest = Store(storage_root).find("train", fingerprint)
    if manifest is None:
        raise ArtifactError(
            f"train artifact {fingerprint} is not below '{storage_root}'.",
            f"If that was renamed or is mounted elsewhere: cllmr promote {fingerprint} --storage WHERE. "
            "Else build it again: cllmr run --from train",
        )
    return manifest


def find_bundle(storage_root: str, fingerprint: str) -> Path:
    """The bundle of a train artifact as a local directory, fetched and checked against its manifest.

    Raises ArtifactError when it is not there or damaged, StorageError when the store does not say.
    """
    return find_trained(storage_root, fingerprint).path(BUNDLE_DIRECTORY) / BUNDLE_DIRECTORY


def evaluated_bundle(trained: Manifest) -> Path:
    """The bundle of a train artifact that held-out interactions can judge, for it has learned from none of them."""
    evaluated = trained.path() / EVALUATED_DIRECTORY
    return evaluated if evaluated.is_dir() else trained.path() / BUNDLE_DIRECTORY


class Contents(NamedTuple):
    """Of a bundle, checked."""

    model: dict[str, Any]
    """The tensors; item vectors as they are stored in memory."""
    header: dict[str, Any]
    """Contents of bundle.json."""
    user_ids: list[str]
    """By row."""
    items: list[dict[str, Any]]
    """item_id, title and profile by row."""
    golden: list[dict[str, Any]]
    """Recorded requests with their answers; none where the file is missing."""
    models: tuple[LinearScores, LinearScores]
    """The factual and the counterfactual model of `model`."""


def read_bundle(bundle_dir: str | Path, storage: ItemStorage = "float32") -> Contents:
    """Reads and checks a bundle; golden requests are not replayed.

    Args:
        bundle_dir: the bundle.
        storage: of the item vectors in memory; the rest stays as it is.

    Raises:
        ArtifactError: a file is missing or unreadable, the schema is of another version, or shapes, ranges or
            vocabularies do not fit together.
    """
    directory = Path(bundle_dir)
    header = _read_json(directory / BUNDLE_FILE, dict)
    _check_header(header, directory / BUNDLE_FILE)
    user_ids = _read_json(directory / USERS_FILE, list)
    items = _read_json(directory / ITEMS_FILE, list)
    golden = _read_json(directory / GOLDEN_FILE, list) if (directory / GOLDEN_FILE).exists() else []
    path = directory / MODEL_FILE
    try:
        model = _read_model(path, storage)
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, f"cannot be read: {first_line(error)}") from None
    models = _check_model(model, path)
    _check_blocks(header["history_blocks"], models, directory / BUNDLE_FILE)
    _check_ids(user_ids, len(model["factual.users"]), directory / USERS_FILE)
    _check_items(items, len(model["factual.items"]), directory / ITEMS_FILE)
    return Contents(model, header, user_ids, items, golden, models)


def models_of(model: Mapping[str, Any]) -> tuple[LinearScores, LinearScores]:
    """The factual and the counterfactual model; parts that the file holds once are shared.

    Raises:
        ValueError: tensors are missing or do not fit together.
    """
    factual = from_tensors(model, "factual")
    names = [name for name in model if name.startswith("counterfactual.")]
    if not names:
        return factual, factual
    parts = (name.removeprefix("factual.") for name in model if name.startswith("factual."))
    own = {f"counterfactual.{part}": model[f"factual.{part}"] for part in parts if part.split(".")[0] in SHARED_PARTS}
    counterfactual = from_tensors({**own, **{name: model[name] for name in names}}, "counterfactual")
    if "counterfactual.users" not in names:
        counterfactual = replace(counterfactual, users=factual.users)
    if "counterfactual.history.data" not in names:
        counterfactual = replace(counterfactual, history=factual.history)
    return factual, counterfactual


# -- files ------------------------------------------------------------------------------------------------------------


def _read_model(path: Path, storage: ItemStorage) -> dict[str, Any]:
    """The tensors; item vectors as they are to be stored."""
    if storage == "float32":
        return dict(load_file(path))
    model: dict[str, Any] = {}
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            part: Any = file.get_slice(name)
            if (name.endswith(".items") or name == "item_vectors") and part.get_dtype() == "F32" and len(part.get_shape()) == 2:
                model[name] = CompactItems.of(partial(_slice, part), part.get_shape(), storage)
            else:
                model[name] = file.get_tensor(name)
    return model


def _slice(part: Any, start: int, stop: int) -> Floats:
    rows: Floats = part[start:stop]
    return rows


def _read_json(path: Path, kind: type[_Json]) -> _Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read: {first_line(error)}") from None
    if not isinstance(value, kind):
        raise _damaged(path, f"holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


# -- checks -----------------------------------------------------------------------------------------------------------


def _damaged(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path} {what}.", REBUILD)


def _check_header(bundle: dict[str, Any], path: Path) -> None:
    if (version := bundle.get("schema_version")) != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema_version is {version!r}, this version of the platform reads {SCHEMA_VERSION}.",
            "Serve the bundle with the cllmr-platform that built it, or build it again: cllmr run --from train",
        )
    wanted: dict[str, type | tuple[type, ...]] = {
        "name": str,
        "fingerprint": str,
        "embedding_dim": (int,),
        "debias_strength": (int, float),
        "effect": str,
        "history_blocks": dict,
    }
    for key, kind in wanted.items():
        if not isinstance(bundle.get(key), kind):
            raise _damaged(path, f"has {key} = {bundle.get(key)!r}")
    if not 0.0 <= bundle["debias_strength"] <= 1.0:
        raise _damaged(path, f"has debias_strength = {bundle['debias_strength']!r}, allowed are 0 to 1")


def _check_model(model: Mapping[str, Any], path: Path) -> tuple[LinearScores, LinearScores]:
    """The factual and the counterfactual model; refuses tensors of wrong type or shape, NaN, or a broken interaction list."""
    try:
        factual, counterfactual = models_of(model)
    except ValueError as error:
        raise _damaged(path, f"does not fit together: {error}") from None
    users, items = len(factual.users), len(factual.items)
    if (users, items) != (len(counterfactual.users), len(counterfactual.items)):
        raise _damaged(
            path, f"has a counterfactual model of {len(counterfactual.users)} users, {len(counterfactual.items)} items"
        )
    if users == 0 or items == 0:
        raise _damaged(path, f"holds {users} users and {items} items")
    wanted = {"propensity": "float32", "item_vectors": "float32", "popularity": "int64", "seen_indptr": "int64"}
    if missing := [name for name in [*wanted, "seen_items"] if name not in model]:
        raise _damaged(path, f"lacks {', '.join(missing)}")
    indptr, vectors = model["seen_indptr"], model["item_vectors"]
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "propensity": ((items,), "float32"),
        "item_vectors": ((items, vectors.shape[-1] if vectors.ndim else 0), "float32"),
        "popularity": ((items,), "int64"),
        "seen_indptr": ((users + 1,), "int64"),
        "seen_items": ((int(indptr[-1]) if indptr.size else 0,), "int32"),
        **({"counterfactual_popularity": ((items,), "float32")} if "counterfactual_popularity" in model else {}),
    }
    for name, (shape, dtype) in expected.items():
        tensor = model[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise _damaged(path, f"has {name} of shape {tensor.shape} and type {tensor.dtype}, expected {shape} and {dtype}")
        if dtype == "float32" and isinstance(tensor, np.ndarray) and not np.isfinite(tensor).all():
            raise _damaged(path, f"has {int((~np.isfinite(tensor)).sum())} values in {name} that are not finite")
    if model["propensity"].min() < 0.0:
        raise _damaged(path, f"has propensities from {model['propensity'].min():.4g}, allowed are 0 and more")
    seen = model["seen_items"]
    if indptr[0] != 0 or (np.diff(indptr) < 0).any() or (seen.size and (seen.min() < 0 or seen.max() >= items)):
        raise _damaged(path, "has a list of seen items that is not in order or names items that do not exist")
    if model["popularity"].min() < 0:
        raise _damaged(path, f"has a negative popularity ({model['popularity'].min()})")
    return factual, counterfactual


def _check_blocks(blocks: dict[str, Any], models: tuple[LinearScores, LinearScores], path: Path) -> None:
    """Refuses members of a history that are not those of the weights between items."""
    for name, model in zip(("factual", "counterfactual"), models, strict=True):
        rows, items = model.weights.shape
        try:
            weights = [float(weight) for _, weight in blocks[name]]
        except (KeyError, TypeError, ValueError):
            raise _damaged(path, f"has history_blocks = {blocks!r}") from None
        if len(weights) * items != rows:
            raise _damaged(path, f"has {len(weights)} {name} history_blocks of {items} items for {rows} rows of weights")


def _check_ids(ids: list[Any], count: int, path: Path) -> None:
    if len(ids) != count:
        raise _damaged(path, f"holds {len(ids)} ids, the model has {count} rows")
    if not all(isinstance(raw, str) for raw in ids):
        raise _damaged(path, "holds an id that is no string")
    if len(set(ids)) != len(ids):
        raise _damaged(path, f"holds {len(ids) - len(set(ids))} ids twice")


def _check_items(items: list[Any], count: int, path: Path) -> None:
    for row, item in enumerate(items):
        if not (isinstance(item, dict) and isinstance(item.get("title"), str) and "item_id" in item):
            raise _damaged(path, f"row {row} is no object with item_id and title")
    _check_ids([item["item_id"] for item in items], count, path)

"""A tiny valid bundle with numbers one can follow by hand, and a larger random one; shared by the tests."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from safetensors.numpy import save_file

from components.artifacts import Manifest, write_json
from components.cllmr.linear.kernel import NewItems
from components.cllmr.linear.scores import LinearScores, Standard, as_tensors, by_popularity, joined, strongest
from components.cllmr.linear.words import ItemWords
from components.settings import StageConfig
from components.stages import Stage, run_stage
from components.train.attributes import attributes_of, write_attributes
from components.train.bundle import model_tensors, write_texts
from components.train.config import TrainConfig
from components.train.members import GraphFit
from components.train.recipe import FittedRecipe
from serving.bundle import BUNDLE_DIRECTORY
from serving.scorer import Scorer, make_golden


class Named(StageConfig):
    """Of a train stage that only writes a bundle."""

    name: str = ""


def stored_bundle(
    root: str, write: Callable[[Path], object], name: str = "", parents: Mapping[str, Manifest] | None = None
) -> Manifest:
    """A train artifact below a storage root that holds nothing but the bundle which `write` makes in a directory.

    Args:
        root: the storage root.
        write: makes the bundle in the directory that it is given.
        name: makes it another artifact than those of other names.
        parents: artifacts that it is made of, by stage.
    """

    def build(directory: Path) -> dict[str, Any]:
        write(directory / BUNDLE_DIRECTORY)
        return {}

    return run_stage(Stage("train", 1), Named(name=name), root, parents or {}, build)


def graph_alone(graph: GraphFit) -> FittedRecipe:
    """A recipe that is a graph model with gates, in its own units: nothing is standardised."""
    return FittedRecipe(
        graph.factual, graph.counterfactual, graph.item_gate, {}, {"graph": 1.0}, {"graph": 1.0}, None, {}, {}, {}, {}
    )


def graph_tensors(graph: GraphFit) -> dict[str, npt.NDArray[Any]]:
    """Tensors of a bundle of `graph_alone`, but for the interactions."""
    nobody = sp.csr_array((len(graph.users), len(graph.items)), dtype=np.float32)
    tensors = model_tensors(graph_alone(graph), graph.items[:, :-1], nobody)
    return {name: tensor for name, tensor in tensors.items() if name not in ("popularity", "seen_indptr", "seen_items")}


# A graph model with gates: m_ui = a_u . b_i, a match in two dimensions plus an offset of 2 (the last column).
TINY_GRAPH = GraphFit(
    users=np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=np.float32),
    items=np.array([[2, 0, 2], [1, 1, 2], [0, 2, 2], [-1, -1, 2]], dtype=np.float32),
    user_gate=np.array([0.5, 1.0, 0.25], dtype=np.float32),
    item_gate=np.array([0.5, 0.25, 0.75, 1.0], dtype=np.float32),
    user_side=np.empty((3, 0), dtype=np.float32),
    item_side=np.empty((4, 0), dtype=np.float32),
    table=np.empty((0, 2), dtype=np.float32),
    run={},
)
TINY_MODEL: dict[str, npt.NDArray[Any]] = {
    **graph_tensors(TINY_GRAPH),
    "popularity": np.array([3, 1, 3, 0], dtype=np.int64),
    "seen_indptr": np.array([0, 1, 3, 3], dtype=np.int64),
    "seen_items": np.array([0, 1, 2], dtype=np.int32),
}
NO_BLOCKS: dict[str, Any] = {"factual": [], "counterfactual": []}
"""Of a model that nobody can be folded into."""
TINY_USERS = ["ann", "bob", "cat"]
TINY_ITEMS = [
    {"item_id": "i0", "title": "Alien (1979)", "profile": "A horror film in space."},
    {"item_id": "i1", "title": "Brazil (1985)", "profile": "A dark comedy."},
    {"item_id": "i2", "title": "Casablanca (1942)", "profile": "A romance in wartime."},
    {"item_id": "i3", "title": "Dumbo (1941)", "profile": ""},
]
TINY_HEADER = {
    "schema_version": 2,
    "name": "tiny",
    "fingerprint": "0123456789abcdef",
    "embedding_dim": 2,
    "debias_strength": 0.5,
    "effect": "gates",
    "members": {"graph": 1.0},
    "history_blocks": NO_BLOCKS,
    "backbone": "lightgcn",
    "side_encoder": "sse",
    "seed": 1,
    "feature_project": "tiny",
    "feature_fingerprint": "fedcba9876543210",
    "versions": {"cllmr-platform": "0.1.0"},
}


def write_bundle(
    directory: Path,
    model: dict[str, npt.NDArray[Any]] | None = None,
    header: dict[str, Any] | None = None,
    users: list[Any] | None = None,
    items: list[Any] | None = None,
    golden: bool = True,
) -> Path:
    """Writes a bundle; what is given replaces the tiny bundle's own (single keys of `model` and `header`).

    With `golden=False` no golden request is recorded, so that an invalid bundle can be written too.
    """
    return _write(
        directory,
        {**TINY_MODEL, **(model or {})},
        {**TINY_HEADER, **(header or {})},
        TINY_USERS if users is None else users,
        TINY_ITEMS if items is None else items,
        golden,
    )


def _write(
    directory: Path,
    model: dict[str, npt.NDArray[Any]],
    header: dict[str, Any],
    users: list[Any],
    items: list[Any],
    golden: bool = True,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(model, str(directory / "model.safetensors"))
    write_json(directory / "bundle.json", header)
    write_json(directory / "users.json", users)
    write_json(directory / "items.json", items)
    if golden:
        write_json(directory / "golden.json", make_golden(Scorer.load(directory)))
    return directory


def write_text(
    directory: Path,
    embeddings: npt.NDArray[np.float32],
    encoder: str,
    power: float = 3.0,
    told: Sequence[str] = (),
    share: float = 0.0,
) -> NewItems:
    """Adds texts to a bundle that is there, so that new items can be scored; the golden requests stay. A `share` of the
    similarity is that of the words of what is `told`."""
    texts = NewItems.of(embeddings, power, ItemWords.of(told, share) if share else None)
    write_texts(directory, texts)
    header = json.loads((directory / "bundle.json").read_text())
    described = {"encoder": encoder, "power": power, **({"words": share} if share else {})}
    write_json(directory / "bundle.json", {**header, "text": described})
    return texts


def write_item_columns(
    directory: Path, filter_separator: str | None = ",", named: tuple[str, ...] | None = None, **columns: list[str]
) -> Path:
    """Adds columns that items can be filtered by to a bundle that is there, as training does; `named`: these, whatever they
    hold."""
    config = TrainConfig(filter_separator=filter_separator, filter_columns=named)
    write_attributes(directory, attributes_of(pd.DataFrame(columns), list(columns), config))
    return directory


def write_random_bundle(
    directory: Path, num_users: int = 50, num_items: int = 200, embedding_dim: int = 8, seed: int = 0, **header: Any
) -> Path:
    """A bundle as training writes it (an inner product and weights between items, one of each kind for the factual and the
    counterfactual model), with random numbers; ids are u0..., i0...."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, min(10, num_items), num_users)
    seen = [np.sort(rng.choice(num_items, size, replace=False)) for size in lengths]
    indptr, columns = np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(seen)
    train = sp.csr_array((np.ones(len(columns), dtype=np.float32), columns, indptr), shape=(num_users, num_items))

    def model() -> list[LinearScores]:
        factors = [rng.standard_normal((rows, embedding_dim)) for rows in (num_users, num_items)]
        weights = strongest(rng.standard_normal((num_items, num_items)), min(20, num_items))
        return [LinearScores.of_factors(*factors), LinearScores.of_weights(train, weights)]

    members = model()
    standards = [Standard.of(member) for member in members]
    factual, counterfactual = (joined(parts, (0.7, 1.0), standards) for parts in (members, model()))
    blocks = {name: [["ease", 1.0]] for name in ("factual", "counterfactual")}
    model_tensors = {
        **as_tensors(factual, "factual"),
        **as_tensors(counterfactual, "counterfactual"),
        "propensity": rng.uniform(0.0, 0.9, num_items).astype(np.float32),
        "item_vectors": rng.standard_normal((num_items, embedding_dim)).astype(np.float32),
        "popularity": np.bincount(columns, minlength=num_items).astype(np.int64),
        "counterfactual_popularity": by_popularity(rng.integers(0, 100, num_items)),
        "seen_indptr": indptr.astype(np.int64),
        "seen_items": columns.astype(np.int32),
    }
    return write_bundle(
        directory,
        model=model_tensors,
        header={
            "name": "random",
            "embedding_dim": embedding_dim,
            "effect": "counterfactual_log",
            "history_blocks": blocks,
            **header,
        },
        users=[f"u{row}" for row in range(num_users)],
        items=[
            {"item_id": f"i{row}", "title": f"Film {row}", "profile": f"Profile of film {row}."} for row in range(num_items)
        ],
    )


def write_factor_bundle(
    directory: Path, num_users: int, num_items: int, embedding_dim: int, num_seen: int = 20, seed: int = 0
) -> Path:
    """A bundle of any size that is an inner product alone; ids are u0..., i0....

    The dimensions' scale falls like the square root of their number, as factors of real interactions do: with equal ones every
    item is as far from every other, and no approximate index finds anything.
    """
    rng = np.random.default_rng(seed)
    scale = (np.arange(1, embedding_dim + 1) ** -0.5).astype(np.float32)
    users, items, vectors = (
        rng.standard_normal((rows, embedding_dim), dtype=np.float32) * scale for rows in (num_users, num_items, num_items)
    )
    seen = np.sort(rng.integers(0, num_items, (num_users, num_seen)).astype(np.int32), axis=1)
    return _write(
        directory,
        {
            **as_tensors(LinearScores.of_factors(users, items), "factual"),
            "counterfactual.items": items + np.float32(0.3) * vectors,  # the users' side is shared, as training writes it
            "propensity": rng.uniform(0.0, 0.9, num_items).astype(np.float32),
            "item_vectors": items,
            "popularity": np.bincount(seen.ravel(), minlength=num_items).astype(np.int64),
            "seen_indptr": np.arange(0, seen.size + 1, num_seen, dtype=np.int64),
            "seen_items": seen.ravel(),
        },
        {**TINY_HEADER, "name": "factors", "embedding_dim": embedding_dim, "effect": "counterfactual_log"},
        [f"u{row}" for row in range(num_users)],
        [{"item_id": f"i{row}", "title": f"Film {row}", "profile": f"Film {row}."} for row in range(num_items)],
    )

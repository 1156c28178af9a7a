"""A tiny valid bundle with numbers one can follow by hand, and a larger random one; shared by the tests."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from components.artifacts import write_json
from serving.scorer import write_golden

# m_ui = user_factors . item_factors: match in two dimensions, plus an offset of 2 (the last column).
TINY_MODEL: dict[str, npt.NDArray[Any]] = {
    "user_factors": np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=np.float32),
    "item_factors": np.array([[2, 0, 2], [1, 1, 2], [0, 2, 2], [-1, -1, 2]], dtype=np.float32),
    "item_gate": np.array([0.5, 0.25, 0.75, 1.0], dtype=np.float32),
    "user_gate": np.array([0.5, 1.0, 0.25], dtype=np.float32),
    "reference": np.array([0.5, 0.5, 2.0], dtype=np.float32),  # the mean item factor
    "popularity": np.array([3, 1, 3, 0], dtype=np.int64),
    "seen_indptr": np.array([0, 1, 3, 3], dtype=np.int64),
    "seen_items": np.array([0, 1, 2], dtype=np.int32),
}
TINY_USERS = ["ann", "bob", "cat"]
TINY_ITEMS = [
    {"item_id": "i0", "title": "Alien (1979)", "profile": "A horror film in space."},
    {"item_id": "i1", "title": "Brazil (1985)", "profile": "A dark comedy."},
    {"item_id": "i2", "title": "Casablanca (1942)", "profile": "A romance in wartime."},
    {"item_id": "i3", "title": "Dumbo (1941)", "profile": ""},
]
TINY_HEADER = {
    "schema_version": 1,
    "name": "tiny",
    "fingerprint": "0123456789abcdef",
    "embedding_dim": 2,
    "debias_strength": 0.5,
    "effect": "tnie",
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
    directory.mkdir(parents=True, exist_ok=True)
    save_file({**TINY_MODEL, **(model or {})}, str(directory / "model.safetensors"))
    write_json(directory / "bundle.json", {**TINY_HEADER, **(header or {})})
    write_json(directory / "users.json", TINY_USERS if users is None else users)
    write_json(directory / "items.json", TINY_ITEMS if items is None else items)
    if golden:
        write_golden(directory)
    return directory


def write_random_bundle(
    directory: Path, num_users: int = 50, num_items: int = 200, embedding_dim: int = 8, seed: int = 0, **header: Any
) -> Path:
    """A bundle as training writes it (unit vectors, offset, gates in (0, 1)), with random numbers; ids are u0..., i0...."""
    rng = np.random.default_rng(seed)

    def unit(rows: int) -> npt.NDArray[np.float32]:
        vectors = rng.standard_normal((rows, embedding_dim))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    scale = np.float32(1 / 0.15)
    item_factors = np.hstack([scale * unit(num_items), np.full((num_items, 1), scale)]).astype(np.float32)
    lengths = rng.integers(1, min(10, num_items), num_users)
    seen = [np.sort(rng.choice(num_items, size, replace=False)) for size in lengths]
    model = {
        "user_factors": np.hstack([unit(num_users), np.ones((num_users, 1))]).astype(np.float32),
        "item_factors": item_factors,
        "item_gate": rng.uniform(0.1, 0.9, num_items).astype(np.float32),
        "user_gate": rng.uniform(0.1, 0.9, num_users).astype(np.float32),
        "reference": item_factors.mean(axis=0),
        "popularity": np.bincount(np.concatenate(seen), minlength=num_items).astype(np.int64),
        "seen_indptr": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "seen_items": np.concatenate(seen).astype(np.int32),
    }
    return write_bundle(
        directory,
        model=model,
        header={"name": "random", "embedding_dim": embedding_dim, **header},
        users=[f"u{row}" for row in range(num_users)],
        items=[
            {"item_id": f"i{row}", "title": f"Film {row}", "profile": f"Profile of film {row}."} for row in range(num_items)
        ],
    )

"""Reads what the sideinfo stage left."""

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import scipy.sparse as sp
from safetensors import safe_open

from components.sideinfo.encoder import OWN_TEXT, PROFILE, to_embed
from components.sideinfo.stage import EMBEDDINGS_FILE, REFERENCES_FILE

Floats = npt.NDArray[np.float32]
Side = Literal["user", "item"]


def embedded_texts(table: Path) -> list[str | None]:
    """What was embedded of every row of users.parquet or items.parquet; None where there was nothing."""
    with pq.ParquetFile(table) as file:
        blocks = file.iter_batches(columns=[PROFILE, OWN_TEXT])
        return [text for block in blocks for text in to_embed(block)[PROFILE].to_pylist()]


def written_profiles(sideinfo: Path, side: Side) -> list[str]:
    """What was written of every user or item, without its own text: "" where nothing was that can be used.

    Args:
        sideinfo: directory of the stage's output.
        side: of whom.
    """
    return [text or "" for text in pq.read_table(sideinfo / f"{side}s.parquet", columns=[PROFILE])[PROFILE].to_pylist()]


def reference_embeddings(sideinfo: Path, side: Side) -> Floats | None:
    """Embedding of what the LLM wrote of each user or item with the evidence withheld, (num_users or num_items, dim).

    The mean of the references of the row's groups; of nothing at all where none of its groups has one; zero where the LLM had
    no usable answer to that either. None where no LLM wrote.

    Args:
        sideinfo: directory of the stage's output.
        side: of whom.
    """
    if not (sideinfo / REFERENCES_FILE).is_file():
        return None
    written = pq.read_table(sideinfo / REFERENCES_FILE, columns=["side", "group"])
    with safe_open(sideinfo / EMBEDDINGS_FILE, framework="numpy") as file:
        vectors = file.get_tensor("references").astype(np.float32)
    names = list(zip(written["side"].to_pylist(), written["group"].to_pylist(), strict=True))
    usable = {name: row for row, name in enumerate(names) if vectors[row].any()}
    groups = pq.read_table(sideinfo / f"{side}s.parquet", columns=["groups"])["groups"]
    nothing = [row for name, row in usable.items() if name == (side, "")]
    own = [[usable[side, name] for name in listed.as_py() if (side, name) in usable] or nothing for listed in groups]
    counts = np.array([len(rows) for rows in own])
    weights = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
    columns = np.array([row for rows in own for row in rows], dtype=np.int64)
    shape = (len(own), len(vectors))
    return np.asarray(sp.csr_array((weights, columns, np.append(0, np.cumsum(counts))), shape=shape) @ vectors)

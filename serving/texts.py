"""What a bundle has of texts of items and of newcomers, and the encoder that reads the texts of new items."""

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import structlog
from safetensors import SafetensorError
from safetensors.numpy import load_file

from components.cllmr.linear.kernel import NewItems
from components.cllmr.linear.newcomers import Newcomers
from components.cllmr.linear.words import ItemWords
from components.errors import ArtifactError, first_line
from serving.bundle import NEWCOMERS_FILE, TEXT_FILE
from serving.ranking import Floats
from serving.scorer import Scorer

BATCH_SIZE = 32

log = structlog.get_logger()


class Texts:
    """The texts of a bundle's items.

    Args:
        directory: the bundle.
        scorer: of the bundle.
    """

    def __init__(self, directory: Path, scorer: Scorer) -> None:
        self._path = directory / TEXT_FILE
        self._num_items = scorer.num_items
        described = scorer.bundle.get("text") or {}
        self.encoder: str | None = described.get("encoder")
        """Name of the text encoder, None for a bundle without texts."""
        self._power = float(described.get("power", 1.0))
        self._share = float(described.get("words", 0.0))
        self._lock = threading.Lock()

    def are_there(self) -> bool:
        """Whether `read` has something to give; a damaged file is told in the log, once."""
        if self.encoder is None:
            return False
        try:
            self.read()
        except ArtifactError as error:
            log.error("texts of the items cannot be used", reason=error.message)
            self.encoder = None
        return self.encoder is not None

    def read(self) -> NewItems:
        """What new items are scored by; read once.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        with self._lock:
            return self._new_items

    @cached_property
    def _new_items(self) -> NewItems:
        try:
            tensors = load_file(self._path)
            vectors, mean = tensors["vectors"].astype(np.float32), tensors["mean"]
            words = ItemWords.of_tensors(tensors, self._num_items, self._share) if self._share else None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ArtifactError(f"{self._path} cannot be read: {error}.", "Build it again: cllmr run --from train") from None
        if vectors.shape != (self._num_items, *mean.shape) or not np.isfinite(vectors).all():
            raise ArtifactError(
                f"{self._path} has vectors of shape {vectors.shape} for {self._num_items} items.",
                "Build it again: cllmr run --from train",
            )
        return NewItems(vectors, mean, self._power, words)


def read_newcomers(directory: Path, scorer: Scorer) -> Newcomers | None:
    """How a bundle answers users of whom a text alone is known; None where it does not.

    A damaged file is told in the log, and such users get what is popular.
    """
    path = directory / NEWCOMERS_FILE
    if not path.exists():
        return None
    models = {"factual": scorer.factual, "counterfactual": scorer.counterfactual}
    try:
        return Newcomers.of_tensors(load_file(path), models)
    except (OSError, SafetensorError, ValueError) as error:
        log.error("users' own texts cannot be answered", reason=f"{path} cannot be read: {first_line(error)}")
        return None


class TextEncoder:
    """The encoders of the bundles that are served: each loaded when it is first needed, the last one kept."""

    def __init__(self) -> None:
        self._loaded: tuple[str, object] | None = None

    def encode(self, encoder: str, texts: Sequence[str]) -> Floats:
        """Embeddings as training has them, (len(texts), dim); raises ConfigError when the encoder cannot be loaded."""
        from components.sideinfo.encoder import encode, load

        if self._loaded is None or self._loaded[0] != encoder:
            self._loaded = (encoder, load(encoder))
            log.info("text encoder loaded", encoder=encoder)
        return encode(self._loaded[1], texts, BATCH_SIZE, lambda done: None)  # type: ignore[arg-type]  # its package is not typed

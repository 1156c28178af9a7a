"""Parents of the features stage with a handful of users and items whose every feature can be written down by hand."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from components.artifacts import Manifest
from components.settings import StageConfig
from components.stages import Stage, run_stage

Event = tuple[int, int, int, str]
"""user row, item row, Unix seconds, split."""

# "9" before "10": vocabulary order is not the order of texts, so code that sorts ids as text is caught
USERS = ["7", "9", "10"]
ITEMS = ["2", "5", "30", "31"]

EVENTS: list[Event] = [
    (0, 3, 1_000_000_300, "train"),
    (0, 0, 1_000_000_100, "train"),
    (0, 1, 1_000_000_200, "test"),
    (1, 2, 1_000_000_400, "train"),
    (1, 0, 1_000_000_400, "validation"),
    (2, 1, 1_000_000_500, "train"),
    (2, 3, 1_000_000_900, "test"),
]


class World(StageConfig):
    """Names one set of parents, so that other events have another fingerprint."""

    name: str = "small"


@dataclass(frozen=True)
class Parents:
    """The manifests that the features stage takes."""

    ingest: Manifest
    sideinfo: Manifest
    spectrum: Manifest

    def as_arguments(self) -> dict[str, Manifest]:
        """Keyword arguments of the stage's ``run``."""
        return {"ingest": self.ingest, "sideinfo": self.sideinfo, "spectrum": self.spectrum}


@dataclass
class Small:
    """Writes the three parents below a storage root."""

    root: str
    name: str = "small"
    events: list[Event] = field(default_factory=lambda: list(EVENTS))
    users: list[str] = field(default_factory=lambda: list(USERS))
    items: list[str] = field(default_factory=lambda: list(ITEMS))
    sideinfo_users: list[str] | None = None
    newcomers: list[str] = field(default_factory=list)
    """Users without interactions; where there are any, all but the last user have a text of their own too."""

    def write(self) -> Parents:
        """Runs three stages that write what ingest, sideinfo and spectrum write."""
        config = World(name=self.name)
        ingest = run_stage(Stage("ingest", 1), config, self.root, {}, self._ingest)
        sideinfo = run_stage(Stage("sideinfo", 1), config, self.root, {"ingest": ingest}, self._sideinfo)
        spectrum = run_stage(Stage("spectrum", 1), config, self.root, {"ingest": ingest}, self._spectrum)
        return Parents(ingest, sideinfo, spectrum)

    def _ingest(self, directory: Path) -> dict[str, int]:
        users, items, times, splits = zip(*self.events, strict=True)
        pd.DataFrame(
            {
                "user_id": [self.users[row] for row in users],
                "item_id": [self.items[row] for row in items],
                "user": np.array(users, np.int32),
                "item": np.array(items, np.int32),
                "rating": np.full(len(users), np.nan, np.float32),
                "timestamp": np.array(times, np.int64),
                "split": splits,
            }
        ).to_parquet(directory / "interactions.parquet")
        for name, column, ids in (("users", "user", self.users), ("items", "item", self.items)):
            rows = np.arange(len(ids), dtype=np.int32)
            pd.DataFrame({column: rows, f"{column}_id": ids}).to_parquet(directory / f"{name}.parquet")
        return {}

    def _sideinfo(self, directory: Path) -> dict[str, int]:
        for name, column, ids in (("users", "user", self.sideinfo_users or self.users), ("items", "item", self.items)):
            rows = np.arange(len(ids), dtype=np.int32)
            texts = [f"profile of {column} {raw_id}" for raw_id in ids]
            pd.DataFrame({column: rows, f"{column}_id": ids, "profile": texts}).to_parquet(directory / f"{name}.parquet")
        found = {"users": embeddings(len(self.users)), "items": embeddings(len(self.items))}
        if self.newcomers:
            ids = [*self.users, *self.newcomers]
            found["introductions"] = embeddings(len(ids))[::-1].copy()
            found["introductions"][len(self.users) - 1] = 0
            texts = [None if raw_id == self.users[-1] else f"introduction of {raw_id}" for raw_id in ids]
            pd.DataFrame({"user_id": ids, "profile": texts}).to_parquet(directory / "introductions.parquet")
        save_file(found, directory / "embeddings.safetensors")
        return {}

    def _spectrum(self, directory: Path) -> dict[str, int]:
        arrays = {"users": spectrum(len(self.users)), "items": -spectrum(len(self.items))}
        save_file(arrays | {"singular_values": np.ones(2, np.float32)}, directory / "spectrum.safetensors")
        return {}


def embeddings(count: int) -> np.ndarray:
    """(count, 3), unit rows, each different: [cos r, sin r, 0]."""
    angles = np.arange(count)
    return np.stack([np.cos(angles), np.sin(angles), np.zeros(count)], axis=1).astype(np.float32)


def spectrum(count: int) -> np.ndarray:
    """(count, 2): [r, r/3]."""
    rows = np.arange(count, dtype=np.float32)
    return np.stack([rows, rows / 3], axis=1)

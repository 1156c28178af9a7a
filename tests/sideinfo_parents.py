"""A handful of users and items as ingest writes them, for the stages that read nothing but ingest."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd

from components.artifacts import Manifest
from components.settings import StageConfig
from components.stages import Stage, run_stage

Event = tuple[int, int, str]
"""user row, item row, split."""


@dataclass(frozen=True)
class Small:
    """What the ingest artifact holds; texts are "" where there is none."""

    name: str
    events: tuple[Event, ...]
    items: dict[str, list[str]] = field(default_factory=dict)
    """Text columns of the items, `title` first."""
    users: dict[str, list[str]] = field(default_factory=dict)
    """Text columns of the users."""
    num_users: int = 4
    newcomers: dict[str, list[str]] = field(default_factory=dict)
    """Text columns of users without interactions, `user_id` first."""

    def with_other_held_out(self) -> "Small":
        """The same training interactions; every held-out one is moved to another item, and there are more of them."""
        train = {(user, item) for user, item, split in self.events if split == "train"}
        free = [(user, item) for user in range(self.num_users) for item in range(5) if (user, item) not in train]
        old = {(user, item) for user, item, split in self.events if split != "train"}
        moved = tuple((user, item, "test") for user, item in free if (user, item) not in old)
        assert moved
        return replace(self, events=tuple(event for event in self.events if event[2] == "train") + moved)


# item 4 has neither a title of its own (its id stands in) nor text; user 3 has held-out interactions only
SMALL = Small(
    name="small",
    events=(
        (0, 0, "train"),
        (0, 1, "train"),
        (0, 2, "test"),
        (1, 0, "train"),
        (1, 1, "train"),
        (1, 2, "train"),
        (1, 3, "validation"),
        (2, 3, "train"),
        (2, 4, "train"),
        (3, 0, "test"),
    ),
    items={
        "title": ["Alien", "Blade Runner", "Casablanca", "Dogma.", "50"],
        "release_year": ["1979", "1982", "1942", "1999", ""],
        "genres": ["Horror, Sci-Fi", "Sci-Fi", "Drama", "Drama", ""],
    },
)

HELD_OUT_ONLY = replace(SMALL, name="held-out-only", events=tuple((user, item, "test") for user, item, _ in SMALL.events))


class _World(StageConfig):
    name: str


def write_ingest(root: str | Path, world: Small) -> Manifest:
    """Runs a stage that writes what ingest writes."""

    def build(directory: Path) -> dict[str, int]:
        users, items, splits = zip(*sorted(world.events), strict=True)
        item_ids = [str(10 * (row + 1)) for row in range(len(world.items["title"]))]
        user_ids = [f"u{row}" for row in range(world.num_users)]
        pd.DataFrame(
            {
                "user_id": [user_ids[row] for row in users],
                "item_id": [item_ids[row] for row in items],
                "user": np.array(users, np.int32),
                "item": np.array(items, np.int32),
                "rating": np.full(len(users), np.nan, np.float32),
                "timestamp": np.zeros(len(users), np.int64),
                "split": splits,
            }
        ).to_parquet(directory / "interactions.parquet")
        for name, ids, texts in (("user", user_ids, world.users), ("item", item_ids, world.items)):
            rows = np.arange(len(ids), dtype=np.int32)
            pd.DataFrame({name: rows, f"{name}_id": ids, **texts}).to_parquet(directory / f"{name}s.parquet")
        if world.newcomers:
            pd.DataFrame(world.newcomers).to_parquet(directory / "newcomers.parquet")
        (directory / "data_card.json").write_text(json.dumps({"name": world.name}), encoding="utf-8")
        return {}

    return run_stage(Stage("ingest", 1), _World(name=world.name), str(root), {}, build)


class HashEncoder:
    """A vector per text, the same in every batch, of no particular length."""

    def get_embedding_dimension(self) -> int:
        return 6

    def encode(self, texts: list[str], **_: object) -> np.ndarray:
        return np.stack([5 * np.random.default_rng(crc32(text.encode())).standard_normal(6) for text in texts])

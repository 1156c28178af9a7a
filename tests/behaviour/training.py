"""A planted world as training data, and small settings: for every test that trains in its own process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from components.cllmr.model import CLLMR, SideInformation
from components.spectrum.decompose import spectrum
from components.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from components.train.config import TrainConfig
from components.train.loop import SingleProcess, TrainData, fit
from tests.planted import World, block_world

GATES: dict[str, Any] = {"counterfactual": True, "temperature": 0.25, "alignment_weight": 0.03}
"""Of the model, with `effect` "gates": settings under which the paper's gates learn something."""
SMALL: dict[str, Any] = {
    "model": {**GATES, "embedding_dim": 8, "num_negatives": 16, "max_aligned_nodes": 64},
    "effect": "gates",
    "batch_size": 128,
    "max_epochs": 4,
    "evaluate_every": 1,
    "patience": 100,
    "num_workers": 1,
    "seed": 3,
}


SMALL_RECIPE: dict[str, Any] = {
    "model": {"embedding_dim": 16, "num_negatives": 64},
    "max_epochs": 12,
    "recipe": {
        "graph_settings": [],
        "ease_l2": [50.0],
        "ease_side_weight": [20.0],
        "ease_user_power": [0.15],
        "ease_item_power": [0.2],
        "ease_popularity_power": [0.2],
        "side_mix": [0.0],
        "ials_factors": [16],
        "ials_alpha": [10.0],
        "ials_regularization": [10.0],
        "ials_prior": [1.0],
        "text_power": [1.0],
    },
}
"""All members, with settings that are fixed but for their weights."""


def training_data(world: World, rank: int) -> TrainData:
    """What the train stage would make of `world`; its test interactions are the held-out ones."""
    train, held_out = (sp.csr_array(world.matrix(pairs)) for pairs in (world.train, world.test))
    found = spectrum(train, rank)
    side = SideInformation(
        torch.from_numpy(np.concatenate([world.user_text, world.item_text])),
        torch.from_numpy(np.concatenate([found.users, found.items]).astype(np.float32)),
    )
    return TrainData(train, held_out, side)


def small_data() -> TrainData:
    """45 users and 36 items in three blocks."""
    return training_data(block_world(num_blocks=3, users_per_block=15, items_per_block=12), rank=6)


def without_text(data: TrainData, nodes: npt.NDArray[np.int64]) -> TrainData:
    """The same data with a zero row of text for some nodes, users first."""
    assert data.side is not None, "there is text to take away"
    text = data.side.text.clone()
    text[nodes] = 0.0
    return replace(data, side=replace(data.side, text=text))


def small_config(**changes: Any) -> TrainConfig:
    """`SMALL` with changes; those of `model` are merged."""
    model = {**SMALL["model"], **changes.pop("model", {})}
    return TrainConfig.parse({**SMALL, **changes, "model": model}, "train")


class Interrupted(Exception):
    """Stands for a kill."""


class Saving(SingleProcess):
    """Writes a checkpoint after every validation, goes on from the newest one, and dies after epoch `die_after`."""

    def __init__(self, directory: Path, die_after: int | None = None) -> None:
        super().__init__()
        self.directory, self.die_after = directory, die_after
        self.restored_epoch: int | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def restore(self, model: CLLMR, optimizer: torch.optim.Optimizer) -> Any:
        self.optimizer = optimizer
        newest = max(self.directory.glob("*"), key=lambda path: int(path.name), default=None)
        if newest is None:
            return None
        state, best = load_checkpoint(newest, model, optimizer)
        self.restored_epoch = state.epoch
        return state, best

    def save(
        self,
        state: TrainState,
        model: CLLMR,
        best: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        figures: dict[str, float],
    ) -> None:
        directory = self.directory / str(state.epoch)
        directory.mkdir(parents=True)
        save_checkpoint(directory, state, model, best, optimizer)
        if state.epoch == self.die_after:
            raise Interrupted


def assert_resumes_to_the_bit(data: TrainData, config: TrainConfig, directory: Path) -> None:
    """A run that dies after its first epoch ends as the unbroken one does: in its last weights, for the best ones may be those
    that it was resumed with."""
    fit(data, config, Saving(directory / "unbroken"))
    with pytest.raises(Interrupted):
        fit(data, config, Saving(directory / "broken", die_after=1))
    _, state = fit(data, config, Saving(directory / "broken"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        broken, unbroken = (directory / run / str(state.epoch) / name for run in ("broken", "unbroken"))
        assert broken.read_bytes() == unbroken.read_bytes(), name

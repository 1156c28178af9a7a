"""The graph member of the recipe: what it is trained on, and what of it is kept. Who trains it is not its business."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from components.cllmr.model import CLLMR, SideInformation
from components.evaluate.baselines import num_threads
from components.train.checkpoint import TrainState
from components.train.config import TrainConfig
from components.train.loop import SingleProcess, TrainData, fit
from components.train.members import GraphFit, RecipeData, TasteData, TrainGraph


def training_data(data: RecipeData) -> TrainData:
    """The interactions and the side information of all nodes, users first.

    A graph has no weights: of a log with weights it sees the interactions that are more likely of taste than not, and what it
    does not see is ranked in its validation like any other item. The spectrum stays the factual one; it is only the encoder's
    prior.
    """
    train = data.likely if isinstance(data, TasteData) and data.likely is not None else data.train
    if not data.has_text:
        return TrainData(train, data.validation, None)
    text = np.concatenate([data.user_text, data.item_text])
    spectrum = np.concatenate([data.user_spectrum, data.item_spectrum])
    return TrainData(train, data.validation, SideInformation(torch.from_numpy(text), torch.from_numpy(spectrum)))


def as_arrays(model: CLLMR, state: TrainState) -> GraphFit:
    """What a trained model leaves behind."""
    found = model.representations()
    return GraphFit(
        found.mediator.users.numpy(),
        found.mediator.items.numpy(),
        found.user_gate.numpy(),
        found.item_gate.numpy(),
        found.user_side.numpy(),
        found.item_side.numpy(),
        model.backbone.embedding.detach().cpu().numpy(),
        {"curve": state.curve, "best_epoch": state.best_epoch, "epochs": state.epoch},
    )


def trained_here(on_progress: Callable[..., None] = lambda **figures: None) -> TrainGraph:
    """Trains in this process, without checkpoints."""

    def train(data: RecipeData, config: TrainConfig, run: str) -> GraphFit:
        torch.set_num_threads(num_threads())
        tell: Callable[..., Any] = partial(on_progress, run=run)
        return as_arrays(*fit(training_data(data), config, SingleProcess(tell)))

    return train

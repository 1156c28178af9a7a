"""The training loop: plain torch, one process of possibly several; who starts the processes is not its business."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.cllmr.graph import Graph
from components.cllmr.model import CLLMR, SideInformation
from components.cllmr.sampling import Sampler
from components.errors import ConfigError
from components.train.checkpoint import TrainState
from components.train.config import TrainConfig
from components.train.validation import validation_sums


@dataclass(frozen=True)
class TrainData:
    """What every worker needs."""

    train: sp.csr_array
    """Training interactions, binary, (num_users, num_items)."""
    held_out: sp.csr_array
    """Validation interactions, same shape; where there are none, all epochs are trained and the last is the best."""
    side: SideInformation | None
    """Side information of all nodes, users first; only the side encoder "none" does without."""
    start: "Start | None" = None
    """What part of the ID table begins with; None: all of it is drawn."""


class Start(NamedTuple):
    """Rows of the ID table that are known before training."""

    rows: npt.NDArray[np.int64]
    """(num_known,), users first."""
    values: npt.NDArray[np.float32]
    """(num_known, embedding_dim)."""


class Hooks(Protocol):
    """What happens around the loop: distribution, checkpoints, progress."""

    rank: int
    world_size: int

    def wrap(self, model: CLLMR) -> nn.Module:
        """The model made data-parallel, on its device."""

    def restore(self, model: CLLMR, optimizer: torch.optim.Optimizer) -> tuple[TrainState, dict[str, Tensor]] | None:
        """The newest valid checkpoint, or None."""

    def save(
        self,
        state: TrainState,
        model: CLLMR,
        best: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        figures: dict[str, float],
    ) -> None:
        """Called after every validation, on every rank."""


def fit(data: TrainData, config: TrainConfig, hooks: Hooks) -> tuple[CLLMR, TrainState]:
    """Trains until the validation Recall@20 stops rising; returns the model with its best weights.

    The result depends on the data, the config and the number of workers only, however often the run was interrupted.

    Raises FloatingPointError on every rank, before the weights change, when a gradient is not finite.
    """
    torch.manual_seed(config.seed)
    model = build_model(data, config)
    wrapped = hooks.wrap(model)
    optimizer = make_optimizer(model, config)
    sampler = make_sampler(data.train, config)
    restored = hooks.restore(model, optimizer)
    state, best = restored or (TrainState(), _copy(model))
    is_held_out = data.held_out.nnz > 0
    if restored is None and data.start is not None and is_held_out:  # perhaps nothing that training finds is better
        state.best_recall, ndcg = validate(model, data, hooks)
        state.curve.append({"epoch": 0, "recall@20": state.best_recall, "ndcg@10": ndcg})
    device = model.backbone.embedding.device
    generator = torch.Generator()
    while state.epoch < config.max_epochs and state.stale < config.patience:
        losses: dict[str, float] = {}
        for step in range(sampler.steps_per_epoch):
            generator.manual_seed(_step_seed(config.seed, state.epoch, step, hooks.rank))
            batch = sampler.batch(state.epoch, step, hooks.rank, hooks.world_size).to(device)
            loss, parts = wrapped(batch, generator)
            optimizer.zero_grad()
            loss.backward()
            stop_unless_finite(model, state.epoch, step, config.learning_rate, sampler.batch_size)
            optimizer.step()
            for name, part in parts.items():
                losses[name] = losses.get(name, 0.0) + part.item() / sampler.steps_per_epoch
        state.epoch += 1
        if state.epoch % config.evaluate_every == 0 or state.epoch == config.max_epochs:
            figures, recall = {f"{name}.loss": value for name, value in losses.items()}, state.best_recall
            if is_held_out:
                recall, ndcg = validate(model, data, hooks)
                figures |= {"recall@20": recall, "ndcg@10": ndcg}
            state.curve.append({"epoch": state.epoch, **figures})
            state.stale += 1
            if recall > state.best_recall or not is_held_out:
                state.best_recall, state.best_epoch, state.stale, best = recall, state.epoch, 0, _copy(model)
            hooks.save(state, model, best, optimizer, figures)
    model.load_state_dict(best)
    return model, state


def build_model(data: TrainData, config: TrainConfig) -> CLLMR:
    """A model for `data` before training; its side information is left aside where the side encoder is "none".

    Raises ConfigError when there is none and the encoder needs it.
    """
    bare = config.model.side_encoder == "none"
    if data.side is None and not bare:
        raise ConfigError(
            f"train.model.side_encoder = {config.model.side_encoder!r} needs side information, and there is none.",
            'Give texts and a spectrum, or set it to "none".',
        )
    model = CLLMR(config.model, Graph(*data.train.nonzero(), *data.train.shape), None if bare else data.side)
    if data.start is not None:
        with torch.no_grad():
            model.backbone.embedding[torch.from_numpy(data.start.rows)] = torch.from_numpy(data.start.values)
    return model


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Adam in one kernel per step, with λ_reg ‖Θ‖² (E18) as its weight decay.

    The gradient is the same 2 λ_reg Θ, without a pass over all tables forward and one back.
    """
    decay = 2 * config.model.l2_weight
    return torch.optim.Adam(model.parameters(), lr=config.learning_rate, weight_decay=decay, fused=True)


def make_sampler(train: sp.csr_array, config: TrainConfig) -> Sampler:
    """Batches of the training interactions; BPR draws one negative per interaction instead of shared ones."""
    users, items = train.nonzero()
    negatives = config.model.num_negatives if config.model.loss == "softmax" else 0
    return Sampler(users, items, train.shape[1], config.batch_size_of(train.nnz), negatives, config.seed)


def validate(model: CLLMR, data: TrainData, hooks: Hooks) -> tuple[float, float]:
    """Recall@20 and NDCG@10 on the validation interactions; the users are shared between the workers."""
    sums = validation_sums(model, data.train, data.held_out, hooks.rank, hooks.world_size)
    if hooks.world_size > 1:
        sums = sums.to(model.backbone.embedding.device)  # NCCL adds nothing that is on the CPU
        dist.all_reduce(sums)
    recall, ndcg, count = sums.tolist()
    return (recall / count, ndcg / count) if count else (0.0, 0.0)


def stop_unless_finite(model: nn.Module, epoch: int, step: int, learning_rate: float, batch_size: int) -> None:
    """Refuses an update that would destroy the weights. Gradients are summed over workers, so all of them stop together."""
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]).norm()
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"the gradient is not finite in epoch {epoch}, step {step} (learning rate {learning_rate}, batch size "
            f"{batch_size}). The weights were not changed; try a smaller train.learning_rate."
        )


class SingleProcess:
    """Hooks of a run without workers and without checkpoints."""

    rank, world_size = 0, 1

    def __init__(self, on_progress: Callable[..., None] = lambda **figures: None) -> None:
        self._on_progress = on_progress

    def wrap(self, model: CLLMR) -> nn.Module:
        return model

    def restore(self, model: CLLMR, optimizer: torch.optim.Optimizer) -> None:
        return None

    def save(
        self,
        state: TrainState,
        model: CLLMR,
        best: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        figures: dict[str, float],
    ) -> None:
        self._on_progress(epoch=state.epoch, **figures)


def fit_base(
    train: sp.csr_array, held_out: sp.csr_array, config: Mapping[str, Any], on_progress: Callable[..., None]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The backbone without side information, by the same loop and settings, in this process.

    Args:
        config: the train stage's config.
        on_progress: called after every validation with the epoch and its figures.

    Returns:
        Factors whose inner product is the score: users (num_users, dim + 1), items (num_items, dim + 1).
    """
    settings = TrainConfig.parse(config, "train")
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"side_encoder": "none"})})
    model, _ = fit(TrainData(train, held_out, side=None), settings, SingleProcess(on_progress))
    factors = model.representations().mediator
    return factors.users.numpy(), factors.items.numpy()


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0] >> 1)

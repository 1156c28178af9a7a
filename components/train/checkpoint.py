"""Checkpoints as safetensors and JSON: weights, best weights, optimiser and the place in the run. No pickle."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.artifacts import read_json, sha256_file, write_json
from components.errors import ArtifactError

STATE = "state.json"


@dataclass
class TrainState:
    """Where a run is, and the best it has seen."""

    epoch: int = 0
    """Epochs done."""
    best_epoch: int = 0
    best_recall: float = -1.0
    stale: int = 0
    """Validations since the best one."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry per validation: epoch, losses, validation metrics."""


def save_checkpoint(
    directory: Path, state: TrainState, model: nn.Module, best: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Writes a checkpoint; its state file is written last and carries the other files' sha256."""
    save_file(_contiguous(model.state_dict()), directory / "model.safetensors")
    save_file(_contiguous(best), directory / "best.safetensors")
    moments = {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    save_file(_contiguous(moments), directory / "optimizer.safetensors")
    files = {path.name: sha256_file(path) for path in sorted(directory.glob("*.safetensors"))}
    write_json(directory / STATE, {"state": asdict(state), "sha256": files})


def load_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[TrainState, dict[str, Tensor]]:
    """Restores `model` and `optimizer`; returns the state and the best weights.

    Raises ArtifactError when a file is missing or is not what was written; nothing is restored then.
    """
    description = check_checkpoint(directory)
    model.load_state_dict(load_file(directory / "model.safetensors"))
    restored = optimizer.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(directory / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    restored["state"] = moments
    optimizer.load_state_dict(restored)
    return TrainState(**description["state"]), load_file(directory / "best.safetensors")


def check_checkpoint(directory: Path) -> dict[str, Any]:
    """The contents of a whole checkpoint's state file; raises ArtifactError naming what is wrong with a damaged one."""
    try:
        description: dict[str, Any] = read_json(directory / STATE)
        damaged = [name for name, digest in description["sha256"].items() if sha256_file(directory / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a state file can be any JSON
        raise ArtifactError(
            f"checkpoint {directory} cannot be read: {error}.", "An older one is used if there is one."
        ) from None
    if damaged:
        raise ArtifactError(f"checkpoint {directory}: {damaged[0]} is damaged.", "An older one is used if there is one.")
    return description


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

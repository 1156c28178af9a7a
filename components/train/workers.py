"""Ray Train around the loop: workers, data-parallel gradients, checkpoints that survive a killed worker."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import scipy.sparse as sp
import torch
from pyarrow.fs import FileSelector, FileSystem
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, prepare_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.artifacts import read_json, write_json
from components.cllmr.model import CLLMR, SideInformation
from components.errors import ArtifactError
from components.progress import emit
from components.train.checkpoint import TrainState, check_checkpoint, load_checkpoint, save_checkpoint
from components.train.config import TrainConfig
from components.train.graph import as_arrays, training_data
from components.train.loop import Start, TrainData, fit
from components.train.members import GraphFit, RecipeData, TrainGraph

RESULT = "result.safetensors"
RUN = "result.json"
TENSORS = tuple(name for name in GraphFit._fields if name != "run")
Arrays = dict[str, npt.NDArray[Any]]
Place = tuple[FileSystem, str]
"""A file system and a path in it."""


def trained_by_workers(work: Place, starts: Mapping[str, Start]) -> TrainGraph:
    """Trains on Ray workers, each run with its checkpoints in a directory of its own at `work`.

    Args:
        work: see `run_workers`.
        starts: what a run begins with, by its name up to a point; a run that has none is a cold start.
    """

    def train(data: RecipeData, config: TrainConfig, run: str) -> GraphFit:
        training = replace(training_data(data), start=starts.get(run.partition(".")[0]))
        with run_workers(pack(training), config, work, run).as_directory() as directory:
            tensors = load_file(Path(directory) / RESULT)
            told = read_json(Path(directory) / RUN)
        return GraphFit(**{name: tensors[name].numpy() for name in TENSORS}, run=told)

    return train


def run_workers(arrays: Arrays, config: TrainConfig, work: Place, run: str) -> Checkpoint:
    """Trains on `config.num_workers` Ray workers; the same call again goes on from the newest valid checkpoint.

    Args:
        arrays: see `pack`.
        work: where all nodes of the Ray cluster can write: checkpoints live there.
        run: the run's name.

    Returns:
        The last checkpoint, which also holds the result (`RESULT` and `RUN`).
    """
    filesystem, path = work
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "arrays": ray.put(arrays),
            "config": config.model_dump(mode="json"),
            "environment": _inherited(),
            "run": run,
            "place": (filesystem, f"{path}/{run}"),
        },
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=_resources(config)
        ),
        run_config=RunConfig(
            name=run,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=3),
        ),
    )
    checkpoint: Checkpoint | None = trainer.fit().checkpoint
    assert checkpoint is not None, "every run ends with a checkpoint that holds its result"
    return checkpoint


def pack(data: TrainData) -> Arrays:
    """The training data as plain arrays, which Ray shares between the workers of a machine without copying."""
    arrays: Arrays = {"shape": np.array(data.train.shape)}
    for name, matrix in (("train", data.train), ("held_out", data.held_out)):
        arrays[f"{name}_indptr"], arrays[f"{name}_indices"] = matrix.indptr, matrix.indices
    if data.side is not None:
        arrays["text"], arrays["spectrum"] = data.side.text.numpy(), data.side.spectrum.numpy()
    if data.start is not None:
        arrays["start_rows"], arrays["start_values"] = data.start
    return arrays


def unpack(arrays: Arrays) -> TrainData:
    """The inverse of `pack`; the arrays are copied, as Ray's are read-only and torch wants its own."""

    def matrix(name: str) -> sp.csr_array:
        indptr, indices = arrays[f"{name}_indptr"].copy(), arrays[f"{name}_indices"].copy()
        return sp.csr_array((np.ones(len(indices), dtype=np.float32), indices, indptr), shape=tuple(arrays["shape"]))

    side = None
    if "text" in arrays:
        side = SideInformation(*(torch.from_numpy(arrays[name].copy()) for name in ("text", "spectrum")))
    start = Start(arrays["start_rows"].copy(), arrays["start_values"].copy()) if "start_rows" in arrays else None
    return TrainData(matrix("train"), matrix("held_out"), side, start)


class RayHooks:
    """Hooks of one Ray Train worker.

    Args:
        config: of the stage.
        run: the run's name.
        place: where its checkpoints are.
    """

    def __init__(self, config: TrainConfig, run: str, place: Place) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._config, self._run, self._place = config, run, place

    def wrap(self, model: CLLMR) -> nn.Module:
        # the graph is a buffer that every worker builds from the same data: nothing to broadcast
        wrapped: nn.Module = prepare_model(model, parallel_strategy_kwargs={"broadcast_buffers": False})
        return wrapped

    def restore(self, model: CLLMR, optimizer: torch.optim.Optimizer) -> tuple[TrainState, dict[str, Tensor]] | None:
        path = broadcast_from_rank_zero(self._newest() if self.rank == 0 else None)  # all workers go on from the same one
        if path is None:
            return None
        with Checkpoint(path, self._place[0]).as_directory() as directory:
            return load_checkpoint(Path(directory), model, optimizer)

    def _newest(self) -> str | None:
        """Path of the newest checkpoint of this run that is whole.

        Ray's own word on it, `ray.train.get_checkpoint`, lags: of a node that is lost seconds after a checkpoint was written it
        may not know it yet, and training would begin anew.
        """
        filesystem, directory = self._place
        found = filesystem.get_file_info(FileSelector(directory, allow_not_found=True))
        paths: list[str] = [info.path for info in found if info.base_name.startswith("checkpoint_2")]
        for path in sorted(paths, reverse=True):  # their names are times
            with Checkpoint(path, filesystem).as_directory() as local:
                try:
                    check_checkpoint(Path(local))
                except ArtifactError as error:
                    emit("checkpoint refused", stage="train", path=path, reason=error.message)
                else:
                    return path
        return None

    def save(
        self,
        state: TrainState,
        model: CLLMR,
        best: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        figures: dict[str, float],
    ) -> None:
        if self.rank != 0:
            ray.train.report(figures)
            return
        emit(
            "progress",
            stage="train",
            done=state.epoch,
            total=self._config.max_epochs,
            unit="epochs",
            model=f"graph, {self._run}",
            **{name: round(value, 4) for name, value in figures.items() if name in ("ranking.loss", "recall@20", "ndcg@10")},
        )
        with tempfile.TemporaryDirectory() as directory:
            save_checkpoint(Path(directory), state, model, best, optimizer)
            ray.train.report(figures, checkpoint=Checkpoint.from_directory(directory))


def _worker(loop_config: dict[str, Any]) -> None:
    os.environ.update(loop_config["environment"])
    config = TrainConfig.parse(loop_config["config"], "train")
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    hooks = RayHooks(config, loop_config["run"], loop_config["place"])
    model, state = fit(unpack(ray.get(loop_config["arrays"])), config, hooks)
    if hooks.rank != 0:
        ray.train.report({"epoch": state.epoch})
        return
    with tempfile.TemporaryDirectory() as directory:
        fitted = as_arrays(model, state)
        tensors = {name: torch.from_numpy(getattr(fitted, name)).contiguous() for name in TENSORS}
        save_file(tensors, Path(directory) / RESULT)
        write_json(Path(directory) / RUN, fitted.run)
        ray.train.report({"epoch": state.epoch}, checkpoint=Checkpoint.from_directory(directory))


def _resources(config: TrainConfig) -> dict[str, float]:
    return {"CPU": config.cpus_per_worker, **({"GPU": 1.0} if config.use_gpu else {})}


def _inherited() -> dict[str, str]:
    """Variables of this process that a worker on the same machine needs: where to tell its progress."""
    return {name: os.environ[name] for name in ("CLLMR_EVENTS",) if name in os.environ}

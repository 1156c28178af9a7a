"""Search over a model's whole grid, by Ray Tune: all its settings, as many at once as there are workers.

The search that every model has without it (`components.train.search`) climbs, one fit after the other: fewer fits, and the same
for ours and for rivals. This one is for grids whose best place should not be missed, and for machines with many cores.
"""

import os
from collections.abc import Callable
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

from components.errors import UserError
from components.evaluate.metrics import PRIMARY, rank
from components.experiment.config import ModelSpec
from components.experiment.dataset import ExperimentData
from components.experiment.models import KINDS, Task
from components.train.search import Settings


def validation_value(data: ExperimentData, spec: ModelSpec, settings: Settings, seed: int) -> float:
    """Validation NDCG@10 of one place on the grid."""
    fitted = KINDS[spec.kind].fit(Task(data, {**spec.settings, **settings}, seed))
    return float(rank(fitted.scores.score, data.train, data.validation).mean()[PRIMARY])


def search(
    load: Callable[[], ExperimentData], spec: ModelSpec, seed: int, parallel: int, advance: Callable[[], None]
) -> tuple[Settings, list[Settings]]:
    """The best settings of the grid, and all of them with their validation NDCG@10 as "value", in the grid's order.

    Ray is running. Of equally good settings the first is taken.

    Args:
        load: the data, on a worker.
        spec: has a grid.
        seed: of every fit.
        parallel: fits at once.
        advance: told of every fit that is done.

    Raises:
        UserError: what a fit finds wrong with settings or data.
    """
    from ray import tune

    class Told(tune.Callback):
        def __init__(self, advance: Callable[[], None]) -> None:
            self.advance = advance

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune keeps its callbacks in a file, where a display cannot lie

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.advance()

    def trial(settings: Settings) -> dict[str, Any]:
        try:
            return {PRIMARY: validation_value(load(), spec, settings, seed)}
        except UserError as error:  # as a value: Ray wraps what is raised
            return {PRIMARY: float("-inf"), "error": error}

    # its loggers write files that nobody reads; it looks at the variable when a search begins
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    with TemporaryDirectory(prefix="cllmr-tune-") as folder:
        found = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={name: tune.grid_search(list(values)) for name, values in spec.grid.items()},
            tune_config=tune.TuneConfig(metric=PRIMARY, mode="max", max_concurrent_trials=parallel),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[Told(advance)]),
        ).fit()
        for failed in found.errors:
            raise failed
        measured = [(found[number].config, found[number].metrics) for number in range(len(found))]
    values: dict[tuple[Any, ...], float] = {}
    for settings, metrics in measured:
        assert settings is not None, "a trial has settings"
        assert metrics is not None, "a trial that did not fail has a result"
        if "error" in metrics:
            raise metrics["error"]
        values[tuple(settings[name] for name in spec.grid)] = metrics[PRIMARY]
    places = list(product(*spec.grid.values()))
    best = max(places, key=lambda place: values[place])
    tried = [{**dict(zip(spec.grid, place, strict=True)), "value": round(values[place], 6)} for place in places]
    return {**spec.settings, **dict(zip(spec.grid, best, strict=True))}, tried

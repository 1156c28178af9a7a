"""What a unit of work can be, by name: data, settings and a seed in, an outcome out."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from components.evaluate import bias
from components.evaluate.metrics import rank
from components.experiment import coldstart, coldusers, propensity_study
from components.experiment.config import ModelSpec
from components.experiment.dataset import ExperimentData
from components.experiment.models import KINDS, Task, Tell, silent, tune
from components.experiment.store import Outcome

BLOCK = 512  # users scored at once


def evaluate_model(data: ExperimentData, settings: Mapping[str, Any], seed: int, tell: Tell = silent) -> Outcome:
    """Task "model": tunes a model, or fits it with the settings that the first seed chose, and ranks validation and test.

    Args:
        settings: "spec", a `ModelSpec`; "chosen", what the first seed's outcome says or a search found, or None to tune.
    """
    spec = ModelSpec.model_validate({"name": "model", **settings["spec"]})
    chosen = settings["chosen"]
    if chosen is None:
        tuned = tune(spec, data, seed, tell)
        fitted, used, tried = tuned.fitted, tuned.settings, tuned.tried
    else:
        used, tried = chosen["settings"], chosen.get("tried", [])
        fitted = KINDS[spec.kind].fit(Task(data, used, seed, chosen=chosen["inner"], tell=tell))
    arrays: dict[str, Any] = {}
    facts: dict[str, Any] = {"chosen": {"settings": used, "inner": fitted.chosen}, "tried": tried, **fitted.facts}
    for split, held_out in (("val", data.validation), ("test", data.test)):
        ranking = rank(fitted.scores.score, data.train, held_out, BLOCK)
        arrays |= {f"{split}.{name}": values for name, values in ranking.per_user.items()}
        facts[split] = ranking.mean()
        if split == "test":
            popularity = np.bincount(data.train.indices, minlength=data.num_items)
            facts["bias"] = bias.exposure_summary(ranking.top_items[:, :10], popularity)
            facts["users_evaluated"] = len(ranking.users)
    return Outcome(facts, arrays)


TASKS: dict[str, Callable[[ExperimentData, Mapping[str, Any], int, Tell], Outcome]] = {
    "model": evaluate_model,
    "coldstart": coldstart.measure,
    "coldusers": coldusers.measure,
    "propensity": propensity_study.measure,
    "exposure": propensity_study.exposure,
}

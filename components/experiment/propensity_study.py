"""The propensity benchmark as a unit of work: what a formulation removes of a known propensity, and what that costs."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from components.cllmr.effects import EFFECTS
from components.cllmr.linear.ease import EaseSettings
from components.evaluate.metrics import ScoreBlock
from components.experiment import propensity
from components.experiment.config import GATES, ModelSpec
from components.experiment.dataset import ExperimentData
from components.experiment.models import KINDS, Task
from components.experiment.store import Outcome


def measure(data: ExperimentData, settings: Mapping[str, Any], seed: int) -> Outcome:
    """Task "propensity": see `components.experiment.propensity.measure`.

    Args:
        settings: "kind", "strength" and "lure" of the injection; "formulation", `GATES` or one of
            `components.cllmr.effects.EFFECTS`; "model": of `GATES` the settings of the graph model that has them, of the
            others those of EASE.
    """
    original, injected = _injected(data, settings, seed)
    if settings["formulation"] == GATES:
        removal, facts = _gates(data, original, injected, settings["model"], seed)
    else:
        model = propensity.ease(EaseSettings(**settings["model"]))
        removal, facts = propensity.study(original, injected, EFFECTS[settings["formulation"]], model), {}
    lured = injected.num_lured / injected.data.train.nnz
    return Outcome({**asdict(removal), "num_lured": injected.num_lured, "lured_share": lured, **facts}, {})


def exposure(data: ExperimentData, settings: Mapping[str, Any], seed: int) -> Outcome:
    """Task "exposure": the share of the top ten that the injected items hold, with one model on one world.

    Args:
        settings: "kind", "strength" and "lure" of the injection, the items are the same for every kind; "spec", a `ModelSpec`
            without a grid.
    """
    original, injected = _injected(data, settings, seed)
    spec = ModelSpec.model_validate({"name": "model", **settings["spec"]})
    scores = KINDS[spec.kind].fit(Task(_in_world(data, injected.data), spec.settings, seed)).scores
    share = propensity.injected_share(scores.score, injected.data.train, original.test, injected.items)
    return Outcome({"exposure": share, "lured_share": injected.num_lured / injected.data.train.nnz}, {})


def _injected(data: ExperimentData, settings: Mapping[str, Any], seed: int) -> tuple[propensity.Data, propensity.Injected]:
    """The data as they are, and with the propensity that the settings describe."""
    assert data.item_text is not None, "texts are embedded before a study"
    original = propensity.Data(data.train, data.validation, data.test, data.item_text)
    return original, propensity.inject(original, settings["kind"], settings["strength"], seed, lure=settings["lure"])


def _in_world(data: ExperimentData, world: propensity.Data) -> ExperimentData:
    """The data set with the world's interactions and texts. A user is the mean of the items' texts, injected or not: own texts
    would not know of the praise."""
    assert data.own_user_text is not None, "users' texts are embedded with the items'"
    return replace(
        data,
        train=world.train,
        validation=world.validation,
        item_text=world.item_text,
        own_user_text=0 * data.own_user_text,
    )


def _gates(
    data: ExperimentData, original: propensity.Data, injected: propensity.Injected, model: Mapping[str, Any], seed: int
) -> tuple[propensity.Removal, dict[str, Any]]:
    """A graph model without gates on both data, and one with gates, whose λ is chosen on validation."""

    def fitted(world: propensity.Data, effect: str) -> tuple[ScoreBlock, Any]:
        found = KINDS["graph"].fit(Task(_in_world(data, world), {**model, "effect": effect}, seed))
        return found.scores.score, found.facts.get("debias")

    clean, _ = fitted(original, "none")
    inflated, _ = fitted(injected.data, "none")
    debiased, debias = fitted(injected.data, "tnie")
    return propensity.measure(clean, inflated, debiased, injected, original), {"debias": debias}

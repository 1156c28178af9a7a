"""The propensity benchmark as a unit of work: what a formulation removes of a known propensity, and what that costs."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from components.cllmr.effects import EFFECTS
from components.cllmr.linear.ease import EaseSettings
from components.evaluate.metrics import ScoreBlock
from components.experiment import propensity
from components.experiment.config import GATES, OURS, Kind, ModelSpec
from components.experiment.dataset import ExperimentData
from components.experiment.models import KINDS, Task, Tell, silent
from components.experiment.store import Outcome

REFITTED: dict[str, tuple[Kind, dict[str, Any], dict[str, Any]]] = {
    GATES: ("graph", {"effect": "none"}, {"effect": "tnie"}),  # λ chosen on validation
    OURS: ("recipe", {"effect": "none"}, {"debias_grid": (1.0,)}),
}
"""Formulation -> kind of the model that has it, settings without and with it."""


def measure(data: ExperimentData, settings: Mapping[str, Any], seed: int, tell: Tell = silent) -> Outcome:
    """Task "propensity": see `components.experiment.propensity.measure`.

    Args:
        settings: "kind", "strength" and "lure" of the injection; "formulation", `GATES`, `OURS` or one of
            `components.cllmr.effects.EFFECTS`; "model": of `GATES` the settings of the graph model that has them, of `OURS`
            those of the recipe, of the others those of EASE; "chosen": what the recipe was tuned to on clean data.
    """
    original, injected = _injected(data, settings, seed)
    if settings["formulation"] in REFITTED:
        removal, facts = _refitted(data, original, injected, settings, seed, tell)
    else:
        model = propensity.ease(EaseSettings(**settings["model"]))
        removal, facts = propensity.study(original, injected, EFFECTS[settings["formulation"]], model), {}
    lured = injected.num_lured / injected.data.train.nnz
    return Outcome({**asdict(removal), "num_lured": injected.num_lured, "lured_share": lured, **facts}, {})


def exposure(data: ExperimentData, settings: Mapping[str, Any], seed: int, tell: Tell = silent) -> Outcome:
    """Task "exposure": the share of the top ten that the injected items hold, with one model on one world.

    Args:
        settings: "kind", "strength" and "lure" of the injection, the items are the same for every kind; "spec", a `ModelSpec`
            without a grid.
    """
    original, injected = _injected(data, settings, seed)
    spec = ModelSpec.model_validate({"name": "model", **settings["spec"]})
    scores = KINDS[spec.kind].fit(Task(_in_world(data, injected.data), spec.settings, seed, tell=tell)).scores
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


def _refitted(
    data: ExperimentData,
    original: propensity.Data,
    injected: propensity.Injected,
    settings: Mapping[str, Any],
    seed: int,
    tell: Tell,
) -> tuple[propensity.Removal, dict[str, Any]]:
    """A formulation that is trained with its model: one without on both data, and one with it on those that were injected."""
    kind, without, with_effect = REFITTED[settings["formulation"]]

    def fitted(world: propensity.Data, own: Mapping[str, Any]) -> tuple[ScoreBlock, Any]:
        task = Task(_in_world(data, world), {**settings["model"], **own}, seed, chosen=settings.get("chosen"), tell=tell)
        found = KINDS[kind].fit(task)
        return found.scores.score, found.facts.get("debias")

    clean, _ = fitted(original, without)
    inflated, _ = fitted(injected.data, without)
    debiased, debias = fitted(injected.data, with_effect)
    return propensity.measure(clean, inflated, debiased, injected, original), {"debias": debias}

"""The recipe: five members whose side information is CLLMR's, joined into one score; everything tuned on validation.

1. ``graph``: a graph backbone trained with the side encoder (alignment, spectrum prior): the collaborative view, and the side
   representations z that carry text into the collaborative space.
2. ``ease``: normalised EASE; text and z enter by their Gram matrix (`components.cllmr.linear.ease`).
3. ``factors``: implicit ALS whose item factors are drawn towards what their side information says
   (`components.cllmr.linear.factors`).
4. ``text``: similarity to the texts of the user's items alone, for items that nobody knows yet
   (`components.cllmr.linear.kernel`).
5. ``popularity``: log of the item's interactions; a negative weight takes popularity out.

The score is the sum of the standardised members with weights from validation (`components.cllmr.linear.ensemble`), in the form
that is served (`components.cllmr.linear.scores`). Where there is no text, the encoder, the Gram matrix and ``text`` are left
out: the rest is the same.

Counterfactual: with a propensity that is told from taste by the clicks (`components.cllmr.effects`), the recipe is fitted once
more on the log as it would be had the texts lured nobody, and asked with its histories: every member with the same settings,
the weights from those validation interactions that are of taste. With reference texts, it is the recipe less the score that is
carried by what the language model writes anyway. With gates, the graph member knows its own counterfactual. The difference of
the two models is the natural direct effect.

What was chosen on validation can be fitted once more to all interactions (`fit_again`): that is what is served, for the
latest ones say most of what comes next.

Here is the course of it; how a member is fitted is in `components.train.members`, what an effect does in
`components.train.counterfactual`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from components.cllmr.linear.folding import MemberColumns, fit_folding
from components.cllmr.linear.scores import LinearScores
from components.errors import DataError
from components.evaluate.metrics import PRIMARY
from components.progress import emit
from components.train.config import MemberName, TrainConfig
from components.train.counterfactual import EFFECTS, Counterfactual
from components.train.members import FloatMatrix, GraphFit, Member, Progress, RecipeData, TrainGraph, fit_members, join
from components.train.search import Settings

HISTORY_MEMBERS: tuple[MemberName, ...] = ("ease", "text")
"""Members whose score is made of weights between items: they answer anybody who has a history."""
FOLDING_L2: dict[str, float] = {"graph": 1.0, "factors": 0.1}
"""Members that know their users by a row of numbers, which for anybody else is told from the history, and the ridge of that
(``tests/benchmarks/RESULTS.md``)."""
FEWEST_CHOOSING = 100
"""Users with validation interactions, by whom everything is chosen: of fewer, what is best is mostly chance."""
AGAIN = "all"
"""After a point in the name of a graph model's run: with all interactions."""
MANY_EDGES = 1_000_000_000
"""Of an epoch, about a quarter of an hour on two cores."""


class Choices(NamedTuple):
    """What a recipe has chosen by validation: all that it takes to fit it again."""

    settings: dict[str, Settings]
    """Of each member."""
    weights: dict[str, float]
    counterfactual_weights: dict[str, float]
    epochs: dict[str, int]
    """Of each run of the graph member: after so many it was best."""


@dataclass(frozen=True)
class FittedRecipe:
    """A fitted recipe."""

    factual: LinearScores
    """TE: the score as it is."""
    counterfactual: LinearScores
    """TE - NDE: the score without the text's propensity, the same object as `factual` with the effect "none"."""
    propensity: FloatMatrix
    """How much an item's text speaks for it whatever the user, (num_items,): the share of its clicks that the text brought
    in, or its gate."""
    members: dict[str, Member]
    weights: dict[str, float]
    """Of the members in the factual model."""
    counterfactual_weights: dict[str, float]
    counterfactual_popularity: FloatMatrix | None
    """Popularity as the counterfactual scores it, before its weight: see `components.train.counterfactual.Other`."""
    validation: dict[str, float]
    """Validation NDCG@10 of each member, and of the "ensemble"; empty where nothing was held out."""
    cpu_seconds: dict[str, float]
    """Of this process by member, tuning included, and of the "ensemble", the "counterfactual" and the new users' "folding"."""
    left_out: dict[str, str]
    """Members of the config that these data do without, and why."""
    graphs: dict[str, GraphFit]
    """The graph member's models by the name of their run, "factual" and "counterfactual"; empty without that member."""

    @property
    def settings(self) -> dict[str, Settings]:
        """What `fit_recipe` takes to fit another seed without tuning again."""
        return {name: member.settings for name, member in self.members.items()}

    @property
    def choices(self) -> Choices:
        """What `fit_again` takes."""
        epochs = {run: graph.run["best_epoch"] for run, graph in self.graphs.items()}
        return Choices(self.settings, self.weights, self.counterfactual_weights, epochs)

    @property
    def history_blocks(self) -> dict[str, list[tuple[str, float]]]:
        """Members that score a history, with their weights, in the order in which their weights between items lie in the
        "factual" and the "counterfactual" model."""
        return {
            name: [(member, weight) for member, weight in weights.items() if member in HISTORY_MEMBERS and weight]
            for name, weights in (("factual", self.weights), ("counterfactual", self.counterfactual_weights))
        }

    @property
    def graph(self) -> GraphFit | None:
        """The graph member's model."""
        return self.members["graph"].graph if "graph" in self.members else None


def fit_recipe(
    data: RecipeData,
    config: TrainConfig,
    train_graph: TrainGraph,
    settings: Mapping[str, Settings] | None = None,
    on_progress: Progress = lambda **figures: None,
) -> FittedRecipe:
    """Tunes all members and joins them; given the `settings` that another seed was tuned to, only fits them.

    Args:
        data: interactions, text and spectrum.
        config: settings and grids.
        train_graph: how a graph model is trained.
        settings: `FittedRecipe.settings`.
        on_progress: told the member and its figures.

    Raises:
        DataError: there are no validation interactions, by which everything is chosen, no texts that the effect needs, or no
            member that the data allow.
    """
    if not data.validation.nnz:
        raise DataError(
            f"there are no validation interactions: {data.train.nnz} are in the training split.",
            "Give more interactions, or lower the thresholds and the k-core of ingest.",
        )
    if config.effect == "reference_texts" and data.item_references is None:  # said now: the effect comes after all fits
        raise DataError(
            "train.effect is 'reference_texts' and there are none: only an LLM writes them.",
            "Set sideinfo.backend to one with an LLM and run from sideinfo, or choose another train.effect.",
        )
    if (users := int(np.count_nonzero(np.diff(data.validation.indptr)))) < FEWEST_CHOOSING:
        message = (
            f"{users} users have validation interactions: settings, members' weights and λ are chosen by them, which is mostly "
            f"chance below {FEWEST_CHOOSING}; a simple baseline may do better on the test interactions"
        )
        emit("warning", stage="train", message=message)
    names, left_out = _members_for(data, config)
    seconds: dict[str, float] = {}
    members = fit_members(names, data, config, train_graph, settings, seconds, on_progress)
    start = time.process_time()
    factual, weights = join(members, data, data.validation, config)
    validation = {name: data.validation_ndcg(member.scores) for name, member in members.items()}
    validation["ensemble"] = data.validation_ndcg(factual)
    seconds["ensemble"] = time.process_time() - start
    on_progress(member="ensemble", **{PRIMARY: validation["ensemble"]})
    asked = Counterfactual(data, config, train_graph, members, weights, factual, on_progress)
    return _with_counterfactual(asked, validation, seconds, left_out)


def fit_again(
    choices: Choices,
    data: RecipeData,
    config: TrainConfig,
    train_graph: TrainGraph,
    on_progress: Progress = lambda **figures: None,
) -> FittedRecipe:
    """The recipe with all that it has chosen before, fitted to other interactions, none of which is held out.

    Args:
        choices: of the recipe that was fitted to a part of them.
        data: all interactions; `data.validation` is empty.
        config: what that recipe was fitted with.
        train_graph: how a graph model is trained, here for as many epochs as before.
        on_progress: told the member and its figures.
    """

    def train_as_long(data: RecipeData, config: TrainConfig, run: str) -> GraphFit:
        epochs = choices.epochs.get(run, choices.epochs["factual"])
        # at least one: what training began with knows nothing of what is new
        return train_graph(data, config.model_copy(update={"max_epochs": max(1, epochs)}), f"{run}.{AGAIN}")

    seconds: dict[str, float] = {}
    names: list[MemberName] = [name for name in config.recipe.members if name in choices.settings]
    members = fit_members(names, data, config, train_as_long, choices.settings, seconds, on_progress)
    factual, weights = join(members, data, data.validation, config, weights=choices.weights)
    asked = Counterfactual(data, config, train_as_long, members, weights, factual, on_progress, choices.counterfactual_weights)
    return _with_counterfactual(asked, {}, seconds, {})


def _with_counterfactual(
    asked: Counterfactual, validation: dict[str, float], seconds: dict[str, float], left_out: dict[str, str]
) -> FittedRecipe:
    """The factual model with its counterfactual, both with what they make of a history.

    Args:
        asked: the factual model.
        validation, seconds, left_out: of it so far, see `FittedRecipe`.
    """
    data, members, weights, factual = asked.data, asked.members, asked.weights, asked.factual
    start = time.process_time()
    other = EFFECTS[asked.config.effect](asked)
    seconds["counterfactual"] = time.process_time() - start
    start = time.process_time()
    counterfactual = _folding_in(other.scores, other.members or members, other.weights, data.train)
    factual = counterfactual if other.scores is factual else _folding_in(factual, members, weights, data.train)
    seconds["folding"] = time.process_time() - start
    fits = {"factual": members, "counterfactual": other.members}
    graphs = {run: fit["graph"].graph for run, fit in fits.items() if "graph" in fit and fit["graph"].graph is not None}
    return FittedRecipe(
        factual=factual,
        counterfactual=counterfactual,
        propensity=other.propensity,
        members=members,
        weights=weights,
        counterfactual_weights=other.weights,
        counterfactual_popularity=other.popularity,
        validation=validation,
        cpu_seconds=seconds,
        left_out=left_out,
        graphs=graphs,
    )


def _folding_in(
    model: LinearScores, members: Mapping[str, Member], weights: Mapping[str, float], train: sp.csr_array
) -> LinearScores:
    """The model with what it makes of a history whose user it does not know.

    Args:
        model: the members joined, their columns side by side in this order.
        members: of it.
        weights: of the members; those of weight 0 are not in it.
        train: training interactions, also where the members learned from some of them.
    """
    columns, start = [], 0
    for name, member in members.items():
        if weights[name]:
            stop = start + member.scores.users.shape[1]
            columns += [MemberColumns(slice(start, stop), FOLDING_L2[name])] if name in FOLDING_L2 else []
            start = stop
    if not columns:
        return model
    assert isinstance(model.items, np.ndarray)  # compact ones are in endpoints alone
    return replace(model, folding=fit_folding(model.users, model.items, train, columns))


def _members_for(data: RecipeData, config: TrainConfig) -> tuple[list[MemberName], dict[str, str]]:
    """The members that the data allow, at least one, and why the others are left out."""
    left_out: dict[str, str] = {
        name: reason for name in config.recipe.members if (reason := _reason_against(name, data, config))
    }
    names = [name for name in config.recipe.members if name not in left_out]
    if not names:
        reasons = ", ".join(f"'{name}' ({reason})" for name, reason in left_out.items())
        raise DataError(
            f"train.recipe.members has none that these data allow: without {reasons}.",
            "Add 'graph', 'factors' or 'popularity', which need neither text nor a small catalogue.",
        )
    batch_size = config.batch_size_of(data.train.nnz)
    edges = data.train.nnz**2 // batch_size
    if "graph" in names and edges > MANY_EDGES:
        message = (
            f"an epoch of the graph member propagates {edges:,} edges ({data.train.nnz:,} interactions in each of the steps of "
            f"train.batch_size = {batch_size:,}): set a larger one, or train.recipe.members without 'graph'"
        )
        emit("warning", stage="train", message=message)
    return names, left_out


def _reason_against(name: MemberName, data: RecipeData, config: TrainConfig) -> str | None:
    num_items, allowed = data.train.shape[1], config.recipe.max_items
    if name == "text" and not data.has_text:
        return "the items have no text"
    if name in ("ease", "text") and num_items > allowed:
        return f"{num_items:,} items are more than recipe.max_items = {allowed:,}"
    return None

"""The recipe's counterfactual, one function for each effect: what the score would be without the text's propensity."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from components.cllmr.effects.click_propensity import ClickPropensity, estimate
from components.cllmr.effects.reference_texts import share_written_anyway, without_carried
from components.cllmr.effects.subspace import project_out
from components.cllmr.linear.ease import centred_unit_rows
from components.cllmr.linear.scores import LinearScores, Standard, by_popularity, joined
from components.progress import emit
from components.train.config import EffectName, TrainConfig
from components.train.members import FloatMatrix, Member, Progress, RecipeData, TasteData, TrainGraph, fit_members, join, log_of
from components.train.search import Settings


@dataclass(frozen=True)
class Counterfactual:
    """What a counterfactual is made of."""

    data: RecipeData
    config: TrainConfig
    train_graph: TrainGraph
    members: dict[str, Member]
    weights: dict[str, float]
    factual: LinearScores
    on_progress: Progress
    chosen: dict[str, float] | None = None
    """The counterfactual's own weights, where they have been chosen before."""

    @property
    def nothing(self) -> "Other":
        """No propensity: the factual model."""
        return Other(self.factual, self.weights, np.zeros(self.data.train.shape[1], dtype=np.float32), {})


class Other(NamedTuple):
    """A counterfactual model."""

    scores: LinearScores
    weights: dict[str, float]
    propensity: FloatMatrix
    members: dict[str, Member]
    """Those that were fitted for it."""
    popularity: FloatMatrix | None = None
    """As this model scores it, standardised, before its weight, (num_items,); None: as the factual one does."""


def _on_taste(asked: Counterfactual) -> Other:
    """The recipe on the log of taste."""
    data = asked.data
    if not data.has_text:
        return asked.nothing
    found = estimate(data.train, data.item_text)
    if not found.share.any():
        return asked.nothing
    asked.on_progress(member="counterfactual", lured_clicks=float(found.lured.sum()))
    return _refitted(asked, _without_propensity(data, found, asked.config), found.share.astype(np.float32))


def _without_propensity(data: RecipeData, found: ClickPropensity, config: TrainConfig) -> TasteData:
    """The data as they would be, had the texts lured nobody."""
    text = data.item_text
    if config.effect == "counterfactual_log":
        text = centred_unit_rows(project_out(text, found.direction[:, None]))
    return TasteData(
        data.train,
        data.validation,
        data.user_text,
        text,
        data.user_spectrum,
        data.item_spectrum,
        log=found.taste_log(),
        likely=found.likely_taste(),
    )


def _of_taste(data: RecipeData) -> sp.csr_array:
    """The validation interactions that are more likely of taste than lured, all of them where none is."""
    likely = estimate(sp.csr_array(data.train + data.validation), data.item_text).likely_taste()
    kept = sp.csr_array(data.validation.multiply(likely))
    kept.eliminate_zeros()
    return kept if kept.nnz else data.validation


def _refitted(asked: Counterfactual, other: RecipeData, propensity: FloatMatrix) -> Other:
    """The recipe with the members and settings of the factual one on `other` data, weights chosen on the validation
    interactions of taste.

    Where these are all of them, there is nothing to choose anew by: a second choice would find other weights that are as good,
    and the difference of the two would be told as a direct effect.
    """
    needed = {name for name, weight in asked.weights.items() if weight}
    if "ease" in needed and asked.members["ease"].settings["side_mix"]:
        needed.add("graph")  # its side representations are in the Gram matrix
    names = [name for name in asked.config.recipe.members if name in needed]
    settings: dict[str, Settings] = {name: asked.members[name].settings for name in names}
    members = fit_members(names, other, asked.config, asked.train_graph, settings, {}, asked.on_progress, "counterfactual")
    validation, given = asked.data.validation, asked.chosen
    if given is None:
        validation = _of_taste(asked.data)
        given = asked.weights if validation.nnz == asked.data.validation.nnz else None
    model, weights = join(members, asked.data, validation, asked.config, asked.weights, given)
    popularity = by_popularity(np.asarray(log_of(other).sum(axis=0), dtype=np.float64))
    return Other(_shared_where_equal(model, asked.factual), weights, propensity, members, popularity)


def _without_references(asked: Counterfactual) -> Other:
    """The factual model less what the reference texts carry; an item's propensity is the share of its text that is along."""
    data = asked.data
    assert data.item_references is not None, "refused before anything was fitted"
    share = share_written_anyway(data.item_text, data.item_references)
    if not share.any():
        return asked.nothing
    popularity = by_popularity(np.asarray(data.train.sum(axis=0), dtype=np.float64))
    without, popular = (
        without_carried(model, data.item_text, data.item_references)
        for model in (asked.factual, LinearScores.of_factors(np.ones((1, 1)), popularity[:, None]))
    )
    assert isinstance(popular.items, np.ndarray)  # compact ones are in endpoints alone
    return Other(without, asked.weights, share, {}, popular.items[:, 0])


def _gates(asked: Counterfactual) -> Other:
    """The graph member with its match alone, in the factual standardisation; the others as they are."""
    graph = asked.members["graph"].graph if "graph" in asked.members else None
    if asked.config.model.side_encoder == "none":
        message = "train.effect = 'gates' has no effect with train.model.side_encoder = 'none': gates are told from its output"
        emit("warning", stage="train", message=message)
    if graph is None or not graph.item_side.shape[1]:  # gates are told from side representations
        return asked.nothing
    standards = [Standard.of(member.scores) for member in asked.members.values()]
    scores = [graph.counterfactual if name == "graph" else member.scores for name, member in asked.members.items()]
    model = joined(scores, list(asked.weights.values()), standards)
    return Other(_shared_where_equal(model, asked.factual), asked.weights, graph.item_gate, {})


EFFECTS: dict[EffectName, Callable[[Counterfactual], Other]] = {
    "counterfactual_clicks": _on_taste,
    "counterfactual_log": _on_taste,
    "reference_texts": _without_references,
    "gates": _gates,
    "none": lambda asked: asked.nothing,
}


def _shared_where_equal(model: LinearScores, factual: LinearScores) -> LinearScores:
    """`model` with the factual one's users and histories where they are the same numbers: they need no second copy."""
    if np.array_equal(model.users, factual.users):
        model = replace(model, users=factual.users)
    ours, theirs = model.history, factual.history
    if all(np.array_equal(getattr(ours, part), getattr(theirs, part)) for part in ("indptr", "indices", "data")):
        model = replace(model, history=factual.history)
    return model

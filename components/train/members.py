"""The recipe's five members: what they learn from, how each is fitted and tuned, and how they are joined into one score."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.config import ModelConfig
from components.cllmr.effects.base import gated
from components.cllmr.linear.ease import Ease, EaseSettings, centred_unit_rows
from components.cllmr.linear.ensemble import Candidates, Scores, by_lot, choose_weights
from components.cllmr.linear.factors import aligned_item_factors, side_map
from components.cllmr.linear.kernel import KernelScores
from components.cllmr.linear.scores import LinearScores, Standard, joined
from components.evaluate.baselines import Inputs, ials
from components.evaluate.metrics import MOST_CHOOSING, PRIMARY, rank
from components.train.config import MemberName, TrainConfig
from components.train.search import Settings, coordinate_search

FloatMatrix = npt.NDArray[np.float32]
Progress = Callable[..., None]
_SIDE_MAP_L2 = 10.0  # of the map from side information to factors; 1 to 50 make no difference


@dataclass(frozen=True)
class RecipeData:
    """What a recipe learns from, and what it is chosen by; where that is nothing, all interactions may be learned from."""

    train: sp.csr_array
    """(num_users, num_items), binary."""
    validation: sp.csr_array
    user_text: FloatMatrix
    """Centred unit rows, or zero where there is no text, (num_users, text_dim)."""
    item_text: FloatMatrix
    """The same of the items: what all texts share says nothing."""
    user_spectrum: FloatMatrix
    """Scaled spectrum of `train` (E1-E3), (num_users, q)."""
    item_spectrum: FloatMatrix
    item_references: FloatMatrix | None = None
    """What the language model writes of the items' classes, less the mean of the items' texts, (num_items, text_dim); rows of
    zeros where it wrote nothing. None where it was not asked."""

    @property
    def has_text(self) -> bool:
        """Whether any item has text."""
        return bool(self.item_text.any())

    def validation_ndcg(self, member: Scores) -> float:
        """What everything is chosen by; of very many users, some by lot."""
        users = by_lot(self.validation, MOST_CHOOSING)
        return rank(member.score, self.train, self.validation, users=users).mean()[PRIMARY]


@dataclass(frozen=True)
class TasteData(RecipeData):
    """`RecipeData` with another log to learn from, and to ask with: who was lured once would be shown more of the same."""

    log: sp.csr_array | None = None
    """Weights of the interactions, in [0, 1]."""
    likely: sp.csr_array | None = None
    """The interactions of a weight of at least one half, binary: for models whose log has no weights."""


class GraphFit(NamedTuple):
    """A trained graph model, as arrays."""

    users: FloatMatrix
    """a_u, (num_users, d + 1)."""
    items: FloatMatrix
    """b_i, (num_items, d + 1); the last column is the mediator's offset."""
    user_gate: FloatMatrix
    """g_u, (num_users,); 1 without gates, like g_i."""
    item_gate: FloatMatrix
    """g_i, (num_items,)."""
    user_side: FloatMatrix
    """z of the users, (num_users, d), or (num_users, 0) without side encoder."""
    item_side: FloatMatrix
    table: FloatMatrix
    """The ID table, (num_users + num_items, embedding_dim), users first: what a later training can begin with."""
    run: Mapping[str, Any]
    """"curve", "best_epoch", "epochs"."""

    @property
    def factual(self) -> LinearScores:
        """TE = (g_u a_u) . (g_i b_i) (E13)."""
        return self._scores(0.0)

    @property
    def counterfactual(self) -> LinearScores:
        """TNIE = (g_u a_u) . [g_i (b_i - mean b)] (E16 with λ = 1): the match alone."""
        return self._scores(1.0)

    def _scores(self, strength: float) -> LinearScores:
        return LinearScores.of_factors(self.user_gate[:, None] * self.users, gated(self.items, self.item_gate, strength))


TrainGraph = Callable[[RecipeData, TrainConfig, str], GraphFit]
"""How a graph model is trained, in this process or by workers elsewhere: (data, settings, a name for the run) -> the model. The
name is "factual" or "counterfactual"; after a point stands which of several it is that are tried."""


@dataclass(frozen=True)
class Member:
    """A fitted member and how it was chosen."""

    scores: LinearScores
    settings: Settings
    tried: list[Settings]
    """Every setting tried with its validation NDCG@10 as "value"; empty where the settings were given."""
    graph: GraphFit | None = None
    """Of the graph member."""


def fit_members(
    names: Sequence[MemberName],
    data: RecipeData,
    config: TrainConfig,
    train_graph: TrainGraph,
    settings: Mapping[str, Settings] | None,
    seconds: dict[str, float],
    on_progress: Progress,
    run: str = "factual",
) -> dict[str, Member]:
    """The named members, one after the other: a later one may use the graph's side representations.

    Args:
        settings: of every member, to fit it without tuning; None to tune.
        seconds: is given the CPU seconds of each.
        run: see `Task`; the other arguments are those of `components.train.recipe.fit_recipe`.
    """
    members: dict[str, Member] = {}
    for name in names:
        start = time.process_time()
        graph = members["graph"].graph if "graph" in members else None
        given = None if settings is None else settings[name]
        tell = partial(on_progress, member=name)
        members[name] = _FITS[name](Task(data, config, partial(train_graph, data), graph, given, tell, run))
        seconds[name] = time.process_time() - start
    return members


def join(
    members: Mapping[str, Member],
    data: RecipeData,
    validation: sp.csr_array,
    config: TrainConfig,
    start: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
) -> tuple[LinearScores, dict[str, float]]:
    """The weighted sum of the members and the weights, which are chosen on `validation`; 0 of a graph that only lends.

    Args:
        members: fitted.
        data: whose training interactions are not ranked.
        validation: interactions to find.
        config: whether the graph joins.
        start: weights from which the choice begins.
        weights: instead of a choice.
    """
    lends = "ease" in members and not config.recipe.graph_joins
    names = [name for name in members if not (lends and name == "graph")]
    scores = [members[name].scores for name in names]
    if weights is None:
        # a member that counts against what it finds would, without the lured clicks, give exposure back to what they lured to
        negative = [name == "popularity" for name in names]
        first = None if start is None else [start[name] for name in names]
        chosen, _ = choose_weights(Candidates.collect(scores, data.train, validation), negative=negative, start=first)
        weights = dict(zip(names, chosen, strict=True))
    model = joined(scores, [weights[name] for name in names], [Standard.of(one) for one in scores])
    return model, {name: weights[name] if name in names else 0.0 for name in members}


@dataclass(frozen=True)
class Task:
    """What a member is fitted with."""

    data: RecipeData
    config: TrainConfig
    train_graph: Callable[[TrainConfig, str], GraphFit]
    graph: GraphFit | None
    """Of the graph member, if that came before."""
    settings: Settings | None
    """Given settings; None to tune."""
    on_progress: Progress
    run: str
    """"factual" or "counterfactual": names the runs of the graph model."""

    @property
    def side(self) -> FloatMatrix | None:
        """Side representations z of the items, None without a graph member or without its encoder."""
        return self.graph.item_side if self.graph is not None and self.graph.item_side.shape[1] else None

    def tuned(
        self,
        start: Settings,
        grids: Mapping[str, Sequence[Any]],
        fit: Callable[[Settings], Scores],
        served: Callable[[Any], LinearScores],
        rounds: int = 2,
    ) -> Member:
        """The member with the given settings, or with the best ones that a search of `rounds` passes finds from `start`.

        Args:
            start: on the grids.
            grids: see `coordinate_search`.
            fit: settings to a fitted model.
            served: that model in the form that is served.
            rounds: passes over the settings.
        """
        if self.settings is not None:
            return Member(served(fit(self.settings)), self.settings, [])
        best: tuple[float, Scores] | None = None

        def evaluate(settings: Settings) -> float:
            nonlocal best
            fitted = fit(settings)
            value = self.data.validation_ndcg(fitted)
            self.on_progress(**settings, **{PRIMARY: value})
            if best is None or value > best[0]:
                best = (value, fitted)
            return value

        chosen, _, tried = coordinate_search(start, grids, evaluate, rounds)
        assert best is not None, "a search evaluates its start"
        return Member(served(best[1]), chosen, tried)


def _graph(task: Task) -> Member:
    """How much texts should say of collaborative representations depends on the texts, by more than anything else here: where
    there are any, other settings are tried too, by whole trainings."""
    model, others = task.config.model, task.config.recipe.graph_settings
    if not task.data.has_text:
        model = model.model_copy(update={"side_encoder": "none", "counterfactual": False})
    candidates: list[Settings] = [{}, *others] if model.side_encoder != "none" else [{}]
    if task.settings is not None:
        candidates = [task.settings]
    fits, tried = [], []
    for number, settings in enumerate(candidates):
        tried_model = ModelConfig.model_validate({**model.model_dump(), **settings})
        config = task.config.model_copy(update={"model": tried_model})
        fits.append(task.train_graph(config, f"{task.run}.{number}" if number else task.run))
        if len(candidates) > 1:
            tried.append({**settings, "value": round(task.data.validation_ndcg(fits[-1].factual), 6)})
            task.on_progress(**settings, **{PRIMARY: tried[-1]["value"]})
    best = max(range(len(fits)), key=lambda number: tried[number]["value"] if tried else 0.0)
    return Member(fits[best].factual, dict(candidates[best]), tried, fits[best])


def _ease(task: Task) -> Member:
    data, config, side = task.data, task.config.recipe, task.side
    fits: tuple[float, Ease] | None = None

    def fitted(settings: Settings) -> Scores:
        nonlocal fits
        own = dict(settings)
        mix = own.pop("side_mix")
        if fits is None or fits[0] != mix:
            fits = (mix, Ease(log_of(data), _with_side(data.item_text, side, mix) if data.has_text else None))
        return fits[1].fit(EaseSettings(**own))

    large = data.train.shape[1] >= config.large_catalogue
    grids: dict[str, Sequence[Any]] = {
        "l2": config.ease_l2,
        "side_weight": config.ease_side_weight if data.has_text else (0.0,),
        "item_power": (0.2,) if large else config.ease_item_power,
        "user_power": (0.15,) if large else config.ease_user_power,
        "popularity_power": config.ease_popularity_power,
        "side_mix": config.side_mix if side is not None else (0.0,),
    }
    start = {"l2": 100.0, "side_weight": 12.0, "item_power": 0.2, "user_power": 0.15, "popularity_power": 0.2, "side_mix": 0.0}
    served = partial(_linear, count=config.neighbours)
    return task.tuned(_on_grid(start, grids), grids, fitted, served, rounds=1 if large else 2)


def _factors(task: Task) -> Member:
    data, config, log = task.data, task.config.recipe, log_of(task.data)
    degree = np.asarray(log.sum(axis=0))
    plain: tuple[Settings, LinearScores] | None = None

    def fitted(settings: Settings) -> LinearScores:
        nonlocal plain
        own = dict(settings)
        prior = own.pop("prior")
        if plain is None or plain[0] != own:
            inputs = Inputs(log, data.validation, data.user_text, data.item_text, {})
            found = ials(inputs, **own, iterations=config.ials_iterations, seed=task.config.seed)
            plain = (own, LinearScores.of_factors(found.users, found.items))
        model = plain[1]
        assert isinstance(model.items, np.ndarray)  # compact ones are in endpoints alone
        if not prior:
            return model
        expected = data.item_text @ side_map(model.items, data.item_text, degree, _SIDE_MAP_L2)
        items = aligned_item_factors(log, model.users, expected, own["alpha"], prior * own["regularization"])
        return replace(model, items=items)

    grids: dict[str, Sequence[Any]] = {
        "prior": config.ials_prior if data.has_text else (0.0,),
        "regularization": config.ials_regularization,
        "alpha": config.ials_alpha,
        "factors": config.ials_factors,
    }
    start = {"prior": 0.0, "regularization": 10.0, "alpha": 10.0, "factors": 128}
    return task.tuned(_on_grid(start, grids), grids, fitted, lambda model: model)


def _text(task: Task) -> Member:
    config = task.config.recipe

    def fitted(settings: Settings) -> Scores:
        return KernelScores(log_of(task.data), task.data.item_text, settings["power"])

    served = partial(_linear, count=config.neighbours)
    return task.tuned({"power": config.text_power[0]}, {"power": config.text_power}, fitted, served)


def _popularity(task: Task) -> Member:
    log = log_of(task.data)
    counts = np.log1p(np.asarray(log.sum(axis=0), dtype=np.float64))
    return Member(LinearScores.of_factors(np.ones((log.shape[0], 1)), counts[:, None]), {}, [])


_FITS: dict[MemberName, Callable[[Task], Member]] = {
    "graph": _graph,
    "ease": _ease,
    "factors": _factors,
    "text": _text,
    "popularity": _popularity,
}


def log_of(data: RecipeData) -> sp.csr_array:
    """What linear members learn from, and the histories that they score."""
    log = data.log if isinstance(data, TasteData) else None
    return data.train if log is None else log


def _linear(model: Any, count: int) -> LinearScores:
    linear: LinearScores = model.linear(count)
    return linear


def _on_grid(start: Settings, grids: Mapping[str, Sequence[Any]]) -> Settings:
    """`start` with every value moved to the nearest one of its grid."""
    return {name: min(grid, key=lambda value: abs(value - start[name])) for name, grid in grids.items()}


def _with_side(text: FloatMatrix, side: FloatMatrix | None, mix: float) -> FloatMatrix:
    """Rows whose Gram matrix is (1 - mix) times the text's plus mix times the side representations': (num_items, dim)."""
    if side is None or not mix:
        return text
    both = np.concatenate([np.sqrt(1 - mix) * text, np.sqrt(mix) * centred_unit_rows(side)], axis=1)
    return np.asarray(both, dtype=np.float32)

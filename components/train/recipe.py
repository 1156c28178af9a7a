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
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.effects.base import gated
from components.cllmr.effects.click_propensity import ClickPropensity, estimate
from components.cllmr.effects.reference_texts import share_written_anyway, without_carried
from components.cllmr.effects.subspace import project_out
from components.cllmr.linear.ease import Ease, EaseSettings, centred_unit_rows
from components.cllmr.linear.ensemble import Candidates, Scores, choose_weights
from components.cllmr.linear.factors import aligned_item_factors, side_map
from components.cllmr.linear.kernel import KernelScores
from components.cllmr.linear.scores import LinearScores, Standard, joined
from components.errors import DataError
from components.evaluate.baselines import Inputs, ials
from components.evaluate.metrics import PRIMARY, rank
from components.train.config import EffectName, MemberName, TrainConfig
from components.train.search import Settings, coordinate_search

FloatMatrix = npt.NDArray[np.float32]
Progress = Callable[..., None]
HISTORY_MEMBERS: tuple[MemberName, ...] = ("ease", "text")
"""Members whose score is made of weights between items: they answer anybody who has a history."""
_SIDE_MAP_L2 = 10.0  # of the map from side information to factors; 1 to 50 make no difference


@dataclass(frozen=True)
class RecipeData:
    """What a recipe learns from; the test interactions are not among it."""

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
        """What everything is chosen by."""
        return rank(member.score, self.train, self.validation).mean()[PRIMARY]


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
"""How a graph model is trained, in this process or by workers elsewhere: (data, settings, a name for the run) -> the model."""


@dataclass(frozen=True)
class Member:
    """A fitted member and how it was chosen."""

    scores: LinearScores
    settings: Settings
    tried: list[Settings]
    """Every setting tried with its validation NDCG@10 as "value"; empty where the settings were given."""
    graph: GraphFit | None = None
    """Of the graph member."""


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
    validation: dict[str, float]
    """Validation NDCG@10 of each member, and of the "ensemble"."""
    cpu_seconds: dict[str, float]
    """Of this process by member, tuning included, and of the "counterfactual"."""
    left_out: dict[str, str]
    """Members of the config that these data do without, and why."""
    graphs: dict[str, GraphFit]
    """The graph member's models by the name of their run, "factual" and "counterfactual"; empty without that member."""

    @property
    def settings(self) -> dict[str, Settings]:
        """What `fit_recipe` takes to fit another seed without tuning again."""
        return {name: member.settings for name, member in self.members.items()}

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
    seconds: dict[str, float] = {}
    members = _fit_members(names, data, config, train_graph, settings, seconds, on_progress)
    start = time.process_time()
    factual, weights = _join(members, data, data.validation, config)
    validation = {name: data.validation_ndcg(member.scores) for name, member in members.items()}
    validation["ensemble"] = data.validation_ndcg(factual)
    seconds["ensemble"] = time.process_time() - start
    on_progress(member="ensemble", **{PRIMARY: validation["ensemble"]})
    start = time.process_time()
    task = _Counterfactual(data, config, train_graph, members, weights, factual, on_progress)
    other = _EFFECTS[config.effect](task)
    seconds["counterfactual"] = time.process_time() - start
    fits = {"factual": members, "counterfactual": other.members}
    graphs = {run: fit["graph"].graph for run, fit in fits.items() if "graph" in fit and fit["graph"].graph is not None}
    return FittedRecipe(
        factual, other.scores, other.propensity, members, weights, other.weights, validation, seconds, left_out, graphs
    )


def _join(
    members: Mapping[str, Member],
    data: RecipeData,
    validation: sp.csr_array,
    config: TrainConfig,
    start: Mapping[str, float] | None = None,
) -> tuple[LinearScores, dict[str, float]]:
    """The weighted sum of the members and the weights, which are chosen on `validation`; 0 of a graph that only lends."""
    lends = "ease" in members and not config.recipe.graph_joins
    names = [name for name in members if not (lends and name == "graph")]
    scores = [members[name].scores for name in names]
    # a member that counts against what it finds would, without the lured clicks, give exposure back to what they lured to
    negative = [name == "popularity" for name in names]
    first = None if start is None else [start[name] for name in names]
    chosen, _ = choose_weights(Candidates.collect(scores, data.train, validation), negative=negative, start=first)
    model = joined(scores, chosen, [Standard.of(one) for one in scores])
    return model, dict.fromkeys(members, 0.0) | dict(zip(names, chosen, strict=True))


def _reason_against(name: MemberName, data: RecipeData, config: TrainConfig) -> str | None:
    num_items, allowed = data.train.shape[1], config.recipe.max_items
    if name == "text" and not data.has_text:
        return "the items have no text"
    if name in ("ease", "text") and num_items > allowed:
        return f"{num_items:,} items are more than recipe.max_items = {allowed:,}"
    return None


def _fit_members(
    names: Sequence[MemberName],
    data: RecipeData,
    config: TrainConfig,
    train_graph: TrainGraph,
    settings: Mapping[str, Settings] | None,
    seconds: dict[str, float],
    on_progress: Progress,
    run: str = "factual",
) -> dict[str, Member]:
    members: dict[str, Member] = {}
    for name in names:
        start = time.process_time()
        graph = members["graph"].graph if "graph" in members else None
        given = None if settings is None else settings[name]
        tell = partial(on_progress, member=name)
        members[name] = _FITS[name](Task(data, config, partial(train_graph, data), graph, given, tell, run))
        seconds[name] = time.process_time() - start
    return members


@dataclass(frozen=True)
class _Counterfactual:
    """What a counterfactual is made of."""

    data: RecipeData
    config: TrainConfig
    train_graph: TrainGraph
    members: dict[str, Member]
    weights: dict[str, float]
    factual: LinearScores
    on_progress: Progress

    @property
    def nothing(self) -> "_Other":
        """No propensity: the factual model."""
        return _Other(self.factual, self.weights, np.zeros(self.data.train.shape[1], dtype=np.float32), {})


class _Other(NamedTuple):
    """A counterfactual model."""

    scores: LinearScores
    weights: dict[str, float]
    propensity: FloatMatrix
    members: dict[str, Member]
    """Those that were fitted for it."""


def _gates(task: _Counterfactual) -> _Other:
    """The graph member with its match alone, in the factual standardisation; the others as they are."""
    graph = task.members["graph"].graph if "graph" in task.members else None
    if graph is None or not graph.item_side.shape[1]:  # gates are told from side representations
        return task.nothing
    standards = [Standard.of(member.scores) for member in task.members.values()]
    scores = [graph.counterfactual if name == "graph" else member.scores for name, member in task.members.items()]
    model = joined(scores, list(task.weights.values()), standards)
    return _Other(_shared_where_equal(model, task.factual), task.weights, graph.item_gate, {})


def _on_taste(task: _Counterfactual) -> _Other:
    """The recipe on the log of taste."""
    data = task.data
    if not data.has_text:
        return task.nothing
    found = estimate(data.train, data.item_text)
    if not found.share.any():
        return task.nothing
    task.on_progress(member="counterfactual", lured_clicks=float(found.lured.sum()))
    return _refitted(task, _without_propensity(data, found, task.config), _of_taste(data), found.share.astype(np.float32))


def _without_references(task: _Counterfactual) -> _Other:
    """The factual model less what the reference texts carry; an item's propensity is the share of its text that is along."""
    data = task.data
    assert data.item_references is not None, "refused before anything was fitted"
    share = share_written_anyway(data.item_text, data.item_references)
    if not share.any():
        return task.nothing
    return _Other(without_carried(task.factual, data.item_text, data.item_references), task.weights, share, {})


def _refitted(task: _Counterfactual, other: RecipeData, validation: sp.csr_array, propensity: FloatMatrix) -> _Other:
    """The recipe with the members and settings of the factual one on `other` data, weights chosen on `validation`."""
    needed = {name for name, weight in task.weights.items() if weight}
    if "ease" in needed and task.members["ease"].settings["side_mix"]:
        needed.add("graph")  # its side representations are in the Gram matrix
    names = [name for name in task.config.recipe.members if name in needed]
    settings: dict[str, Settings] = {name: task.members[name].settings for name in names}
    members = _fit_members(names, other, task.config, task.train_graph, settings, {}, task.on_progress, "counterfactual")
    model, weights = _join(members, task.data, validation, task.config, task.weights)
    return _Other(_shared_where_equal(model, task.factual), weights, propensity, members)


def _of_taste(data: RecipeData) -> sp.csr_array:
    """The validation interactions that are more likely of taste than lured, all of them where none is."""
    likely = estimate(sp.csr_array(data.train + data.validation), data.item_text).likely_taste()
    kept = sp.csr_array(data.validation.multiply(likely))
    kept.eliminate_zeros()
    return kept if kept.nnz else data.validation


_EFFECTS: dict[EffectName, Callable[[_Counterfactual], _Other]] = {
    "counterfactual_clicks": _on_taste,
    "counterfactual_log": _on_taste,
    "reference_texts": _without_references,
    "gates": _gates,
    "none": lambda task: task.nothing,
}


def _without_propensity(data: RecipeData, found: ClickPropensity, config: TrainConfig) -> "TasteData":
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


@dataclass(frozen=True)
class TasteData(RecipeData):
    """`RecipeData` with another log to learn from, and to ask with: who was lured once would be shown more of the same."""

    log: sp.csr_array | None = None
    """Weights of the interactions, in [0, 1]."""
    likely: sp.csr_array | None = None
    """The interactions of a weight of at least one half, binary: for models whose log has no weights."""


def _log(data: RecipeData) -> sp.csr_array:
    """What linear members learn from, and the histories that they score."""
    log = data.log if isinstance(data, TasteData) else None
    return data.train if log is None else log


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
    model = task.config.model
    if not task.data.has_text:
        model = model.model_copy(update={"side_encoder": "none", "counterfactual": False})
    fitted = task.train_graph(task.config.model_copy(update={"model": model}), task.run)
    return Member(fitted.factual, {}, [], fitted)


def _ease(task: Task) -> Member:
    data, config, side = task.data, task.config.recipe, task.side
    fits: tuple[float, Ease] | None = None

    def fitted(settings: Settings) -> Scores:
        nonlocal fits
        own = dict(settings)
        mix = own.pop("side_mix")
        if fits is None or fits[0] != mix:
            fits = (mix, Ease(_log(data), _with_side(data.item_text, side, mix) if data.has_text else None))
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
    data, config, log = task.data, task.config.recipe, _log(task.data)
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
        return KernelScores(_log(task.data), task.data.item_text, settings["power"])

    served = partial(_linear, count=config.neighbours)
    return task.tuned({"power": config.text_power[0]}, {"power": config.text_power}, fitted, served)


def _popularity(task: Task) -> Member:
    log = _log(task.data)
    counts = np.log1p(np.asarray(log.sum(axis=0), dtype=np.float64))
    return Member(LinearScores.of_factors(np.ones((log.shape[0], 1)), counts[:, None]), {}, [])


_FITS: dict[MemberName, Callable[[Task], Member]] = {
    "graph": _graph,
    "ease": _ease,
    "factors": _factors,
    "text": _text,
    "popularity": _popularity,
}


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


def _shared_where_equal(model: LinearScores, factual: LinearScores) -> LinearScores:
    """`model` with the factual one's users and histories where they are the same numbers: they need no second copy."""
    if np.array_equal(model.users, factual.users):
        model = replace(model, users=factual.users)
    ours, theirs = model.history, factual.history
    if all(np.array_equal(getattr(ours, part), getattr(theirs, part)) for part in ("indptr", "indices", "data")):
        model = replace(model, history=factual.history)
    return model

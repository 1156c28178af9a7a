"""Every kind of model an experiment can fit, behind one call: settings and a seed in, scores and figures out.

A new kind is a function ``(Task) -> Fitted``, a line in `KINDS` and a word in `components.experiment.config.Kind`. Units that
were done before it, or before any other edit of what figures come from, are measured anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, get_args

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, create_model

from components.cllmr.effects.base import gated, reference
from components.cllmr.linear.ease import Ease, EaseSettings, centred_unit_rows
from components.cllmr.linear.ensemble import Scores
from components.errors import ConfigError, did_you_mean
from components.evaluate import baselines
from components.evaluate.baselines import Factors, Inputs, num_threads
from components.evaluate.collapse import collapse
from components.evaluate.metrics import PRIMARY, rank
from components.experiment.config import Effect, Kind, ModelSpec
from components.experiment.dataset import ExperimentData
from components.settings import StageConfig, flat
from components.train.config import TrainConfig
from components.train.search import Settings, coordinate_search

if TYPE_CHECKING:
    from components.train.members import RecipeData

FloatMatrix = npt.NDArray[np.float32]
Power = Annotated[float, Field(ge=0, le=1)]
Tell = Callable[..., None]
"""Told the figures of a fit while it goes on."""


def silent(**figures: Any) -> None:
    """Nobody listens."""


_IALS = partial(baselines.ials, iterations=15)
_GIVEN = {
    "seed": "Set first_seed and seeds of the experiment.",
    "num_workers": "Leave it out: a model of an experiment is fitted by one worker.",
    "warm_start": "Leave it out: models of an experiment begin with nothing.",
}
"""Settings of the train stage that a model of an experiment cannot have, and what to do instead."""


@dataclass(frozen=True)
class Fitted:
    """A model that scores, and what is worth knowing of it."""

    scores: Scores
    facts: dict[str, Any] = field(default_factory=dict)
    """Figures as JSON knows them: "dim", "effective_rank", "singular_values", "debias", ..."""
    chosen: Any = None
    """Of kinds that tune themselves: what to give as `Task.chosen` for another seed."""
    factors: Factors | None = None
    """Collaborative representations of a graph model, before gates."""
    side: Mapping[str, FloatMatrix] | None = None
    """Side representations z of "users" and "items", of a graph model with a side encoder."""


@dataclass(frozen=True)
class Task:
    """One fit."""

    data: ExperimentData
    """With embeddings."""
    settings: Settings
    seed: int
    shared: dict[str, Any] = field(default_factory=dict)
    """What fits with other settings on the same data can use again (Gram matrices)."""
    chosen: Any = None
    """Of kinds that tune themselves: what another seed was tuned to."""
    tell: Tell = silent

    @property
    def item_text(self) -> FloatMatrix:
        """(num_items, text_dim)."""
        assert self.data.item_text is not None, "texts are embedded before a fit"
        return self.data.item_text

    @property
    def inputs(self) -> Inputs:
        """The same data as baselines want them."""
        return Inputs(self.data.train, self.data.validation, self.data.user_text, self.item_text, {})


def _popularity(task: Task) -> Fitted:
    return Fitted(baselines.popularity(task.inputs))


def _text_cosine(task: Task) -> Fitted:
    return Fitted(baselines.text_cosine(task.inputs, **task.settings))


def _bm25(task: Task) -> Fitted:
    return Fitted(baselines.bm25_knn(task.inputs, **task.settings))


def _ials(task: Task) -> Fitted:
    return Fitted(_IALS(task.inputs, **task.settings, seed=task.seed), {"dim": task.settings["factors"]})


def _ease(task: Task) -> Fitted:
    if "ease" not in task.shared:
        task.shared["ease"] = Ease(task.data.train)
    return Fitted(task.shared["ease"].fit(_ease_settings(**task.settings)))


def _ease_settings(
    l2: PositiveFloat, user_power: Power = 0.0, item_power: Power = 0.0, popularity_power: Power = 0.0
) -> EaseSettings:
    return EaseSettings(l2, 0.0, user_power, item_power, popularity_power)


def _ease_text(task: Task) -> Fitted:
    if "ease_text" not in task.shared:
        task.shared["ease_text"] = Ease(task.data.train, task.item_text)
    return Fitted(task.shared["ease_text"].fit(_ease_text_settings(**task.settings)))


def _ease_text_settings(
    l2: PositiveFloat,
    text_weight: NonNegativeFloat,
    user_power: Power = 0.0,
    item_power: Power = 0.0,
    popularity_power: Power = 0.0,
) -> EaseSettings:
    return EaseSettings(l2, text_weight, user_power, item_power, popularity_power)


def _alpharec(task: Task) -> Fitted:
    import torch

    from components.evaluate.alpharec import AlphaRecSettings, fit

    torch.set_num_threads(num_threads())
    settings = AlphaRecSettings(**task.settings)
    factors = fit(task.data.train, task.data.validation, task.item_text, settings, task.seed)
    return Fitted(factors, {"dim": settings.embedding_dim}, factors=factors)


def _recipe_data(task: Task, spectrum_rank: int) -> "RecipeData":
    """The data as the train stage would get them from the stages before."""
    from components.spectrum.decompose import spectrum
    from components.train.members import RecipeData

    data = task.data
    user_text, item_text = (centred_unit_rows(rows) for rows in (data.user_text, task.item_text))
    found = spectrum(data.train, min(spectrum_rank, *data.train.shape))
    user_spectrum, item_spectrum = (rows.astype(np.float32) for rows in (found.users, found.items))
    return RecipeData(data.train, data.validation, user_text, item_text, user_spectrum, item_spectrum)


def _graph(task: Task) -> Fitted:
    """A backbone with or without side encoder, by the platform's own training loop."""
    from components.train.graph import trained_here

    config, effect, spectrum_rank = graph_settings(task.settings, task.seed)
    found = trained_here(task.tell)(_recipe_data(task, spectrum_rank), config, "graph")
    factors = Factors(found.users, found.items)
    scores, debias = _with_effect(factors, found.item_gate, effect, config, task.data)
    # the factors' last column is the constant of the mediator's offset
    kept = {"users": factors.users[:, :-1], "items": factors.items[:, :-1]}
    z = None
    if found.item_side.shape[1]:
        z = {"users": found.user_side, "items": found.item_side}
        kept |= {f"side_{name}": rows for name, rows in z.items()}
    facts = {
        "dim": config.model.embedding_dim,
        "best_epoch": found.run["best_epoch"],
        "epochs": found.run["epochs"],
        **spectra(kept),
        **({} if debias is None else {"debias": debias}),
    }
    return Fitted(scores, facts, factors=factors, side=z)


def _with_effect(
    factors: Factors, gate: FloatMatrix, effect: Effect, config: TrainConfig, data: ExperimentData
) -> tuple[Factors, float | None]:
    """Scores of an effect of the side information, and λ where it was chosen on validation (E13-E16)."""
    if effect in ("none", "factual"):
        return Factors(factors.users, gated(factors.items, gate, 0.0)), None
    if effect == "pnde":
        return Factors(factors.users, gate[:, None] * reference(factors.items)), None
    tried = {debias: Factors(factors.users, gated(factors.items, gate, debias)) for debias in config.debias_grid}
    value = {debias: rank(one.score, data.train, data.validation).mean()[PRIMARY] for debias, one in tried.items()}
    best = max(value, key=lambda debias: (value[debias], debias))
    return tried[best], best


def _recipe(task: Task) -> Fitted:
    """The recipe as the train stage fits it, with its debias strength chosen on validation as there."""
    from components.cllmr.linear.scores import mixed
    from components.train.graph import trained_here
    from components.train.recipe import fit_recipe
    from components.train.strength import choose_strength, strength_curve

    config, spectrum_rank = recipe_settings(task.settings, task.seed)
    data = _recipe_data(task, spectrum_rank)
    found = fit_recipe(data, config, trained_here(task.tell), task.chosen, task.tell)
    debias, scores = 0.0, found.factual
    if found.counterfactual is not found.factual:
        curve = strength_curve(found.factual, found.counterfactual, data.train, data.validation, config.debias_grid)
        debias = choose_strength(curve, config.debias_tolerance)
        scores = mixed(found.factual, found.counterfactual, debias)
    graph = found.graph
    side = None
    if graph is not None and graph.item_side.shape[1]:
        side = {"side_users": graph.user_side, "side_items": graph.item_side}
    facts = {
        "dim": config.model.embedding_dim,
        "effect": config.effect,
        "debias": debias,
        "weights": found.weights,
        "members_left_out": found.left_out,
        "members_validation": {name: round(value, 6) for name, value in found.validation.items()},
        "members_cpu_seconds": {name: round(value, 2) for name, value in found.cpu_seconds.items()},
        "members_tried": {name: member.tried for name, member in found.members.items()},
        **({} if side is None else spectra(side)),
    }
    return Fitted(scores, facts, found.settings)


@dataclass(frozen=True)
class KindOf:
    """What is true of every model of a kind."""

    fit: Callable[[Task], Fitted]
    takes: Callable[..., Any] | None = None
    """What has a baseline's settings as arguments; of "alpharec" see `_arguments`."""
    uses_chance: bool = False
    """Whether the seed changes the result."""
    needs_text: bool = False
    item_matrices: bool = False
    """Whether dense item-item matrices are held."""
    start: Mapping[str, float] = field(default_factory=dict)
    """From where a grid is climbed as well, where the middle of every axis is not enough."""


KINDS: dict[Kind, KindOf] = {
    "popularity": KindOf(_popularity, baselines.popularity),
    "text_cosine": KindOf(_text_cosine, baselines.text_cosine, needs_text=True),
    "bm25": KindOf(_bm25, baselines.bm25_knn),
    # where the recipe's factors begin: confidence and regularisation depend on each other, so a climb may end where it began
    "ials": KindOf(_ials, _IALS, uses_chance=True, start={"regularization": 10.0, "alpha": 10.0, "factors": 128}),
    "ease": KindOf(_ease, _ease_settings, item_matrices=True),
    "ease_text": KindOf(_ease_text, _ease_text_settings, needs_text=True, item_matrices=True),
    "alpharec": KindOf(_alpharec, uses_chance=True, needs_text=True),
    "graph": KindOf(_graph, uses_chance=True),
    "recipe": KindOf(_recipe, uses_chance=True),
}


class _Spectrum(StageConfig):
    spectrum_rank: PositiveInt | None = None


class _Arguments(StageConfig):
    model_config = ConfigDict(strict=True)  # a fit gets the values as they are given, not as they might be read


def check(spec: ModelSpec) -> None:
    """Raises ConfigError for settings that a fit would refuse, at any place of the grid, before anything is fitted."""
    if spec.kind == "recipe" and spec.grid:
        raise ConfigError(
            f"the grid of model '{spec.name}' has '{next(iter(spec.grid))}': a recipe has a grid of its own, and no other.",
            "Leave it out, and give the values to try in the lists below settings.recipe.",
        )
    if empty := [name for name, values in spec.grid.items() if not values]:
        raise ConfigError(
            f"the grid of model '{spec.name}' has no value of '{empty[0]}'.", "Give one or more, or leave it out."
        )
    arguments = None if spec.kind in ("recipe", "graph") else _arguments(spec.kind)
    for place in product(*spec.grid.values()):
        settings = {**spec.settings, **dict(zip(spec.grid, place, strict=True))}
        if arguments is not None:
            arguments.parse(settings, f"{spec.name}.settings")
        elif spec.kind == "recipe":
            recipe_settings(settings, seed=0)
        else:
            graph_settings(settings, seed=0)


def _arguments(kind: Kind) -> type[StageConfig]:
    """The settings of a baseline: arguments of what takes them, but for those that an experiment gives."""
    takes = KINDS[kind].takes
    if kind == "alpharec":
        from components.evaluate.alpharec import AlphaRecSettings  # needs torch

        takes = AlphaRecSettings
    assert takes is not None, "a baseline takes settings"
    fields: dict[str, Any] = {
        name: (one.annotation, ... if one.default is one.empty else one.default)
        for name, one in signature(takes, eval_str=True).parameters.items()
        if name not in ("inputs", "seed")
    }
    return create_model("Settings", __base__=_Arguments, **fields)


def skip_reason(spec: ModelSpec, data: ExperimentData, ease_max_items: int) -> str | None:
    """Why a model cannot be fitted on these data, or None."""
    kind = KINDS[spec.kind]
    # the recipe leaves out what needs text
    has_encoder = spec.kind == "graph" and spec.settings.get("model.side_encoder", "sse") != "none"
    if not data.has_text and (kind.needs_text or has_encoder):
        return "the items have no text"
    if kind.item_matrices and data.num_items > ease_max_items:
        return f"{data.num_items:,} items are more than ease_max_items = {ease_max_items:,}"
    return None


@dataclass(frozen=True)
class Tuned:
    """The best of a grid on validation."""

    fitted: Fitted
    settings: Settings
    tried: list[Settings]
    """Every setting tried with its validation NDCG@10 as "value"."""


def tune(spec: ModelSpec, data: ExperimentData, seed: int, tell: Tell = silent) -> Tuned:
    """Climbs the grid of a model on validation NDCG@10 from the middle of every axis, and from where its kind begins;
    without a grid there is one fit."""
    shared: dict[str, Any] = {}
    best: tuple[float, Fitted] | None = None

    def evaluate(settings: Settings) -> float:
        nonlocal best
        task = Task(data, {**spec.settings, **settings}, seed, shared, tell=partial(tell, **settings))
        fitted = KINDS[spec.kind].fit(task)
        value = rank(fitted.scores.score, data.train, data.validation).mean()[PRIMARY] if settings else 0.0
        if best is None or value > best[0]:
            best = (value, fitted)
        return value

    start = {name: values[(len(values) - 1) // 2] for name, values in spec.grid.items()}
    own = KINDS[spec.kind].start
    other = {name: min(values, key=partial(_distance, own[name])) for name, values in spec.grid.items() if name in own}
    chosen, _, tried = coordinate_search(start, spec.grid, evaluate, others=[{**start, **other}])
    assert best is not None, "a search evaluates its start"
    return Tuned(best[1], {**spec.settings, **chosen}, tried if spec.grid else [])


def _distance(one: float, other: float) -> float:
    return abs(one - other)


def recipe_settings(settings: Mapping[str, Any], seed: int) -> tuple[TrainConfig, int]:
    """Settings of a "recipe": those of the train stage but `_GIVEN`, and "spectrum_rank", by dotted name or as a tree.

    Raises:
        ConfigError: a setting is unknown or not allowed.
    """
    if taken := next((name for name in _GIVEN if name in settings), None):
        raise ConfigError(f"'model.settings.{taken}' = {settings[taken]!r}: an experiment decides it.", _GIVEN[taken])
    tree: dict[str, Any] = {"seed": seed, "num_workers": 1}
    # as dotted names, so that nothing is written into what was given; a name above another one comes after it, and replaces it
    for name, value in sorted(flat(settings).items(), reverse=True):
        *sections, leaf = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    spectrum = _Spectrum.parse({"spectrum_rank": tree.pop("spectrum_rank", None)}, "model.settings")
    config = TrainConfig.parse(tree, "model.settings")
    return config, spectrum.spectrum_rank or config.model.embedding_dim


def graph_settings(settings: Mapping[str, Any], seed: int) -> tuple[TrainConfig, Effect, int]:
    """Settings of a "graph" model: those of the train stage by dotted name, "effect" and "spectrum_rank".

    Raises:
        ConfigError: a setting is unknown or not allowed.
    """
    own = dict(settings)
    effect = own.pop("effect", "none")
    allowed = get_args(Effect)
    if effect not in allowed:
        raise ConfigError(f"effect '{effect}' is unknown.", did_you_mean(str(effect), allowed))
    gates = {"effect": "gates" if effect != "none" else "none", "model.counterfactual": effect != "none"}
    config, spectrum_rank = recipe_settings({**own, **gates}, seed)
    return config, effect, spectrum_rank


def spectra(representations: Mapping[str, FloatMatrix]) -> dict[str, Any]:
    """{"effective_rank": name -> value, "singular_values": name -> relative to the largest} of representations."""
    found = collapse(dict(representations))
    return {
        "effective_rank": {name: value["effective_rank"] for name, value in found.items()},
        "singular_values": {name: value["singular_values"] for name, value in found.items()},
    }

"""The recipe: five members whose side information is CLLMR's, joined into one score; everything tuned on validation.

1. ``graph``: a graph backbone trained with the side encoder (alignment, spectrum prior): the collaborative view, and the side
   representations z that carry text into the collaborative space.
2. ``ease``: normalised EASE; text and z enter by their Gram matrix (`components.cllmr.linear.ease`).
3. ``factors``: implicit ALS whose item factors are drawn towards what their side information says
   (`components.cllmr.linear.factors`).
4. ``text``: similarity to the texts of the user's items alone, for items that nobody knows yet
   (`components.cllmr.linear.kernel`).
5. ``popularity``: log of the item's interactions; a negative weight takes popularity out.

The score is the sum of the standardised members with weights from validation (`components.cllmr.linear.ensemble`), which is
one inner product. Where there is no text, the encoder, the Gram matrix and ``text`` are left out: the rest is the same.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from components.artifacts import StageConfig
from components.cllmr.linear.ease import Ease, EaseSettings, centred_unit_rows
from components.cllmr.linear.ensemble import Candidates, Ensemble, Scores, choose_weights
from components.cllmr.linear.factors import aligned_item_factors, side_map
from components.cllmr.linear.kernel import KernelScores
from components.evaluate.baselines import Factors, FixedScores, Inputs, ials, num_threads
from components.evaluate.metrics import PRIMARY, rank
from components.experiment.search import Settings, coordinate_search
from components.train.config import TrainConfig

FloatMatrix = npt.NDArray[np.float32]
Progress = Callable[..., None]
MemberName = Literal["graph", "ease", "factors", "text", "popularity"]
MEMBERS: tuple[MemberName, ...] = get_args(MemberName)
PositiveGrid = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
Grid = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
Counts = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
_SIDE_MAP_L2 = 10.0  # of the map from side information to factors; 1 to 50 make no difference


class RecipeConfig(StageConfig):
    """What is tried; a tuple is a grid in order, and the search climbs along it."""

    members: Annotated[tuple[MemberName, ...], Field(min_length=1)] = MEMBERS
    """Which members take part, in the order they are fitted: "ease" can use the side representations of a "graph" before it."""
    train: TrainConfig = TrainConfig.model_validate(
        {
            "model": {"counterfactual": False, "temperature": 0.15, "alignment_weight": 0.5},
            "batch_size": 4096,
            "max_epochs": 40,
            "evaluate_every": 4,
            "patience": 3,
        }
    )
    """The graph member: backbone, loss, dim, side encoder, optimiser."""
    spectrum_rank: PositiveInt = 64
    """q of the spectrum in the encoder's prior."""
    alignment_weight: Grid = (0.1, 0.5)
    """Grid of the alignment of text and graph; the best depends on how informative the text is."""
    side_mix: Grid = (0.0, 0.3)
    """Grid of the share of the side representations z in the Gram matrix of "ease", the rest being the text itself."""
    ease_max_items: PositiveInt = 25_000
    """A larger catalogue does without "ease", which holds several dense item-item matrices (20,000 items: 1.6 GB each)."""
    ease_l2: PositiveGrid = (10.0, 30.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 3000.0, 10000.0, 30000.0)
    ease_side_weight: Grid = (0.0, 1.0, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
    ease_user_power: Grid = (0.0, 0.15, 0.3, 0.5)
    ease_item_power: Grid = (0.0, 0.1, 0.2, 0.3, 0.4)
    ease_popularity_power: Grid = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
    """Settings of "ease": see `components.cllmr.linear.ease`."""
    large_catalogue: PositiveInt = 12_000
    """From this many items on one fit of "ease" takes a minute: its powers of user and item are then fixed at 0.15 and 0.2,
    and one pass over its other settings must do."""
    ials_factors: Counts = (32, 64, 128, 256)
    ials_alpha: PositiveGrid = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0)
    ials_regularization: PositiveGrid = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    ials_prior: Grid = (0.0, 1.0, 3.0, 10.0, 30.0)
    """Settings of "factors"; prior: the pull towards the side information in units of the regularisation, 0 is without."""
    ials_iterations: PositiveInt = 15
    text_power: PositiveGrid = (1.0, 2.0, 3.0, 4.0, 6.0)
    """Setting of "text": see `components.cllmr.linear.kernel`."""


@dataclass(frozen=True)
class RecipeData:
    """What a recipe learns from; the test interactions are not among it."""

    train: sp.csr_array
    """(num_users, num_items), binary."""
    validation: sp.csr_array
    user_text: FloatMatrix
    """Unit rows, (num_users, text_dim); text_dim 0 without text."""
    item_text: FloatMatrix

    @property
    def has_text(self) -> bool:
        """Whether there are text embeddings."""
        return bool(self.item_text.shape[1])

    def validation_ndcg(self, member: Scores) -> float:
        """What everything is chosen by."""
        return rank(member.score, self.train, self.validation).mean()[PRIMARY]


@dataclass(frozen=True)
class Side:
    """Side representations z of a trained graph member."""

    users: FloatMatrix
    """(num_users, dim)."""
    items: FloatMatrix
    """(num_items, dim)."""


@dataclass(frozen=True)
class Member:
    """A fitted member and how it was chosen."""

    scores: Scores
    settings: Settings
    tried: list[Settings]
    """Every setting tried with its validation NDCG@10 as "value"; empty where the settings were given."""
    side: Side | None = None


@dataclass(frozen=True)
class FittedRecipe:
    """A fitted recipe: `score` is the ensemble's."""

    ensemble: Ensemble
    members: dict[str, Member]
    weights: dict[str, float]
    validation: dict[str, float]
    """Validation NDCG@10 of each member, and of the "ensemble"."""
    cpu_seconds: dict[str, float]
    """Of this process by member, tuning included."""
    left_out: dict[str, str]
    """Members of the config that these data do without, and why."""

    @property
    def settings(self) -> dict[str, Settings]:
        """What `fit_recipe` takes to fit another seed without tuning again."""
        return {name: member.settings for name, member in self.members.items()}

    @property
    def side(self) -> Side | None:
        """Side representations, None without an encoder."""
        return self.members["graph"].side if "graph" in self.members else None

    def score(self, users: npt.NDArray[np.int64]) -> FloatMatrix:
        """Rows of the users (n,) -> (n, num_items)."""
        return self.ensemble.score(users)


def fit_recipe(
    data: RecipeData,
    config: RecipeConfig,
    seed: int,
    settings: Mapping[str, Settings] | None = None,
    on_progress: Progress = lambda **figures: None,
) -> FittedRecipe:
    """Tunes all members and joins them; given the `settings` that another seed was tuned to, only fits them.

    Args:
        data: interactions and text.
        config: the grids.
        seed: of the graph member and of the factors.
        settings: `FittedRecipe.settings`.
        on_progress: told the member and its figures.
    """
    members: dict[str, Member] = {}
    validation: dict[str, float] = {}
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {name: reason for name in config.members if (reason := _reason_against(name, data, config))}
    for name in (name for name in config.members if name not in left_out):
        start = time.process_time()
        side = members["graph"].side if "graph" in members else None
        given = None if settings is None else settings[name]
        members[name] = _FITS[name](Task(data, config, seed, side, given, partial(on_progress, member=name)))
        validation[name] = data.validation_ndcg(members[name].scores)
        seconds[name] = time.process_time() - start
        on_progress(member=name, **{PRIMARY: validation[name]})
    start = time.process_time()
    scores = [member.scores for member in members.values()]
    weights, _ = choose_weights(Candidates.collect(scores, data.train, data.validation))
    ensemble = Ensemble(scores, weights)
    validation["ensemble"] = data.validation_ndcg(ensemble)
    seconds["ensemble"] = time.process_time() - start
    return FittedRecipe(ensemble, members, dict(zip(members, weights, strict=True)), validation, seconds, left_out)


def _reason_against(name: MemberName, data: RecipeData, config: RecipeConfig) -> str | None:
    num_items = data.train.shape[1]
    if name == "text" and not data.has_text:
        return "the items have no text"
    if name == "ease" and num_items > config.ease_max_items:
        return f"{num_items:,} items are more than ease_max_items = {config.ease_max_items:,}"
    return None


@dataclass(frozen=True)
class Task:
    """What a member is fitted with."""

    data: RecipeData
    config: RecipeConfig
    seed: int
    side: Side | None
    """Of the graph member, if that came before and has an encoder."""
    settings: Settings | None
    """Given settings; None to tune."""
    on_progress: Progress

    def tuned(
        self,
        start: Settings,
        grids: Mapping[str, Sequence[Any]],
        fit: Callable[[Settings], tuple[Scores, Side | None]],
        rounds: int = 2,
    ) -> Member:
        """The member with the given settings, or with the best ones that a search of `rounds` passes finds from `start`."""
        if self.settings is not None:
            scores, side = fit(self.settings)
            return Member(scores, self.settings, [], side)
        best: tuple[float, tuple[Scores, Side | None]] | None = None

        def evaluate(settings: Settings) -> float:
            nonlocal best
            fitted = fit(settings)
            value = self.data.validation_ndcg(fitted[0])
            self.on_progress(**settings, **{PRIMARY: value})
            if best is None or value > best[0]:
                best = (value, fitted)
            return value

        chosen, _, tried = coordinate_search(start, grids, evaluate, rounds)
        assert best is not None, "a search evaluates its start"
        return Member(best[1][0], chosen, tried, best[1][1])


def _graph(task: Task) -> Member:
    import torch

    from components.cllmr.model import SideInformation
    from components.spectrum.decompose import spectrum
    from components.train.loop import SingleProcess, TrainData, fit

    torch.set_num_threads(num_threads())
    data, base = task.data, task.config.train.model_copy(update={"seed": task.seed})
    encoder = base.model.side_encoder if data.has_text else "none"
    information = None
    if encoder != "none":
        found = spectrum(data.train, min(task.config.spectrum_rank, *data.train.shape))
        information = SideInformation(
            torch.from_numpy(np.concatenate([centred_unit_rows(data.user_text), centred_unit_rows(data.item_text)])),
            torch.from_numpy(np.concatenate([found.users, found.items]).astype(np.float32)),
        )

    def fitted(settings: Settings) -> tuple[Scores, Side | None]:
        model = base.model.model_copy(update={"side_encoder": encoder, **settings})
        hooks = SingleProcess(lambda **figures: task.on_progress(**settings, **figures))
        inputs = TrainData(data.train, data.validation, information)
        trained, _ = fit(inputs, base.model_copy(update={"model": model}), hooks)
        found = trained.representations()
        items = found.mediator.items * found.item_gate[:, None]
        side = None if information is None else Side(found.user_side.numpy(), found.item_side.numpy())
        return Factors(found.mediator.users.numpy(), items.numpy()), side

    grid = task.config.alignment_weight if information is not None else (0.0,)
    return task.tuned({"alignment_weight": grid[len(grid) // 2]}, {"alignment_weight": grid}, fitted)


def _ease(task: Task) -> Member:
    data, config, side = task.data, task.config, task.side
    text = centred_unit_rows(data.item_text)
    fits: tuple[float, Ease] | None = None

    def fitted(settings: Settings) -> tuple[Scores, None]:
        nonlocal fits
        own = dict(settings)
        mix = own.pop("side_mix")
        if fits is None or fits[0] != mix:
            fits = (mix, Ease(data.train, _mixed(text, side, mix) if data.has_text else None))
        return fits[1].fit(EaseSettings(**own)), None

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
    return task.tuned(_on_grid(start, grids), grids, fitted, rounds=1 if large else 2)


def _factors(task: Task) -> Member:
    data, config = task.data, task.config
    text = centred_unit_rows(data.item_text)
    degree = np.bincount(data.train.indices, minlength=data.train.shape[1])
    plain: tuple[Settings, Factors] | None = None

    def fitted(settings: Settings) -> tuple[Scores, None]:
        nonlocal plain
        own = dict(settings)
        prior = own.pop("prior")
        if plain is None or plain[0] != own:
            plain = (own, ials(_inputs(data), **own, iterations=config.ials_iterations, seed=task.seed))
        model = plain[1]
        if not prior:
            return model, None
        mapped = text @ side_map(model.items, text, degree, _SIDE_MAP_L2)
        items = aligned_item_factors(data.train, model.users, mapped, own["alpha"], prior * own["regularization"])
        return Factors(model.users, items), None

    grids: dict[str, Sequence[Any]] = {
        "prior": config.ials_prior if data.has_text else (0.0,),
        "regularization": config.ials_regularization,
        "alpha": config.ials_alpha,
        "factors": config.ials_factors,
    }
    start = {"prior": 0.0, "regularization": 10.0, "alpha": 10.0, "factors": 128}
    return task.tuned(_on_grid(start, grids), grids, fitted)


def _text(task: Task) -> Member:
    text = centred_unit_rows(task.data.item_text)

    def fitted(settings: Settings) -> tuple[Scores, None]:
        return KernelScores(task.data.train, text, settings["power"]), None

    return task.tuned({"power": task.config.text_power[0]}, {"power": task.config.text_power}, fitted)


def _popularity(task: Task) -> Member:
    counts = np.bincount(task.data.train.indices, minlength=task.data.train.shape[1])
    return Member(FixedScores(np.log1p(counts).astype(np.float32)), {}, [])


_FITS: dict[MemberName, Callable[[Task], Member]] = {
    "graph": _graph,
    "ease": _ease,
    "factors": _factors,
    "text": _text,
    "popularity": _popularity,
}


def _on_grid(start: Settings, grids: Mapping[str, Sequence[Any]]) -> Settings:
    """`start` with every value moved to the nearest one of its grid."""
    return {name: min(grid, key=lambda value: abs(value - start[name])) for name, grid in grids.items()}


def _mixed(text: FloatMatrix, side: Side | None, mix: float) -> FloatMatrix:
    """Rows whose Gram matrix is (1 - mix) times the text's plus mix times the side representations': (num_items, dim)."""
    if side is None or not mix:
        return text
    both = np.concatenate([np.sqrt(1 - mix) * text, np.sqrt(mix) * centred_unit_rows(side.items)], axis=1)
    return np.asarray(both, dtype=np.float32)


def _inputs(data: RecipeData) -> Inputs:
    return Inputs(data.train, data.validation, data.user_text, data.item_text, {})

"""Settings of an experiment: which models are compared, over which grids they are tuned, on how many seeds."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from components.cllmr.config import BACKBONE_NAMES, ENCODER_NAMES, one_of
from components.errors import ConfigError, did_you_mean
from components.settings import StageConfig, flat
from components.sideinfo.config import DEFAULT_ENCODER

Kind = Literal["popularity", "text_cosine", "bm25", "ials", "ease", "ease_text", "alpharec", "graph", "recipe"]
Effect = Literal["none", "factual", "tnie", "pnde"]
Suite = Literal["paper", "ablation", "rank", "noise", "coldstart", "collapse", "bias", "quick", "all"]

T = TypeVar("T")
OURS = "cllmr"
GATES = "gates"
"""The formulation that belongs to a graph model with heads; the others but `OURS` are fitted to EASE with text."""


class ModelSpec(StageConfig):
    """A model to fit: fixed settings, and ordered grids that are climbed on validation NDCG@10 with the first seed."""

    name: str = Field(min_length=1)
    kind: Kind
    settings: Annotated[dict[str, Any], AfterValidator(flat)] = Field(default_factory=dict)
    """Of "graph": settings of the train stage by dotted name ("model.embedding_dim") or as a tree, which becomes dotted names,
    "effect" and "spectrum_rank"; of "recipe": those of the train stage and "spectrum_rank"; of the others: arguments of the
    baseline. The train stage's seed, num_workers and warm_start are the experiment's own."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Setting -> values in order. None for "recipe", which has its own."""

    def identity(self) -> dict[str, Any]:
        """Everything but the name: the same model under another name is the same model."""
        return self.model_dump(mode="json", exclude={"name"})


_L2 = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 20000.0)
_TEMPERATURE = (0.1, 0.15, 0.2, 0.3)

BASELINES: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(name="popularity", kind="popularity"),
        ModelSpec(name="text_cosine", kind="text_cosine", grid={"centred": (False, True)}),
        ModelSpec(name="bm25", kind="bm25", grid={"neighbours": (20, 50, 100, 200, 500), "b": (0.25, 0.5, 0.75)}),
        ModelSpec(
            name="ials",
            kind="ials",
            grid={
                "regularization": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
                "alpha": (1.0, 2.0, 5.0, 10.0, 20.0, 40.0),
                "factors": (64, 128, 256),
            },
        ),
        ModelSpec(name="ease", kind="ease", grid={"l2": _L2}),
        ModelSpec(name="ease_text", kind="ease_text", grid={"l2": _L2, "text_weight": (1.0, 3.0, 10.0, 30.0, 100.0)}),
        ModelSpec(name="alpharec", kind="alpharec", grid={"temperature": _TEMPERATURE}),
        ModelSpec(
            name="lightgcn",
            kind="graph",
            settings={"model.backbone": "lightgcn", "model.side_encoder": "none"},
            grid={"model.temperature": _TEMPERATURE},
        ),
    )
}
"""Rivals by name, each with the grid it is tuned over."""

ALIASES = {"rlmrec-con": "lightgcn+mlp", "rlmrec-gen": "lightgcn+generative"}
LABELS = {
    OURS: "CLLMR",
    "popularity": "Popularity",
    "text_cosine": "Text cosine",
    "bm25": "BM25 kNN",
    "ials": "iALS",
    "ease": "EASE",
    "ease_text": "EASE + text",
    "alpharec": "AlphaRec",
    "lightgcn": "LightGCN",
    "rlmrec-con": "RLMRec-Con",
    "rlmrec-gen": "RLMRec-Gen",
}


def named(name: str) -> ModelSpec:
    """A model by name: a baseline, ``backbone`` or ``backbone+encoder``; raises ConfigError for any other name."""
    if name in BASELINES:
        return BASELINES[name]
    backbone, _, encoder = ALIASES.get(name, name).partition("+")
    encoder = encoder or "none"
    if backbone not in BACKBONE_NAMES or encoder not in ENCODER_NAMES:
        aligned = (f"{one}+{other}" for one in BACKBONE_NAMES for other in ENCODER_NAMES if other != "none")
        known = [*BASELINES, *BACKBONE_NAMES, *ALIASES, *aligned]
        raise ConfigError(f"unknown model '{name}'.", f"{did_you_mean(name, known)}")
    return ModelSpec(
        name=name,
        kind="graph",
        settings={"model.backbone": backbone, "model.side_encoder": encoder},
        grid={"model.temperature": _TEMPERATURE}
        if encoder == "none"
        else {"model.temperature": _TEMPERATURE, "model.alignment_weight": (0.03, 0.1, 0.5)},
    )


def refuse_twins(specs: Iterable[ModelSpec]) -> None:
    """Raises ConfigError where two models have one name, by which what is measured is kept."""
    twin = next((name for name, count in Counter(spec.name for spec in specs).items() if count > 1), None)
    if twin is not None:
        raise ConfigError(f"two models are named '{twin}'.", "Give one of them another name, or leave it out.")


def _over_base(given: dict[str, Any]) -> dict[str, Any]:
    return {"model.embedding_dim": 32, **flat(given)}


def _of_ease(given: dict[str, float]) -> dict[str, float]:
    from components.cllmr.linear.ease import EaseSettings

    known = [field.name for field in fields(EaseSettings)]
    for name in given:
        if name not in known:
            raise ValueError(f"'{name}' is none of {', '.join(known)}")
    if not given.get("l2", 100.0):
        raise ValueError("l2 should be greater than 0")
    for name, value in given.items():
        if name.endswith("_power") and value > 1:
            raise ValueError(f"{name} = {value:g} should be less than or equal to 1")
    return {"l2": 100.0, **given}


def _a_formulation(name: str) -> str:
    from components.cllmr.effects import EFFECTS

    return one_of((OURS, GATES, *EFFECTS))(name)


def _each_once(values: tuple[T, ...]) -> tuple[T, ...]:
    twin = next((value for value, count in Counter(values).items() if count > 1), None)
    if twin is not None:
        raise ValueError(f"{twin!r} is there twice")
    return values


Varied = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_each_once)]
"""What a study goes over: one value or more."""


class StudyConfig(StageConfig):
    """What the named studies vary; the rest is the same for all variants of a study."""

    base: Annotated[dict[str, Any], AfterValidator(_over_base)] = Field(default_factory=dict, validate_default=True)
    """Settings of the train stage that all variants share, by dotted name or as a tree, over the defaults and 32 dimensions."""
    backbones: Varied[Annotated[str, AfterValidator(one_of(BACKBONE_NAMES))]] = tuple(
        name for name in BACKBONE_NAMES if name != "mf"
    )
    """Of the paper study."""
    encoders: Varied[Annotated[str, AfterValidator(one_of(ENCODER_NAMES))]] = ("none", "mlp", "generative", "sse")
    """Of the paper study."""
    ranks: Varied[PositiveInt] = (16, 32, 64)
    dims: Varied[PositiveInt] = (16, 32, 64)
    """Dimensions of the representations in the collapse study."""
    noises: Varied[NonNegativeFloat] = (0.0, 0.001, 0.01, 0.1, 1.0)
    cold_share: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the items that is taken out of training for the test, and as much again for validation."""
    propensity_strengths: Varied[NonNegativeFloat] = (0.5, 1.0)
    """Length of the praise that the bias study adds to an item's text."""
    propensity_lure: float = Field(default=4.0, ge=0)
    """Clicks that a praise of length 1 brings an item, in clicks of the mean item."""
    ablation_strength: float = Field(default=1.0, ge=0)
    """Length of the praise in the ablation, whose variants are fitted on data with and without it; 0 leaves that out."""
    formulations: Varied[Annotated[str, AfterValidator(_a_formulation)]] = (
        OURS,
        GATES,
        "counterfactual_log",
        "counterfactual_clicks",
        "click_share",
        "text_reference",
        "reference_texts",
        "reference_texts_refitted",
        "lift",
        "subspace",
        "exposure",
    )
    """Of the bias study: `OURS`, which is the whole recipe with its own effect, `GATES`, or names of
    `components.cllmr.effects.EFFECTS`."""
    bias_ease: Annotated[dict[str, NonNegativeFloat], AfterValidator(_of_ease)] = Field(
        default={"l2": 100.0, "side_weight": 12.0}
    )
    """Of the bias study: settings of EASE."""


class ExperimentConfig(StageConfig):
    """What is fitted, compared and reported."""

    model: ModelSpec = ModelSpec(name=OURS, kind="recipe")
    """Ours."""
    baselines: tuple[str | ModelSpec, ...] = tuple(BASELINES)
    """Rivals, by name or in full."""
    rival: str | None = None
    """A further model to be tested against: see `named`."""
    seeds: PositiveInt = 5
    """Fits of every model that depends on chance; all use the settings tuned with the first seed. Weights of the recipe's
    members and strengths of debiasing are no settings: they are chosen on validation with every seed."""
    first_seed: NonNegativeInt = 2023
    search: Literal["climb", "grid"] = "climb"
    """How the grids of models are searched: "climb" goes along one setting after the other, "grid" fits all of them, on Ray's
    workers beside each other. The recipe climbs in any case: it has a search of its own."""
    text_encoder: str = Field(default=DEFAULT_ENCODER, min_length=1)
    """sentence-transformers model, by name or folder."""
    ease_max_items: PositiveInt = 25_000
    """EASE holds several dense item-item matrices (20,000 items: 1.6 GB each)."""
    study: StudyConfig = StudyConfig()

    def all_seeds(self) -> list[int]:
        """Consecutive seeds."""
        return list(range(self.first_seed, self.first_seed + self.seeds))

    def rivals(self) -> list[ModelSpec]:
        """Baselines and the named rival, which may be one of them; raises ConfigError for a name that is unknown or twice."""
        found = [named(one) if isinstance(one, str) else one for one in self.baselines]
        if self.rival is not None and self.rival not in [spec.name for spec in found]:
            found.append(named(self.rival))
        refuse_twins([self.model, *found])
        return found

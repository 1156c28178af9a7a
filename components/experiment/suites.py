"""The named studies: what each varies, over which models, and what it says in the end.

A study is a function ``(Setup) -> Study``; its models and tasks are units of work like all others, so studies share what they
have in common and a killed suite goes on with what is missing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from components.errors import DataError
from components.evaluate.metrics import PRIMARY
from components.experiment import coldstart, coldusers, propensity, statistics
from components.experiment.config import GATES, OURS, ExperimentConfig, ModelSpec, StudyConfig
from components.experiment.run import (
    METRICS_ARE,
    PAIRED,
    PROTOCOL,
    RANKING,
    Measured,
    Runner,
    Source,
    Unit,
    load,
    measure_models,
)

SHOWN = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
ALL = ("paper", "ablation", "rank", "noise", "coldstart", "coldusers", "collapse", "bias")
WITHOUT_GATES = "without gates"
"""The ablation's model without causal part."""
MEMBERS = {"all": ALL, "coldstart": ("coldstart", "coldusers")}
"""Suites of several studies; every other one is the study of its name."""
VARIANTS = (
    f"{RANKING} Every variant is fitted on the training interactions with the settings that it names: none is tuned. "
    "Validation decides when its training stops, and how strongly it is debiased where it is."
)
"""Protocol of the studies of graph models."""


@dataclass(frozen=True)
class Setup:
    """What every study gets."""

    sources: Sequence[Source]
    config: ExperimentConfig
    runner: Runner

    @property
    def study(self) -> StudyConfig:
        """What studies vary."""
        return self.config.study

    def graph(self, name: str, **settings: Any) -> ModelSpec:
        """A variant: the base settings of all studies and its own; "__" in a name stands for a dot."""
        own = {key.replace("__", "."): value for key, value in settings.items()}
        return ModelSpec(name=name, kind="graph", settings={**self.study.base, **own})


@dataclass(frozen=True)
class Study:
    """One study's result."""

    name: str
    title: str
    text: str
    """What is compared and how to read it."""
    protocol: str
    """How its figures are measured."""
    datasets: dict[str, dict[str, Any]]
    """Data set -> {"models": name -> summary, ...}, or what the study's own figures need."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Over data sets."""

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        told = {"study": self.name, "title": self.title, "text": self.text, "protocol": self.protocol}
        return {**told, "datasets": self.datasets, **self.extra}


def run_suite(name: str, setup: Setup) -> list[Study]:
    """The studies of a suite, in order.

    Raises:
        DataError: a study needs text and no data set has any.
    """
    if name == "quick":
        return _quick(setup)
    return [STUDIES[one](setup) for one in MEMBERS.get(name, (name,))]


def _compared(
    setup: Setup, specs: Sequence[ModelSpec], reference: Callable[[str], str | None]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Measured]]]:
    """Summaries of all models on all data sets, each with its paired test against the model that `reference` names.

    Raises:
        DataError: there is none that can be fitted.
    """
    told: dict[str, dict[str, Any]] = {}
    every: dict[str, dict[str, Measured]] = {}
    for source in setup.sources:
        measured, skipped = measure_models(source, specs, setup.config, setup.runner)
        models = {}
        for name, one in measured.items():
            models[name] = one.summary()
            models[name].pop("tried")
            if (other := reference(name)) in measured and other is not None:
                pair = (one.per_user("test"), measured[other].per_user("test"))
                models[name]["against"] = other
                models[name]["minus"] = {metric: statistics.paired(*(side[metric] for side in pair)) for metric in SHOWN}
        told[source.name] = {"models": models, "skipped": skipped}
        every[source.name] = measured
    if not any(every.values()):
        name, result = next(iter(told.items()))
        reason = next(iter(result["skipped"].values()))
        raise DataError(f"no variant of the study can be fitted on '{name}': {reason}.", "Give another data set.")
    return told, every


def _paper(setup: Setup) -> Study:
    study = setup.study
    specs = [
        setup.graph(
            f"{backbone}+{encoder}" if encoder != "none" else backbone, model__backbone=backbone, model__side_encoder=encoder
        )
        for backbone, encoder in product(study.backbones, study.encoders)
    ]
    datasets, _ = _compared(setup, specs, lambda name: name.partition("+")[0] if "+" in name else None)
    return Study(
        "paper",
        "Backbones and encoders",
        "Every backbone without side information and with each encoder: mlp is RLMRec-Con, generative RLMRec-Gen, sse the "
        "spectrum-based one. Differences are to the bare backbone, over the same users.",
        f"{VARIANTS} {PAIRED}",
        datasets,
    )


def _ablation(setup: Setup) -> Study:
    specs = [
        setup.graph("full (sse, gates, debiased)", model__side_encoder="sse", effect="tnie"),
        setup.graph("factual score", model__side_encoder="sse", effect="factual"),
        setup.graph(WITHOUT_GATES, model__side_encoder="sse", effect="none"),
        setup.graph("mlp encoder", model__side_encoder="mlp", effect="none"),
        setup.graph("attention encoder", model__side_encoder="attention", effect="none"),
        setup.graph("generative encoder", model__side_encoder="generative", effect="none"),
        setup.graph("pca encoder", model__side_encoder="pca", effect="none"),
        setup.graph("whitening encoder", model__side_encoder="whitening", effect="none"),
        setup.graph("no spectrum noise", model__side_encoder="sse", model__spectrum_noise=0.0),
        setup.graph("noise without sign", model__side_encoder="sse", model__noise_sign=False),
        setup.graph("zero prior mean", model__side_encoder="sse", model__prior_mean="zero"),
        setup.graph("no ELBO", model__side_encoder="sse", model__elbo_weight=0.0),
        setup.graph("spectrum in the encoder", model__side_encoder="sse", model__spectrum_input="concat"),
        setup.graph("no side information", model__side_encoder="none"),
    ]
    full = specs[0].name
    datasets, every = _compared(setup, specs, lambda name: None if name == full else full)
    if setup.study.ablation_strength:
        for source in setup.sources:
            if load(source).has_text:
                _remaining(setup, source, [spec for spec in specs if spec.name in every[source.name]], datasets[source.name])
    return Study(
        "ablation",
        "Ablation",
        "One part is taken out or changed; variants of the encoder are without gates. Differences are to the full one. "
        "Propensity that remains: a tenth of the items get praise in their text and clicks that it brought; induced is what "
        "their share of the variant's top ten grows by, and removed how much less that is than without gates.",
        f"{VARIANTS} {PAIRED}",
        datasets,
    )


def _remaining(setup: Setup, source: Source, specs: Sequence[ModelSpec], result: dict[str, Any]) -> None:
    """Adds to every model of `result` its "propensity": exposure of injected items on clean and on injected data, what the
    injection induced, and the share of that which the model without causal part has and this one has not."""
    seeds = setup.config.all_seeds()
    kinds: tuple[propensity.Kind, ...] = ("none", "inflated")
    units = [
        Unit(
            source,
            "exposure",
            {
                "kind": kind,
                "strength": setup.study.ablation_strength,
                "lure": setup.study.propensity_lure,
                "spec": spec.identity(),
            },
            seed,
            f"{spec.name}, {kind}, seed {seed}",
        )
        for spec in specs
        for kind in kinds
        for seed in seeds
    ]
    outcomes = iter(setup.runner.run(units))
    exposure = {spec.name: {kind: [next(outcomes).facts["exposure"] for _ in seeds] for kind in kinds} for spec in specs}
    induced = {name: np.subtract(found["inflated"], found["none"]) for name, found in exposure.items()}
    reference = induced.get(WITHOUT_GATES, np.zeros(len(seeds)))
    for name, found in exposure.items():
        removed = [
            percent
            for most, own in zip(reference.tolist(), induced[name].tolist(), strict=True)
            if (percent := propensity.removed_percent(most, own)) is not None
        ]
        result["models"][name]["propensity"] = {
            "exposure_clean": statistics.spread(found["none"]),
            "exposure_inflated": statistics.spread(found["inflated"]),
            "induced": statistics.spread(induced[name].tolist()),
            "removed_percent": statistics.spread(removed) if removed else None,
        }


def _rank(setup: Setup) -> Study:
    specs = [setup.graph(f"rank {rank}", model__side_encoder="sse", spectrum_rank=rank) for rank in setup.study.ranks]
    width = setup.study.base["model.embedding_dim"]
    matching = f"rank {width}" if width in setup.study.ranks else specs[0].name
    datasets, _ = _compared(setup, specs, lambda name: None if name == matching else matching)
    text = f"Rank of the spectrum at {width} hidden dimensions. Differences are to {matching}."
    levels = {"rank": list(setup.study.ranks)}
    return Study("rank", "Rank of the spectrum", text, f"{VARIANTS} {PAIRED}", datasets, {"levels": levels})


def _noise(setup: Setup) -> Study:
    study = setup.study
    names = {(noise, rank): f"noise {noise:g}, rank {rank}" for noise, rank in product(study.noises, study.ranks)}
    specs = [
        setup.graph(name, model__side_encoder="sse", model__spectrum_noise=noise, spectrum_rank=rank)
        for (noise, rank), name in names.items()
    ]
    datasets, every = _compared(setup, specs, lambda name: None)
    extra: dict[str, Any] = {"levels": {"noise": list(study.noises), "rank": list(study.ranks)}}
    return Study(
        "noise",
        "Noise of the spectrum, by rank",
        "Length of the perturbation of a spectrum row of length 1, at each rank. The analysis of variance has noise and "
        "rank as factors and data sets as blocks: a significant interaction means that the best noise depends on the rank.",
        VARIANTS,
        datasets,
        extra | _variance(every, names, study.noises, study.ranks),
    )


def _collapse(setup: Setup) -> Study:
    encoders, dims = ("sse", "mlp", "generative", "attention", "pca", "whitening"), setup.study.dims
    names = {(encoder, dim): f"{encoder}, d = {dim}" for dim in dims for encoder in encoders}
    specs = [setup.graph(name, model__side_encoder=encoder, model__embedding_dim=dim) for (encoder, dim), name in names.items()]
    # of the MLP encoder with as many dimensions
    rival = {names[encoder, dim]: names["mlp", dim] for encoder, dim in names if encoder != "mlp"}
    datasets, every = _compared(setup, specs, rival.get)
    largest = max(dims)
    for name, measured in every.items():
        datasets[name]["singular_values"] = {
            encoder: measured[names[encoder, largest]].outcomes[0].facts["singular_values"]
            for encoder in encoders
            if names[encoder, largest] in measured
        }
    extra: dict[str, Any] = {"levels": {"encoder": list(encoders), "dim": list(dims)}}
    return Study(
        "collapse",
        "Dimensional collapse",
        f"Side encoders at {', '.join(map(str, dims))} dimensions. Effective rank of the side representations: exp of the "
        "entropy of their singular values' shares, at most the number of dimensions. Differences are to the MLP encoder of "
        f"the same dimension. Singular values at {largest} dimensions, first seed, relative to the largest. The analysis of "
        "variance has encoder and dimension as factors and data sets as blocks: a significant interaction means that which "
        "encoder is best depends on the dimension.",
        f"{VARIANTS} {PAIRED}",
        datasets,
        extra | _variance(every, names, encoders, dims),
    )


def _variance(
    every: Mapping[str, Mapping[str, Measured]],
    names: Mapping[tuple[Any, Any], str],
    first: Sequence[Any],
    second: Sequence[Any],
) -> dict[str, Any]:
    """The analysis of variance of a grid of two factors over the data sets that have all of it, "anova", and the means of its
    cells, "cells_percent", (first, second); empty where no data set has."""
    usable = {name: measured for name, measured in every.items() if len(measured) == len(names)}
    if not usable:
        return {}
    values = np.array(
        [
            [[[one.facts["test"][PRIMARY] for one in measured[names[a, b]].outcomes] for b in second] for a in first]
            for measured in usable.values()
        ]
    )
    relative = 100 * (values / values.mean(axis=(1, 2, 3), keepdims=True) - 1)
    return {
        "anova": {
            "metric": f"{PRIMARY} on test, percent of the data set's mean",
            "datasets": list(usable),
            **statistics.two_way(relative),
        },
        "cells_percent": relative.mean(axis=(0, 3)).round(4).tolist(),
    }


def _coldstart(setup: Setup) -> Study:
    return Study(
        "coldstart",
        "Items that nobody has chosen yet",
        f"{100 * setup.study.cold_share:g} % of the items are taken out of training and ranked among themselves; as many "
        "others serve validation, which everything tuned is tuned on. A new draw of items for every seed.",
        f"The cold items of the test are ranked for every user who has chosen one of them; nothing is masked. {METRICS_ARE}",
        _drawn(setup, "coldstart", coldstart.LABELS, "cold_items"),
    )


def _coldusers(setup: Setup) -> Study:
    return Study(
        "coldusers",
        "Users who have done nothing yet",
        f"{100 * setup.study.cold_share:g} % of the users are taken out of training, and all items are ranked for them by "
        "their text: their own, or that of their training items, which are not ranked; as many others serve validation, which "
        "everything tuned is tuned on. A new draw of users for every seed.",
        f"All items are ranked for the test's cold users; only their training items are masked. {METRICS_ARE}",
        _drawn(setup, "coldusers", coldusers.LABELS, "cold_users"),
    )


def _drawn(setup: Setup, task: str, labels: Mapping[str, str], counted: str) -> dict[str, dict[str, Any]]:
    """Data set -> what the scorers of a cold-start task reached over draws; `counted` is the fact that tells their number."""
    sources = _with_text(setup, task)
    graph = {**setup.study.base, "model.side_encoder": "sse"}
    settings = {"share": setup.study.cold_share, "graph": graph}
    seeds = setup.config.all_seeds()
    units = [
        Unit(source, task, settings, seed, f"{counted.replace('_', ' ')}, seed {seed}") for source in sources for seed in seeds
    ]
    outcomes = iter(setup.runner.run(units))
    datasets: dict[str, dict[str, Any]] = {}
    for source in sources:
        facts = [next(outcomes).facts for _ in seeds]
        models = {
            name: {
                "label": label,
                "settings": facts[0]["settings"][name],
                **{
                    part: {metric: statistics.spread([one[part][name][metric] for one in facts]) for metric in SHOWN}
                    for part in ("val", "test")
                },
            }
            for name, label in labels.items()
        }
        datasets[source.name] = {"models": models, counted: facts[0][counted], "skipped": {}}
    return datasets


def _bias(setup: Setup) -> Study:
    sources = _with_text(setup, "bias")
    study, seeds = setup.study, setup.config.all_seeds()
    recipe = setup.config.model if setup.config.model.kind == "recipe" else ModelSpec(name=OURS, kind="recipe")
    models = {GATES: {**study.base, "model.side_encoder": "sse"}, OURS: recipe.settings}
    kinds = [kind for kind in propensity.KINDS if kind != "none"]
    conditions = list(product(kinds, study.propensity_strengths, study.formulations))
    chosen = {source.name: _tuned(setup, source, recipe) for source in sources} if OURS in study.formulations else {}
    units = [
        Unit(
            source,
            "propensity",
            {
                "kind": kind,
                "strength": strength,
                "lure": study.propensity_lure,
                "formulation": formulation,
                "model": models.get(formulation, study.bias_ease),
                **({"chosen": chosen[source.name]} if formulation == OURS else {}),
            },
            seed,
            f"{kind} {strength:g}, {formulation}, seed {seed}",
        )
        for source in sources
        for kind, strength, formulation in conditions
        for seed in seeds
    ]
    outcomes = iter(setup.runner.run(units))
    datasets: dict[str, dict[str, Any]] = {}
    for source in sources:
        rows = [
            {
                "kind": kind,
                "strength": strength,
                "formulation": formulation,
                **_exposure([next(outcomes).facts for _ in seeds]),
            }
            for kind, strength, formulation in conditions
        ]
        datasets[source.name] = {"propensity": rows, "skipped": {}}
    return Study(
        "bias",
        "Known propensity",
        "A tenth of the items get praise in their text (generic), and clicks that the praise brought (inflated). Exposure: "
        "their share of the top ten of a model fitted on clean data, on inflated data, and on inflated data with debiasing. "
        "Removed: the share of the induced exposure that debiasing takes back; 100 % is the clean model's exposure.",
        "Top tens of all items, for every user with test interactions; only the training items of the model's own data are "
        f"masked. Debiasing has strength 1, but for {GATES}, which choose theirs on validation. {OURS} is tuned on the clean "
        "data with the first seed, the settings of the others are fixed.",
        datasets,
    )


def _exposure(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `propensity` measured under one condition, over the seeds; None of what could be measured with none."""
    measured = (
        "removed_percent",
        "ndcg_change_percent",
        "lured_share",
        "exposure_clean",
        "exposure_inflated",
        "exposure_debiased",
    )
    values = {name: [one[name] for one in facts if one[name] is not None] for name in measured}
    return {name: statistics.spread(found) if found else None for name, found in values.items()}


def _tuned(setup: Setup, source: Source, spec: ModelSpec) -> Any:
    """What a model that tunes itself chose on a data set with the first seed."""
    measured, _ = measure_models(source, [spec], setup.config.model_copy(update={"seeds": 1}), setup.runner)
    return measured[spec.name].outcomes[0].facts["chosen"]["inner"]


def _with_text(setup: Setup, study: str) -> list[Source]:
    found = [source for source in setup.sources if load(source).has_text]
    if not found:
        raise DataError(
            f"study '{study}' needs items with text, and no data set has any.",
            "Add items.jsonl with text fields, or give another.",
        )
    return found


def _quick(setup: Setup) -> list[Study]:
    """Small versions of all studies but the ablation, to see that they work; what is set of them stays."""
    base = {
        "model.num_negatives": 64,
        "max_epochs": 8,
        "batch_size": 256,
        "evaluate_every": 2,
        **setup.study.base,
    }
    small = {
        "backbones": ("mf", "lightgcn"),
        "encoders": ("none", "mlp", "sse"),
        "ranks": (8, 16),
        "dims": (8, 16),
        "noises": (0.0, 0.1),
        "cold_share": 0.15,
        "propensity_strengths": (1.0,),
        "formulations": (GATES, "counterfactual_log"),
    }
    given = {name: getattr(setup.study, name) for name in setup.study.model_fields_set}
    study = setup.study.model_copy(update={**small, **given, "base": base})
    quick = Setup(setup.sources, setup.config.model_copy(update={"study": study}), setup.runner)
    return [STUDIES[name](quick) for name in ALL if name != "ablation"]


STUDIES: Mapping[str, Callable[[Setup], Study]] = {
    "paper": _paper,
    "ablation": _ablation,
    "rank": _rank,
    "noise": _noise,
    "coldstart": _coldstart,
    "coldusers": _coldusers,
    "collapse": _collapse,
    "bias": _bias,
}


def comparison(results: Sequence[Mapping[str, Any]]) -> Study:
    """Our model and its rivals, of `components.experiment.run.experiment`, in the form of a study."""
    datasets: dict[str, dict[str, Any]] = {}
    for result in results:
        own = {name: result[name] for name in ("val", "test", "seconds", "dim", "peak_memory_mb", "bias")}
        own |= {"label": result["recipe"]["label"], "effective_rank": result.get("effective_rank")}
        rivals = {name: {**one, "against": OURS, "minus": one["ours_minus"]} for name, one in result["baselines"].items()}
        datasets[result["dataset"]] = {"models": {OURS: own, **rivals}, "skipped": result["skipped"]}
    return Study(
        "comparison",
        "Against the baselines",
        "Everything is tuned on validation and ranks the test interactions once. Differences are ours minus theirs, over the "
        "same users.",
        PROTOCOL,
        datasets,
    )

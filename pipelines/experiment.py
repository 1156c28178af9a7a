"""``cllmr experiment``: settings from flags and files, the run, and what it leaves behind."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from components.cllmr.config import BACKBONE_NAMES, ENCODER_NAMES
from components.errors import ConfigError, did_you_mean
from components.experiment.config import OURS, Effect, ExperimentConfig, Suite, named
from components.train.config import MEMBERS, EffectName, MemberName
from pipelines.config import merge, parse_override, read_tree

if TYPE_CHECKING:
    from components.experiment.suites import Study

Tell = Callable[[Mapping[str, Any]], None]
LINEAR: dict[str, tuple[MemberName, ...]] = {"ease": ("ease",), "ials": ("factors",), "ensemble": MEMBERS}
"""Backbones that are no graph: members of the recipe, all of them in "ensemble"."""
GRAPH_EFFECTS = get_args(Effect)
LINEAR_EFFECTS = get_args(EffectName)
CHOICES: dict[str, tuple[str, ...]] = {
    "backbone": (*BACKBONE_NAMES, *LINEAR),
    "loss": ("softmax", "bpr"),
    "encoder": ENCODER_NAMES,
    "effect": tuple(dict.fromkeys((*GRAPH_EFFECTS, *LINEAR_EFFECTS))),
}
_SETTING = {"backbone": "model.backbone", "loss": "model.loss", "dim": "model.embedding_dim", "encoder": "model.side_encoder"}
_VARIED = {"backbone": "backbones", "dim": "dims"}


@dataclass(frozen=True)
class Finished:
    """What a run found."""

    studies: "list[Study]"
    result: Any
    """As the result file says it."""
    facts: dict[str, Any]
    """What the figures were measured with, now or when they were found."""
    executed: int
    """Units of work that were done now; the others were found."""


def settings(
    files: Iterable[Path],
    overrides: Iterable[str],
    flags: Mapping[str, Any],
    seeds: int | None,
    rival: str | None,
    baselines: list[str],
    suite: str | None,
) -> ExperimentConfig:
    """The settings that the command line describes; flags win over ``--set``, and that over files.

    Args:
        flags: "backbone", "loss", "dim", "encoder", "effect"; None where not given. Any of them makes our model that one
            instead of the default recipe, a graph model or some of the recipe's members, and none goes with a "model" that
            is given; in a suite they are what all variants share.
        rival, baselines: none of a suite, nor do its files and ``--set`` name any.

    Raises:
        ConfigError: an unknown name, or a value that is not allowed.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    for name, allowed in CHOICES.items():
        if name in given and given[name] not in allowed:
            raise ConfigError(f"--{name} {given[name]}: unknown.", did_you_mean(given[name], allowed))
    if suite is not None and suite not in get_args(Suite):
        raise ConfigError(f"--suite {suite}: unknown.", did_you_mean(suite, get_args(Suite)))
    tree: dict[str, Any] = {}
    for file in files:
        tree = merge(tree, read_tree(file))
    for override in overrides:
        tree = merge(tree, parse_override(override))
    if suite is not None:
        tree = merge(tree, _suite_base({**given, "rival": rival, "baseline": baselines}, tree))
    elif given:
        tree["model"] = _own_model(given, tree)
    outright = {"seeds": seeds, "rival": rival, "baselines": baselines or None}
    tree |= {name: value for name, value in outright.items() if value is not None}
    config = ExperimentConfig.parse(tree, "")
    if suite == "quick":  # here, so that the seeds told are those fitted
        config = config.model_copy(update={"seeds": min(config.seeds, 2)})
    config.rivals()  # a name that is unknown or twice is told before anything starts
    check_models(config)
    return config


def _suite_base(given: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """What the variants of a suite share, as the flags describe it; a study that varies what is given has this one alone."""
    varied_by_it = [f"--{name}" for name in ("encoder", "effect") if given.get(name)]
    has_its_own = [f"--{name}" for name in ("rival", "baseline") if given.get(name)]
    has_its_own += [f"setting '{name}'" for name in ("rival", "baselines") if tree.get(name)]
    for idle, reason in ((varied_by_it, "varies it"), (has_its_own, "has models of its own")):
        if idle:
            raise ConfigError(f"{idle[0]} has no effect on a suite, which {reason}.", f"Leave out {idle[0]} or --suite.")
    if given.get("backbone") in LINEAR:
        raise ConfigError(f"--backbone {given['backbone']} is no graph, and suites compare graph models.", "Leave it out.")
    base = {setting: given[name] for name, setting in _SETTING.items() if name in given}
    varied = {study: [given[name]] for name, study in _VARIED.items() if name in given}
    return {"study": {"base": base, **varied}} if base else {}


def _own_model(given: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Our model as the flags describe it."""
    if "model" in tree:
        told = ", ".join(f"--{name}" for name in given)
        raise ConfigError(
            f"{told}: flags make our model anew, and 'model' is given by --config or --set as well.",
            f"Leave out {told} and write that into model.settings, or leave out 'model'.",
        )
    backbone = given.get("backbone", "ensemble" if given.get("effect") not in (None, *GRAPH_EFFECTS) else None)
    return _linear_model(given) if backbone in LINEAR else _graph_model(given)


def _graph_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """A graph model as the flags describe it."""
    effect, encoder = given.get("effect", "none"), given.get("encoder", "sse")
    if effect not in GRAPH_EFFECTS:
        raise ConfigError(
            f"--effect {effect} is one of {', '.join(LINEAR)}.", f"A graph model has {', '.join(GRAPH_EFFECTS)}: choose one."
        )
    own = {_SETTING.get(name, name): value for name, value in given.items()}
    return {
        "name": OURS,
        "kind": "graph",
        "settings": {"model.backbone": "lightgcn", "model.side_encoder": encoder, **own},
        "grid": named("lightgcn" if encoder == "none" else f"lightgcn+{encoder}").grid,
    }


def _linear_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """Members of the recipe as the flags describe them: tuned, joined and debiased as it is."""
    backbone, effect = given.get("backbone", "ensemble"), given.get("effect")
    members: tuple[MemberName, ...] = LINEAR[backbone]
    if backbone == "ease" and given.get("encoder", "none") != "none":
        members = ("graph", *members)
    if effect is not None and effect not in LINEAR_EFFECTS:
        raise ConfigError(
            f"--effect {effect} is one of graph models.", f"--backbone {backbone} has {', '.join(LINEAR_EFFECTS)}: choose one."
        )
    of_graph = {_SETTING[name]: given[name] for name in ("loss", "dim", "encoder") if name in given}
    if "graph" not in members and (idle := next((name for name in ("loss", "dim", "encoder") if name in given), None)):
        raise ConfigError(f"--{idle} has no effect on --backbone {backbone}, which has no graph model.", f"Leave out --{idle}.")
    settings: dict[str, Any] = {"recipe.members": members, **of_graph}
    if backbone == "ease" and "graph" in members:
        settings["recipe.graph_joins"] = False  # its side representations enter the Gram matrix, and the score is EASE's
    if effect is not None:
        settings |= {"effect": effect, "model.counterfactual": effect == "gates"}
    return {"name": OURS, "kind": "recipe", "settings": settings}


def check_models(config: ExperimentConfig) -> None:
    """Raises ConfigError for a model setting that does not exist, before anything is fitted."""
    from components.experiment.models import check, graph_settings

    for spec in [config.model, *config.rivals()]:
        check(spec)
    graph_settings(config.study.base, config.first_seed)


def run(config: ExperimentConfig, datasets: list[Path], suite: str | None, work: Path, parallel: int, tell: Tell) -> Finished:
    """Runs the comparison, or a suite, on all data sets; what is done already is found below `work`.

    Raises:
        UserError: data or settings cannot be used.
    """
    from components.experiment.planted import write_blocks
    from components.experiment.run import Runner, Source, experiment
    from components.experiment.store import Results
    from components.experiment.suites import Setup, comparison, run_suite
    from pipelines.summary import hardware, versions

    if not datasets and suite == "quick":
        datasets = [write_blocks(work / "planted-blocks")]
    if not datasets:
        raise ConfigError("no data set is given.", "Give --dataset DIR, or --suite quick for a small one that is made up.")
    sources = [Source.open(path, config.text_encoder, work, tell) for path in datasets]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"two data sets have the same name: {', '.join(names)}.", "Rename a folder, or give each once.")
    facts: dict[str, Any] = {"seeds": config.all_seeds(), "text_encoder": config.text_encoder}
    with Runner(Results(work), parallel, tell, {"versions": versions(), "hardware": hardware()}).workers() as runner:
        if suite is not None:
            studies = run_suite(suite, Setup(sources, config, runner))
            facts |= runner.measured_with()
            result: Any = {"suite": suite, "datasets": names, "studies": [study.as_json() for study in studies], **facts}
        else:
            compared = [experiment(source, config, runner) for source in sources]
            environment = runner.measured_with()
            facts |= environment
            found = [{**one, **environment} for one in compared]
            studies, result = [comparison(found)], found[0] if len(found) == 1 else found
        return Finished(studies, result, facts, len(runner.executed))


def write_report(folder: Path, finished: Finished) -> None:
    """report.html, results.json and results.md; raises ConfigError when the folder cannot be written."""
    from components.experiment.report import render
    from components.experiment.tables import markdown

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(render(finished.studies, finished.facts), encoding="utf-8")
        (folder / "results.md").write_text(markdown(finished.studies), encoding="utf-8")
        text = json.dumps(finished.result, indent=2, ensure_ascii=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--report {folder} cannot be written: {error.strerror or error}.", "Choose another folder."
        ) from None

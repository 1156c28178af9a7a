"""What a run will do, read from the compiled pipeline: order and inputs of the tasks, and each stage's fingerprint.

The compiled pipeline is the one list of steps. ``--until`` cuts it, ``--from`` has outputs built again, a dry run shows it.
"""

import importlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from components.artifacts import Manifest, Store
from components.errors import ConfigError, did_you_mean
from components.settings import StageConfig
from components.stages import Stage, fingerprint
from pipelines.names import PipelineName

if TYPE_CHECKING:
    from pipelines.config import PlatformConfig

AFTER_TRAINING = frozenset({"promote", "serve"})
"""What they do depends on the champion at that moment."""
# These read or fill what is outside KFP's sight (input files, an LLM's answers, the feature store, the champion): its cache
# would be wrong.
NEVER_CACHED = frozenset({"ingest", "sideinfo", "features", "train", "promote", "serve", "batch"})


@dataclass(frozen=True)
class CompiledPipeline:
    """A pipeline as KFP's compiler writes it."""

    spec: dict[str, Any]
    """The pipeline spec (intermediate representation)."""
    platforms: dict[str, Any] | None
    """Settings for Kubernetes alone, the second YAML document; none when there are none."""

    def to_yaml(self) -> str:
        """The text that KFP reads."""
        documents = [self.spec] + ([self.platforms] if self.platforms else [])
        return yaml.safe_dump_all(documents, sort_keys=True)

    def to_kubernetes(self, version: str, namespace: str | None = None) -> str:
        """The same as objects of the Kubernetes API (``Pipeline`` and ``PipelineVersion``), for KFP's Kubernetes-native mode.

        Args:
            version: name of the version, of lower-case letters, digits, dots and hyphens.
            namespace: where the objects live; None: where they are applied.
        """
        from kfp.compiler import Compiler
        from kfp.compiler.compiler_utils import KubernetesManifestOptions
        from kfp.components import load_component_from_text

        info = self.spec["pipelineInfo"]
        options = KubernetesManifestOptions(
            pipeline_name=info["name"],
            pipeline_display_name=info.get("displayName", info["name"]),
            pipeline_version_name=f"{info['name']}-{version}",
            pipeline_version_display_name=version,
            namespace=namespace,
            include_pipeline_manifest=True,
        )
        with TemporaryDirectory() as folder:
            path = Path(folder) / "pipeline.yaml"
            Compiler().compile(
                load_component_from_text(self.to_yaml()),
                str(path),
                kubernetes_manifest_format=True,
                kubernetes_manifest_options=options,
            )
            return path.read_text(encoding="utf-8")

    def with_caching(self) -> "CompiledPipeline":
        """The same pipeline, whose tasks KFP may skip when it has seen them with the same inputs: those that read nothing
        else. Part of the spec, because KFP ignores the switch of a run that names a version (kubeflow/pipelines#14253)."""
        spec = deepcopy(self.spec)
        for name, task in spec["root"]["dag"]["tasks"].items():
            task["cachingOptions"] = {} if name in NEVER_CACHED else {"enableCache": True}
        return CompiledPipeline(spec, self.platforms)

    def parents(self) -> dict[str, dict[str, str]]:
        """For every stage, in order: the stage that writes each of its input artifacts, by the input's name."""
        tasks = self.spec["root"]["dag"]["tasks"]
        inputs = {name: task.get("inputs", {}).get("artifacts", {}) for name, task in tasks.items()}
        parents = {
            name: {key: value["taskOutputArtifact"]["producerTask"] for key, value in sorted(artifacts.items())}
            for name, artifacts in inputs.items()
        }
        return {name: parents[name] for name in _sorted_by_dependency(parents)}

    def stages(self) -> list[str]:
        """Stage names in the order they run."""
        return list(self.parents())

    def until(self, stage: str | None) -> "CompiledPipeline":
        """The same pipeline, ended after `stage`; None: whole. Raises ConfigError for an unknown stage."""
        if stage is None:
            return self
        names = self.stages()
        kept = set(names[: _position(stage, names, "--until") + 1])
        spec, platforms = deepcopy(self.spec), deepcopy(self.platforms)
        spec["root"]["dag"]["tasks"] = tasks = _only(spec["root"]["dag"]["tasks"], kept)
        spec["components"] = _only(spec["components"], {task["componentRef"]["name"] for task in tasks.values()})
        executors = {component["executorLabel"] for component in spec["components"].values()}
        spec["deploymentSpec"]["executors"] = _only(spec["deploymentSpec"]["executors"], executors)
        spec["root"].pop("outputDefinitions", None)  # what the pipeline as a whole hands out (a report) may have been cut off
        spec["root"]["dag"].pop("outputs", None)
        for platform in (platforms or {}).get("platforms", {}).values():
            platform["deploymentSpec"]["executors"] = _only(platform["deploymentSpec"]["executors"], executors)
        return CompiledPipeline(spec, platforms)


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run to come."""

    name: str
    parents: dict[str, str]
    """The stage that writes each input, by the input's name."""
    fingerprint: str | None
    """Name of its output; None: decided at run time."""
    done: Manifest | None
    """What it wrote before and will be reused."""

    @property
    def state(self) -> str:
        """``done``, ``to run`` or ``decided at run time``."""
        if self.fingerprint is None:
            return "decided at run time"
        return "done" if self.done else "to run"


def compiled(settings: "PlatformConfig", name: PipelineName = PipelineName.RETRAINING) -> CompiledPipeline:
    """One of the pipelines; `settings` give its parameters their defaults and its tasks their placement."""
    from pipelines.batch_scoring import batch_scoring
    from pipelines.retraining import retraining

    return compile_pipeline(batch_scoring(settings) if name is PipelineName.BATCH else retraining(settings))


def compile_pipeline(pipeline: Any) -> CompiledPipeline:
    """Compiles a ``@dsl.pipeline`` function."""
    from kfp.compiler import Compiler

    with TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        Compiler().compile(pipeline, str(path))
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    return CompiledPipeline(documents[0], documents[1] if len(documents) > 1 else None)


def stage_of(name: str) -> Stage:
    """Name and version of a stage, from ``components.<name>.stage``."""
    stage: Stage = importlib.import_module(f"components.{name}.stage").STAGE
    return stage


def plan(
    pipeline: CompiledPipeline,
    configs: Mapping[str, StageConfig],
    storage_root: str,
    from_stage: str | None = None,
    stage_of: Callable[[str], Stage] = stage_of,
) -> list[PlannedStage]:
    """What a run of `pipeline` will do, in order; nothing is changed.

    Args:
        pipeline: cut already where the run ends.
        configs: every stage's settings.
        storage_root: where artifacts live.
        from_stage: this stage and those after it are built again even where they are done.
        stage_of: gives a stage's name and version.

    Raises:
        ConfigError: `from_stage` is not a stage of the pipeline.
        UserError: input data that a fingerprint depends on cannot be read.
    """
    names = pipeline.stages()
    rebuilt = built_again(names, from_stage)
    store = Store(storage_root)
    known: dict[str, str] = {}
    planned = []
    for name, parents in pipeline.parents().items():
        inputs = {key: known.get(parent) for key, parent in parents.items()}
        name_of_output = None
        if not _is_decided_at_run_time(name, configs[name]) and all(inputs.values()):
            identity = configs[name].identity_below(storage_root)
            name_of_output = fingerprint(stage_of(name), identity, {k: v for k, v in inputs.items() if v})
            known[name] = name_of_output
        done = store.find(name, name_of_output) if name_of_output and name not in rebuilt else None
        planned.append(PlannedStage(name, parents, name_of_output, done))
    return planned


def nothing_to_train(planned: list[PlannedStage]) -> bool:
    """Whether all that is known ahead of a run is done: only what follows a finished evaluation may be left."""
    return all(stage.done or stage.name in AFTER_TRAINING for stage in planned)


def _is_decided_at_run_time(name: str, config: StageConfig) -> bool:
    """Whether a stage's fingerprint, and so that of all after it, depends on the champion at that moment."""
    return name == "promote" or getattr(config, "warm_start", None) == "champion"


def check_order(names: list[str], from_stage: str | None, until: str | None) -> None:
    """Raises ConfigError when a stage does not exist or the run would end before it begins."""
    first = _position(from_stage, names, "--from") if from_stage else 0
    last = _position(until, names, "--until") if until else len(names) - 1
    if last < first:
        raise ConfigError(
            f"--until {until} comes before --from {from_stage}: nothing would run.", f"The order is {' -> '.join(names)}."
        )


def built_again(names: list[str], from_stage: str | None) -> list[str]:
    """The stages that `from_stage` has built even where they are done: itself and all after it; None: none."""
    return names[_position(from_stage, names, "--from") :] if from_stage else []


def _position(stage: str | None, names: list[str], option: str) -> int:
    if stage not in names:
        close = did_you_mean(str(stage), names).removesuffix(f"Allowed: {', '.join(sorted(names))}.")
        raise ConfigError(f"{option} {stage}: no such stage.", f"{close}Stages, in order: {', '.join(names)}.")
    return names.index(stage)


def _sorted_by_dependency(parents: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Parents first; stages that do not depend on each other by name."""
    sorter, order = TopologicalSorter({name: set(inputs.values()) for name, inputs in parents.items()}), []
    sorter.prepare()
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        order += ready
        sorter.done(*ready)
    return order


def _only(mapping: Mapping[str, Any], kept: set[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key in kept}

"""The platform's settings: one frozen tree made of the stages' own configs.

Precedence, lowest first: defaults in the stages' config classes, the preset (``pipelines/presets/*.yaml``), the user's own
YAML files in the order given, ``--set name=value``.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files as package_files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from components.artifacts import FINGERPRINT_LENGTH
from components.batch.config import BatchConfig
from components.errors import ConfigError, did_you_mean, first_line
from components.evaluate.config import EvaluateConfig
from components.features.config import FeaturesConfig
from components.ingest.config import IngestConfig
from components.promote.config import PromoteConfig
from components.serve.config import ServeConfig
from components.settings import StageConfig, Uri, config_error
from components.sideinfo.config import SideinfoConfig
from components.spectrum.config import SpectrumConfig
from components.train.config import CHAMPION, RegistryConfig, TrainConfig
from pipelines.checks import check_settings
from pipelines.cluster_config import ClusterConfig
from pipelines.placement import PlacementConfig

DEFAULT_PRESET = "local"
BATCH = "batch"
"""The stage that is no part of the retraining pipeline."""


def _named(root: str) -> str:
    """A storage root that is not some other place than its author meant."""
    if not root.strip():
        raise ValueError("a blank one would be the current directory; write '.' where that is meant")
    if found := re.match(r"([A-Za-z][\w+.-]+):/(?!/)", root):  # one letter alone is a drive
        raise ValueError(f"it would be a directory named '{found[1]}:'; '{found[1]}://' was probably meant")
    return root


class PlatformConfig(BaseModel):
    """Everything that can be set, by stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    storage_root: Annotated[Uri, AfterValidator(_named)] = ".cllmr"
    """Where artifacts live: a local path or a URI that pyarrow reads (s3://, gs://, abfs://, file://), without a key."""
    ingest: IngestConfig = IngestConfig()
    """Reading, filtering and splitting the interactions."""
    sideinfo: SideinfoConfig = SideinfoConfig()
    """Profile texts and their embeddings."""
    spectrum: SpectrumConfig = SpectrumConfig()
    """The truncated singular value decomposition."""
    features: FeaturesConfig = FeaturesConfig()
    """The feature store."""
    train: TrainConfig = TrainConfig()
    """The recommender and its training."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Metrics and baselines."""
    promote: PromoteConfig = PromoteConfig()
    """The gate between challenger and champion, and the model registry."""
    serve: ServeConfig = ServeConfig()
    """The endpoint."""
    batch: BatchConfig = BatchConfig()
    """Batch scoring: a pipeline of its own."""
    placement: PlacementConfig = PlacementConfig()
    """Images, CPU, memory, accelerators and retries of the tasks."""
    cluster: ClusterConfig = ClusterConfig()
    """Kubeflow Pipelines, for what is submitted to it."""

    def stages(self) -> dict[str, StageConfig]:
        """The settings of every stage of the retraining pipeline, by name; train, if it asks for a champion, knows where."""
        found = {name: value for name, value in self if isinstance(value, StageConfig) and name != BATCH}
        if self.train.warm_start == CHAMPION and self.train.registry is None:
            where = RegistryConfig(tracking_uri=self.promote.tracking_uri, model_name=self.promote.model_name)
            found["train"] = self.train.model_copy(update={"registry": where})
        return found

    def batch_of_champion(self) -> BatchConfig:
        """The settings of batch scoring, asking the registry that promote writes to."""
        return self.batch.model_copy(update={"tracking_uri": self.promote.tracking_uri, "model_name": self.promote.model_name})

    def fingerprint(self) -> str:
        """A hash of the whole tree: names a configuration, not an output (that is each stage's own fingerprint)."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_LENGTH]


def preset_names() -> list[str]:
    """Names of the presets that come with the platform."""
    names = (entry.name for entry in package_files("pipelines").joinpath("presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load(preset: str = DEFAULT_PRESET, files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> PlatformConfig:
    """The settings of a run.

    Args:
        preset: names of files in ``pipelines/presets``, joined by commas: later ones are laid over earlier ones.
        files: the user's own YAML files, each a part of the tree; later ones win.
        overrides: ``"train.max_epochs=5"``: dotted name, value as YAML writes it; later ones win.

    Raises:
        ConfigError: an unknown preset or setting (with the closest name), a value that is not allowed, or not beside another
            one, an unreadable file.
    """
    tree: dict[str, Any] = {}
    for name in preset.split(","):
        if name not in preset_names():
            raise ConfigError(f"unknown preset '{name}'.", did_you_mean(name, preset_names()))
        text = package_files("pipelines").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
        tree = merge(tree, _parse(text, f"preset '{name}'"))
    for file in files:
        tree = merge(tree, read_tree(file))
    for override in overrides:
        tree = merge(tree, parse_override(override))
    try:
        config = PlatformConfig.model_validate(tree)
        # once more, now with every default written out: pydantic takes a default as it stands (3 for a float), and a
        # stage, which parses what it is given, would have another fingerprint than the one planned
        config = PlatformConfig.model_validate(config.model_dump(mode="json"))
    except ValidationError as error:
        raise config_error(PlatformConfig, error) from None
    check_settings(config)
    return config


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: mappings are merged key by key, any other value replaces the one below."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(value, Mapping) and isinstance(under, Mapping) else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """``"train.max_epochs=5"`` as a tree: ``{"train": {"max_epochs": 5}}``; raises ConfigError when it is not name=value."""
    name, equals, value = text.partition("=")
    path = [part.strip() for part in name.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"'{text}' is not a setting.", "Write --set name=value, for example --set train.max_epochs=5")
    try:
        tree: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        raise ConfigError(f"the value of '{text}' is not YAML.", f"Quote it: --set '{name}=\"...\"'") from None
    for part in reversed(path):
        tree = {part: tree}
    return dict(tree)


def read_tree(file: str | Path) -> dict[str, Any]:
    """A user's YAML file as a tree; raises ConfigError when it cannot be read or is no mapping."""
    return _parse(_read(Path(file)), f"'{file}'")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config file '{path}' cannot be read: {error.strerror or error}.", "Check --config.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file '{path}' is not UTF-8 text.", "Save it as UTF-8 YAML.") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        reason = "" if isinstance(error, yaml.YAMLError) else f": {first_line(error)}"
        raise ConfigError(f"{source} is not valid YAML{where}{reason}.", "Settings are nested mappings.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} holds a {type(tree).__name__}, not settings.", "Begin with a line like 'train:'.")
    return tree

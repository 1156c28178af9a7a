"""The evaluate stage: the bundle's scores and their rivals on the held-out interactions, as figures and as one HTML page."""

from pathlib import Path
from typing import Any

from components.artifacts import Manifest
from components.evaluate.config import EvaluateConfig
from components.stages import Stage, run_stage

STAGE = Stage("evaluate", version=13)


def run(config: dict[str, Any], storage_root: str, ingest: Manifest, sideinfo: Manifest, train: Manifest) -> Manifest:
    """Evaluates the bundle of `train` on the test interactions of `ingest`.

    Writes metrics.json, report.html and per_user.safetensors (metrics of each evaluated user, for paired comparisons).

    Raises:
        ConfigError: a setting is unknown or not allowed.
        ArtifactError: an input is damaged, or bundle and data have different users or items.
    """
    settings = EvaluateConfig.parse(config, "evaluate")
    parents = {"ingest": ingest, "sideinfo": sideinfo, "train": train}

    def build(directory: Path) -> dict[str, Any]:
        from components.evaluate.build import build as build_report  # numpy and its kin: not for an output that is reused

        return build_report(directory, settings, ingest, sideinfo, train)

    return run_stage(STAGE, settings, storage_root, parents, build)

"""The ingest stage: raw interactions, items and users -> the validated, filtered and split data set."""

from pathlib import Path
from typing import Any

from components.artifacts import Manifest
from components.ingest.config import IngestConfig
from components.stages import Stage, run_stage

STAGE = Stage("ingest", version=6)


def run(config: dict[str, Any], storage_root: str) -> Manifest:
    """Builds, or finds, the data set that `config` describes.

    Raises:
        ConfigError: a setting is unknown or not allowed, or does not fit the data.
        DataError: a file is missing or is no table, a column is missing, or too few interactions are left.
    """
    settings = IngestConfig.parse(config, STAGE.name)

    def build(directory: Path) -> dict[str, Any]:
        from components.ingest.build import build as build_data_set  # pandas and pandera: not for an output that is reused

        return build_data_set(directory, settings)

    return run_stage(STAGE, settings, storage_root, {}, build)

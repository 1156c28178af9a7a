"""The spectrum stage: the training matrix's leading singular vectors, one row per user and item."""

from pathlib import Path
from typing import Any

import numpy as np

from components.artifacts import Manifest, write_json
from components.ids import TRAIN
from components.spectrum.config import SpectrumConfig
from components.stages import Stage, run_stage

STAGE = Stage("spectrum", version=2)

SPECTRUM_FILE = "spectrum.safetensors"
ENERGY_FILE = "energy.json"


def run(config: dict[str, Any], storage_root: str, ingest: Manifest) -> Manifest:
    """Decomposes the training interactions of `ingest` (CLLMR, E1-E3).

    Writes spectrum.safetensors (`users` (num_users, q), `items` (num_items, q), `singular_values` (q,), float32) and
    energy.json. Facts of the manifest: ``rank``, ``normalisation``, ``energy_share`` (of the squared Frobenius norm, 0 to 1),
    ``largest_singular_value``, ``smallest_singular_value`` (of those kept).

    Raises:
        ConfigError: a setting is unknown or not allowed, or the rank is larger than the matrix.
        DataError: there are no training interactions.
        ArtifactError: the data set is missing or damaged.
    """
    settings = SpectrumConfig.parse(config, STAGE.name)
    return run_stage(STAGE, settings, storage_root, {"ingest": ingest}, lambda built: _build(built, settings, ingest))


def _build(built: Path, config: SpectrumConfig, ingest: Manifest) -> dict[str, Any]:
    from safetensors.numpy import save_file

    from components.ingest.dataset import Dataset
    from components.spectrum.decompose import energy_report, spectrum

    found = spectrum(Dataset.load(ingest.path()).matrix(TRAIN), config.rank, config.normalisation)
    arrays = {"users": found.users, "items": found.items, "singular_values": found.singular_values}
    save_file({name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}, built / SPECTRUM_FILE)
    write_json(built / ENERGY_FILE, energy_report(found, config.normalisation))
    return {
        "rank": found.rank,
        "normalisation": config.normalisation,
        "energy_share": round(found.energy_share(found.rank), 6),
        "largest_singular_value": round(float(found.singular_values[0]), 6),
        "smallest_singular_value": round(float(found.singular_values[-1]), 6),
    }

"""A feature set as serving names and opens it."""

from dataclasses import dataclass
from pathlib import Path

from components.artifacts import Store
from components.errors import ArtifactError
from feature_repo.store import CONFIG_FILE, REGISTRY_FILE

JOIN_KEY = "user_id"


@dataclass(frozen=True)
class FeatureSet:
    """The features that one bundle was trained on."""

    storage_root: str
    fingerprint: str


def find_feature_set(storage_root: str, fingerprint: str) -> Path:
    """What opens a feature set, as a local directory.

    Raises:
        ArtifactError: there is no such feature set.
    """
    manifest = Store(storage_root).find("features", fingerprint)
    if manifest is None:
        raise ArtifactError(
            f"feature set {fingerprint} is not below '{storage_root}'.", "Build it again: cllmr run --from features"
        )
    return manifest.path(CONFIG_FILE, REGISTRY_FILE)  # which are read while it is opened; the tables are for training

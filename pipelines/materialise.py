"""Puts the online rows of the models that are served, or may be at once, back where they are missing.

Not of today's data: where a challenger was refused, the champion reads the feature set of an earlier run.
"""

from collections.abc import Collection

from components.artifacts import Manifest, Store, fingerprint
from components.errors import ArtifactError
from components.features import stage
from components.features.config import FeaturesConfig
from components.progress import emit


def feature_sets(storage_root: str, tracking_uri: str, deployed: Collection[str] = ()) -> list[Manifest]:
    """The feature sets of the champion, the challenger and the champion before, under every name of the registry.

    Args:
        storage_root: an absolute path or a URI.
        tracking_uri: of the registry.
        deployed: fingerprints of models that endpoints are configured with, whatever the registry says.

    Raises RegistryError when the registry cannot be reached.
    """
    from components.tracking import pointed_at

    store, kind, found = Store(storage_root), stage.STAGE.name, {}
    for model in sorted(pointed_at(tracking_uri).union(deployed)):
        train = store.find("train", model)
        features = store.find(kind, train.parents[kind]) if train is not None else None
        if features is None:
            emit("warning", stage=kind, message=f"model {model} has no feature set below '{storage_root}'")
        else:
            found[features.fingerprint] = features
    return list(found.values())


def put_back(features: Manifest) -> bool:
    """Writes a feature set's online rows if any are missing; whether it has.

    Raises:
        ArtifactError: what it was made from is gone, or today's code would make another one.
        StorageError: the online store cannot be reached, or does not give back what was written.
    """
    if stage.is_live(features):
        return False
    store, kind = Store(features.storage_root), stage.STAGE.name
    settings = FeaturesConfig.parse(features.config, kind)
    parents = {name: store.find(name, parent) for name, parent in features.parents.items()}
    whole = {name: parent for name, parent in parents.items() if parent is not None}
    if len(whole) < len(parents) or fingerprint(stage.STAGE, settings.identity(), features.parents) != features.fingerprint:
        raise ArtifactError(
            f"feature set {features.fingerprint} cannot be written again: its inputs are gone, or this version of the stage "
            "makes another one.",
            "Run the pipeline and promote its model, or use the image of the run that made it.",
        )
    stage.run(features.config, features.storage_root, **whole)
    return True

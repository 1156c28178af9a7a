"""Which feature sets must be in the online store: those of the models that are served, or may be at once.

Not those of today's data: where a challenger was refused, the champion reads the feature set of an earlier run.
"""

from collections.abc import Collection

from components.artifacts import Manifest, Store
from components.progress import emit

FEATURES = "features"


def feature_sets(storage_root: str, tracking_uri: str, deployed: Collection[str] = ()) -> list[Manifest]:
    """The feature sets of the champion, the challenger and the champion before, under every name of the registry.

    Args:
        storage_root: an absolute path or a URI.
        tracking_uri: of the registry.
        deployed: fingerprints of models that endpoints are configured with, whatever the registry says.

    Raises RegistryError when the registry cannot be reached.
    """
    from components.registry import pointed_at

    store, found = Store(storage_root), {}
    for model in sorted(pointed_at(tracking_uri).union(deployed)):
        train = store.find("train", model)
        features = store.find(FEATURES, train.parents[FEATURES]) if train is not None else None
        if features is None:
            emit("warning", stage=FEATURES, message=f"model {model} has no feature set below '{storage_root}'")
        else:
            found[features.fingerprint] = features
    return list(found.values())

"""The KFP task of the train stage: maps manifests to a call of ``components.train.stage.run``, here or as a Ray job."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]  # kfp has no types
def train(
    config: dict[str, Any],
    storage_root: str,
    ingest: dsl.Input[dsl.Artifact],
    features: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
) -> None:
    """Trains the recommender and writes the model bundle."""
    from components.artifacts import Manifest
    from components.launch import launch
    from components.train.warm import resolve

    inputs = {"ingest": ingest, "features": features}
    parents = {name: Manifest.read(parent.path) for name, parent in inputs.items()}
    launch("train", resolve(config, storage_root, **parents), storage_root, parents).write(manifest.path)

"""The KFP task of the serve stage: maps manifests to a call of ``components.serve.stage.run``."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]  # kfp has no types
def serve(
    config: dict[str, Any],
    storage_root: str,
    features: dsl.Input[dsl.Artifact],
    promote: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
) -> None:
    """Writes the endpoint's configuration for the champion and checks that it answers."""
    from components.artifacts import Manifest
    from components.serve.stage import run

    inputs = {"features": features, "promote": promote}
    parents = {name: Manifest.read(parent.path) for name, parent in inputs.items()}
    run(config, storage_root, **parents).write(manifest.path)

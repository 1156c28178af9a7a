"""The KFP task of the features stage: maps manifests to a call of ``components.features.stage.run``."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]  # kfp has no types
def features(
    config: dict[str, Any],
    storage_root: str,
    ingest: dsl.Input[dsl.Artifact],
    sideinfo: dsl.Input[dsl.Artifact],
    spectrum: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
) -> None:
    """Registers and materialises the features in Feast, and reads them back."""
    from components.artifacts import Manifest
    from components.features.stage import run

    inputs = {"ingest": ingest, "sideinfo": sideinfo, "spectrum": spectrum}
    parents = {name: Manifest.read(parent.path) for name, parent in inputs.items()}
    run(config, storage_root, **parents).write(manifest.path)

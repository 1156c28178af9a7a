"""The KFP task of the spectrum stage: maps manifests to a call of ``components.spectrum.stage.run``."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]  # kfp has no types
def spectrum(
    config: dict[str, Any],
    storage_root: str,
    ingest: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
) -> None:
    """Decomposes the training matrix into its leading singular vectors."""
    from components.artifacts import Manifest
    from components.spectrum.stage import run

    run(config, storage_root, ingest=Manifest.read(ingest.path)).write(manifest.path)

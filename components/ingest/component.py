"""The KFP task of the ingest stage: maps manifests to a call of ``components.ingest.stage.run``."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]  # kfp has no types
def ingest(
    config: dict[str, Any],
    storage_root: str,
    manifest: dsl.Output[dsl.Artifact],
) -> None:
    """Reads raw interactions, users and items; writes the validated, filtered and split data set."""
    from components.ingest.stage import run

    run(config, storage_root).write(manifest.path)

"""The KFP task of the promote stage: maps manifests to a call of ``components.promote.stage.run``."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]  # kfp has no types
def promote(
    config: dict[str, Any],
    storage_root: str,
    train: dsl.Input[dsl.Artifact],
    evaluate: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
) -> None:
    """Compares the challenger with the champion and moves the champion alias when it wins."""
    from components.artifacts import Manifest
    from components.promote.stage import run

    inputs = {"train": train, "evaluate": evaluate}
    parents = {name: Manifest.read(parent.path) for name, parent in inputs.items()}
    run(config, storage_root, **parents).write(manifest.path)

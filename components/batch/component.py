"""The KFP task of batch scoring: a call of ``components.batch.stage.run``."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]  # kfp has no types
def batch(config: dict[str, Any], storage_root: str, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Ranks items for all users with the champion's bundle and writes them as a table."""
    from components.batch.stage import run

    run(config, storage_root).write(manifest.path)

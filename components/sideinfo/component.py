"""The KFP task of the sideinfo stage: maps manifests to a call of ``components.sideinfo.stage.run``, here or as a Ray job."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]  # kfp has no types
def sideinfo(
    config: dict[str, Any],
    storage_root: str,
    ingest: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Writes a profile text and its embedding for every item and user; the report is shown in the KFP console."""
    import shutil

    from components.artifacts import Manifest
    from components.launch import launch

    done = launch("sideinfo", config, storage_root, {"ingest": Manifest.read(ingest.path)})
    done.write(manifest.path)
    shutil.copyfile(done.path() / "report.html", report.path)

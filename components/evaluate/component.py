"""The KFP task of the evaluate stage: maps manifests to a call of ``components.evaluate.stage.run``."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]  # kfp has no types
def evaluate(
    config: dict[str, Any],
    storage_root: str,
    ingest: dsl.Input[dsl.Artifact],
    sideinfo: dsl.Input[dsl.Artifact],
    train: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Measures accuracy, collapse and bias next to the baselines; the report is shown in the KFP console."""
    import shutil

    from components.artifacts import Manifest
    from components.evaluate.stage import run

    inputs = {"ingest": ingest, "sideinfo": sideinfo, "train": train}
    done = run(config, storage_root, **{name: Manifest.read(parent.path) for name, parent in inputs.items()})
    done.write(manifest.path)
    for output, file in ((report, "report.html"), (metrics, "metrics.json")):
        shutil.copyfile(done.path() / file, output.path)
    metrics.metadata.update({name: value for name, value in done.facts.items() if isinstance(value, int | float)})

"""A pipeline of the fake stages, defined as the real one is; a file apart, for inside a task ``kfp.dsl`` has no decorators."""

from kfp import dsl

from pipelines.plan import CompiledPipeline, compile_pipeline
from tests.fakes import FakePlatform


@dsl.component(base_image="python", install_kfp_package=False)
def ingest(config: dict, storage_root: str, manifest: dsl.Output[dsl.Artifact]) -> None:
    from tests.fakes import run

    run("ingest", config, storage_root).write(manifest.path)


@dsl.component(base_image="python", install_kfp_package=False)
def sideinfo(config: dict, storage_root: str, ingest: dsl.Input[dsl.Artifact], manifest: dsl.Output[dsl.Artifact]) -> None:
    from tests.fakes import run

    run("sideinfo", config, storage_root, ingest=ingest.path).write(manifest.path)


@dsl.component(base_image="python", install_kfp_package=False)
def spectrum(config: dict, storage_root: str, ingest: dsl.Input[dsl.Artifact], manifest: dsl.Output[dsl.Artifact]) -> None:
    from tests.fakes import run

    run("spectrum", config, storage_root, ingest=ingest.path).write(manifest.path)


@dsl.component(base_image="python", install_kfp_package=False)
def train(
    config: dict,
    storage_root: str,
    sideinfo: dsl.Input[dsl.Artifact],
    spectrum: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
) -> None:
    from tests.fakes import run

    run("train", config, storage_root, sideinfo=sideinfo.path, spectrum=spectrum.path).write(manifest.path)


@dsl.component(base_image="python", install_kfp_package=False)
def promote(config: dict, storage_root: str, train: dsl.Input[dsl.Artifact], manifest: dsl.Output[dsl.Artifact]) -> None:
    from tests.fakes import run

    run("promote", config, storage_root, train=train.path).write(manifest.path)


def fake_pipeline(settings: FakePlatform) -> CompiledPipeline:
    """The compiled fake pipeline; it also hands out an artifact, as a pipeline with a report does."""

    @dsl.pipeline(name="fake")
    def pipeline(
        storage_root: str = "nowhere",
        ingest_config: dict = settings.ingest.model_dump(),  # noqa: B008  # the default is what the test compiles in
        sideinfo_config: dict = settings.sideinfo.model_dump(),  # noqa: B008
        spectrum_config: dict = settings.spectrum.model_dump(),  # noqa: B008
        train_config: dict = settings.train.model_dump(),  # noqa: B008
        promote_config: dict = settings.promote.model_dump(),  # noqa: B008
    ) -> None:
        data = ingest(config=ingest_config, storage_root=storage_root).outputs["manifest"]
        texts = sideinfo(config=sideinfo_config, storage_root=storage_root, ingest=data).outputs["manifest"]
        modes = spectrum(config=spectrum_config, storage_root=storage_root, ingest=data).outputs["manifest"]
        model = train(config=train_config, storage_root=storage_root, sideinfo=texts, spectrum=modes).outputs["manifest"]
        promote(config=promote_config, storage_root=storage_root, train=model)

    return compile_pipeline(pipeline)

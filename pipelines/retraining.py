"""The pipeline: which stages, in which order, with which settings. The same definition runs here and on a cluster."""

from typing import Any

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_task import PipelineTask

from components.evaluate.component import evaluate
from components.features.component import features
from components.ingest.component import ingest
from components.promote.component import promote
from components.serve.component import serve
from components.sideinfo.component import sideinfo
from components.spectrum.component import spectrum
from components.train.component import train
from pipelines.config import PlatformConfig
from pipelines.placement import place

NAME = "cllmr-retraining"


def retraining(settings: PlatformConfig) -> GraphComponent:
    """The retraining pipeline; `settings` give its parameters their defaults and its tasks their placement."""
    defaults = {name: stage.as_parameter() for name, stage in settings.stages().items()}

    def placed(task: PipelineTask, display_name: str) -> PipelineTask:
        return place(task, settings.placement).set_display_name(display_name)

    @dsl.pipeline(name=NAME, display_name="CLLMR retraining")  # type: ignore[untyped-decorator]  # kfp has no types
    def pipeline(
        storage_root: str = settings.storage_root,
        ingest_config: dict[str, Any] = defaults["ingest"],
        sideinfo_config: dict[str, Any] = defaults["sideinfo"],
        spectrum_config: dict[str, Any] = defaults["spectrum"],
        features_config: dict[str, Any] = defaults["features"],
        train_config: dict[str, Any] = defaults["train"],
        evaluate_config: dict[str, Any] = defaults["evaluate"],
        promote_config: dict[str, Any] = defaults["promote"],
        serve_config: dict[str, Any] = defaults["serve"],
    ) -> None:
        """From raw interactions to a served, debiased recommender.

        1. ingest: validate, filter and split the interactions; write vocabularies and a data card.
        2. sideinfo: write profile texts of items and users, and embed them.
        3. spectrum: decompose the training matrix.
        4. features: register and materialise side information, spectrum, counts and histories in Feast.
        5. train: learn the recommender and write the model bundle.
        6. evaluate: measure accuracy, collapse and bias next to the baselines; write the report.
        7. promote: compare the challenger with the champion, move the champion alias when it wins.
        8. serve: configure the endpoint for the champion and check that it answers.

        Tasks hand on manifests; the data stay below the storage root.
        """
        data = placed(ingest(config=ingest_config, storage_root=storage_root), "Ingest interactions").outputs["manifest"]
        texts = placed(
            sideinfo(config=sideinfo_config, storage_root=storage_root, ingest=data), "Write and embed side information"
        ).outputs["manifest"]
        modes = placed(
            spectrum(config=spectrum_config, storage_root=storage_root, ingest=data), "Decompose the interactions"
        ).outputs["manifest"]
        views = placed(
            features(config=features_config, storage_root=storage_root, ingest=data, sideinfo=texts, spectrum=modes),
            "Materialise features",
        ).outputs["manifest"]
        challenger = placed(
            train(config=train_config, storage_root=storage_root, ingest=data, features=views), "Train the recommender"
        ).outputs["manifest"]
        measures = placed(
            evaluate(config=evaluate_config, storage_root=storage_root, ingest=data, sideinfo=texts, train=challenger),
            "Evaluate accuracy, collapse and bias",
        ).outputs["manifest"]
        verdict = placed(
            promote(config=promote_config, storage_root=storage_root, train=challenger, evaluate=measures),
            "Promote the challenger or keep the champion",
        ).outputs["manifest"]
        placed(serve(config=serve_config, storage_root=storage_root, features=views, promote=verdict), "Configure the endpoint")

    return pipeline

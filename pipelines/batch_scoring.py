"""The pipeline that ranks items for all users with whatever is champion when it runs."""

from typing import Any

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from components.batch.component import batch
from pipelines.config import PlatformConfig
from pipelines.placement import place

NAME = "cllmr-batch-scoring"


def batch_scoring(settings: PlatformConfig) -> GraphComponent:
    """The batch scoring pipeline; `settings` give its parameters their defaults and its task its placement."""

    defaults = settings.batch_of_champion().as_parameter()

    @dsl.pipeline(name=NAME, display_name="CLLMR batch scoring")  # type: ignore[untyped-decorator]  # kfp has no types
    def pipeline(storage_root: str = settings.storage_root, batch_config: dict[str, Any] = defaults) -> None:
        """From the champion to a table of its rankings.

        1. batch: score all users, or those of a file, and write the best items of each to Parquet.
        """
        place(batch(config=batch_config, storage_root=storage_root), settings.placement).set_display_name(
            "Rank items for all users"
        )

    return pipeline

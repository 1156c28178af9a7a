"""What would end a run late, or in vain, told before it begins: settings that do not fit each other, or the data."""

from typing import TYPE_CHECKING

from components.errors import ConfigError
from components.progress import emit

if TYPE_CHECKING:
    from components.ingest.dataset import Dataset
    from pipelines.config import PlatformConfig


def check_settings(config: "PlatformConfig") -> None:
    """Raises ConfigError where a stage would refuse what other settings than its own make."""
    from components.registry import default_tracking_uri

    if config.train.effect == "reference_texts" and config.sideinfo.backend == "metadata":
        raise ConfigError(
            "setting 'train.effect' = 'reference_texts' needs texts of an LLM, and 'sideinfo.backend' = 'metadata' asks none.",
            "Set sideinfo.backend to openai, vllm or replay, or choose another train.effect.",
        )
    if "://" not in config.storage_root:
        default_tracking_uri(config.storage_root, config.promote.tracking_uri)


def check_data(config: "PlatformConfig", dataset: "Dataset") -> None:
    """Raises ConfigError or DataError where a later stage would refuse these data with these settings, in its own words."""
    from components.spectrum.decompose import check_rank
    from components.train.attributes import attributes_of

    dataset.check_held_out()
    check_rank(config.spectrum.rank, dataset.num_users, dataset.num_items)
    attributes_of(dataset.items, dataset.item_text_columns, config.train)
    if "popularity" not in config.evaluate.baselines and config.promote.min_over_popularity > -1:
        message = "promote.min_over_popularity needs popularity among evaluate.baselines: no model will be promoted"
        emit("warning", stage="promote", message=message)

"""Names that commands and pipelines share; imports nothing heavy, so that the command line starts at once."""

from enum import StrEnum


class PipelineName(StrEnum):
    """The pipelines there are, as a command names them."""

    RETRAINING = "retraining"
    BATCH = "batch"

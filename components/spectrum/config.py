"""Settings of the spectrum stage."""

from typing import Literal

from pydantic import PositiveInt

from components.settings import StageConfig

Normalisation = Literal["sym", "raw"]


class SpectrumConfig(StageConfig):
    """The truncated singular value decomposition of the training matrix."""

    rank: PositiveInt = 64
    """Components kept, q, 1 to min(num_users, num_items); the width of every spectrum row."""
    normalisation: Normalisation = "sym"
    """sym: each interaction is divided by sqrt(degree of its user x degree of its item), so that activity and popularity
    weigh less. raw: the 0/1 matrix itself, whose leading components mostly follow popularity."""

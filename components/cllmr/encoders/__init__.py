"""Side encoders: what turns the text of a node into its side representation z.

A new encoder is one file here, and its name that of the file: settings, the harness and its command line know it from then on.
It subclasses `base.SideEncoder`, takes what it needs from `ModelConfig`, and passes the inherited suite::

    # components/cllmr/encoders/linear_map.py
    '''A linear map of the text.'''

    from torch import Tensor, nn

    from components.cllmr.config import ModelConfig
    from components.cllmr.encoders.base import SideEncoder


    class LinearMap(SideEncoder):
        def __init__(self, text_dim: int, rank: int, output_dim: int, config: ModelConfig) -> None:
            super().__init__(config)
            self.map = nn.Linear(text_dim, output_dim)

        def encode(self, text: Tensor, spectrum: Tensor) -> Tensor:
            return self.map(text)

    # tests/contract/test_encoders.py
    class TestLinearMap(EncoderContract):
        name = "linear_map"

Then ``cllmr experiment --dataset DIR --encoder linear_map`` compares it with the baselines.
"""

from collections.abc import Callable

from components.cllmr.config import ModelConfig
from components.cllmr.encoders.base import Encoded, SideEncoder
from components.cllmr.registry import classes

ENCODERS: dict[str, Callable[[int, int, int, ModelConfig], SideEncoder]] = classes("encoders", SideEncoder)

__all__ = ["ENCODERS", "Encoded", "SideEncoder"]

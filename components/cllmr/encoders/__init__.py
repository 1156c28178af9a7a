"""Side encoders: what turns the text of a node into its side representation z.

A new encoder is one file and one line here. It subclasses `base.SideEncoder`, takes what it needs from `ModelConfig`, and
passes the inherited suite::

    # components/cllmr/encoders/linear_map.py
    class LinearMap(SideEncoder):
        def __init__(self, text_dim, rank, output_dim, config):
            super().__init__(config)
            self.map = nn.Linear(text_dim, output_dim)

        def encode(self, text, spectrum):
            return self.map(text)

    # here: ENCODERS = {..., "linear_map": LinearMap}
    # components/cllmr/config.py: side_encoder: Literal[..., "linear_map"]
    # tests/contract/test_encoders.py: class TestLinearMap(EncoderContract): name = "linear_map"
"""

from collections.abc import Callable

from components.cllmr.config import ModelConfig
from components.cllmr.encoders.attention import AttentionPooling
from components.cllmr.encoders.base import Encoded, SideEncoder
from components.cllmr.encoders.contrastive import ContrastiveMLP
from components.cllmr.encoders.generative import MaskedGenerative
from components.cllmr.encoders.linear import PCA, Whitening
from components.cllmr.encoders.sse import SpectrumSideEncoder

ENCODERS: dict[str, Callable[[int, int, int, ModelConfig], SideEncoder]] = {
    "sse": SpectrumSideEncoder,
    "mlp": ContrastiveMLP,
    "generative": MaskedGenerative,
    "attention": AttentionPooling,
    "pca": PCA,
    "whitening": Whitening,
}

__all__ = ["ENCODERS", "Encoded", "SideEncoder"]

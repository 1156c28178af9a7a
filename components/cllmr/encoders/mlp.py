"""RLMRec-Con's encoder (Ren et al., WWW 2024): a two-layer perceptron of the text, trained by the alignment alone."""

from torch import Tensor

from components.cllmr.config import ModelConfig
from components.cllmr.encoders.base import SideEncoder, two_layers, xavier


class ContrastiveMLP(SideEncoder):
    """text_dim -> (text_dim + dim) / 2 -> LeakyReLU -> dim."""

    def __init__(self, text_dim: int, rank: int, output_dim: int, config: ModelConfig) -> None:
        super().__init__(config)
        self.map = two_layers(text_dim, output_dim, output_dim)
        xavier(self)

    def encode(self, text: Tensor, spectrum: Tensor) -> Tensor:
        z: Tensor = self.map(text)
        return z

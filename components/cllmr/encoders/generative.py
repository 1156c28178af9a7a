"""RLMRec-Gen (Ren et al., WWW 2024): hidden nodes must tell their text from their neighbourhood in the graph.

The published method goes from representation to text and has no side representation of its own. To have one to show, compare
and serve cold items with, a perceptron of the text is trained beside it to invert that map: z is what the map to text takes
back to the text. Its loss reaches nothing else.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.cllmr.config import ModelConfig
from components.cllmr.encoders.base import Encoded, SideEncoder, two_layers, xavier
from components.cllmr.objective import info_nce


class MaskedGenerative(SideEncoder):
    """mlp_up: dim -> (text_dim + dim) / 2 -> LeakyReLU -> text_dim, and its learned inverse."""

    def __init__(self, text_dim: int, rank: int, output_dim: int, config: ModelConfig) -> None:
        super().__init__(config)
        self.mask_ratio = config.mask_ratio
        hidden = (text_dim + output_dim) // 2
        self.to_text = nn.Sequential(nn.Linear(output_dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, text_dim))
        self.from_text = two_layers(text_dim, output_dim, output_dim)
        xavier(self)
        if config.mask_ratio:  # a parameter that nothing uses would stop data-parallel training
            self.mask_token = nn.Parameter(torch.empty(1, config.embedding_dim))
            nn.init.normal_(self.mask_token, std=config.embedding_std)  # as the table it stands in for

    def encode(self, text: Tensor, spectrum: Tensor) -> Tensor:
        z: Tensor = self.from_text(text)
        return z

    def forward(self, text: Tensor, spectrum: Tensor, generator: torch.Generator | None = None) -> Encoded:
        z = self.encode(text, spectrum)
        frozen = {name: parameter.detach() for name, parameter in self.to_text.named_parameters()}
        back = torch.func.functional_call(self.to_text, frozen, (z,))
        return Encoded(z, (1 - functional.cosine_similarity(back, text, dim=1)).mean())

    def alignment(self, collaborative: Tensor, z: Tensor, text: Tensor) -> Tensor:
        """InfoNCE between the text told from the hidden nodes' representations, and their text."""
        return info_nce(self.to_text(collaborative), text, self.temperature)

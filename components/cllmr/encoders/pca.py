"""Principal components of the text: a rival without learning, fitted in closed form before training."""

import torch
from torch import Tensor

from components.cllmr.config import ModelConfig
from components.cllmr.encoders.base import SideEncoder


class PCA(SideEncoder):
    """The text's leading principal components; zeros are appended where the text has fewer dimensions than z."""

    whiten = False
    """Whether every component is scaled to variance 1."""
    mean: Tensor
    projection: Tensor

    def __init__(self, text_dim: int, rank: int, output_dim: int, config: ModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(text_dim))
        self.register_buffer("projection", torch.zeros(text_dim, output_dim))

    @torch.no_grad()
    def prepare(self, text: Tensor) -> None:
        """Fits mean and directions to the nodes that have text."""
        told = text[text.norm(dim=1) > 0].double()
        if not len(told):
            return
        mean = told.mean(dim=0)
        values, vectors = torch.linalg.eigh((told - mean).T @ (told - mean) / len(told))
        kept = min(self.projection.shape[1], len(values))
        values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
        largest = vectors.abs().argmax(dim=0)
        vectors = vectors * torch.sign(vectors[largest, torch.arange(kept)])  # a sign that every solver agrees on
        if self.whiten:
            carries = values > values[0] * 1e-9
            vectors = vectors * torch.where(carries, values.clamp_min(values[0] * 1e-9).rsqrt(), 0.0)
        self.mean.copy_(mean)
        self.projection.zero_()
        self.projection[:, :kept] = vectors.to(self.projection)

    def encode(self, text: Tensor, spectrum: Tensor) -> Tensor:
        return (text - self.mean) @ self.projection

"""LightGCN (He et al., SIGIR 2020)."""

import torch
from torch import Tensor

from components.cllmr.backbones.base import Backbone
from components.cllmr.graph import smooth


class LightGCN(Backbone):
    """Embeddings smoothed over the graph, layers averaged (or summed, as RLMRec does).

    Under the cosine both are the same; with inner products the sum is a larger learning rate. `edge_keep` drops edges in
    training, without rescaling those that stay.
    """

    def nodes(self, embedding: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.smoothed(self.adjacency(generator), embedding)

    def smoothed(self, adjacency: Tensor, embedding: Tensor) -> Tensor:
        """Layers 0 to `num_layers` over a given graph, combined."""
        return self.scaled(smooth(adjacency, embedding, self.config.num_layers), self.config.num_layers + 1)

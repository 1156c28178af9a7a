"""Backbones: collaborative representations of users and items from the interaction graph."""

import torch
from torch import Tensor, nn

from components.cllmr.graph import propagate


class LightGCN(nn.Module):
    """Embeddings smoothed over the graph, layers averaged (He et al., SIGIR 2020).

    Zero layers are matrix factorisation.
    """

    def __init__(self, adjacency: Tensor, num_users: int, num_items: int, embedding_dim: int, num_layers: int) -> None:
        super().__init__()
        self.num_users = num_users
        self.num_layers = num_layers
        self.adjacency: Tensor
        self.register_buffer("adjacency", adjacency, persistent=False)  # derived from the data: not part of a checkpoint
        self.embedding = nn.Parameter(torch.empty(num_users + num_items, embedding_dim))
        nn.init.normal_(self.embedding, std=0.1)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Representations of all users (num_users, dim) and all items (num_items, dim)."""
        layer: Tensor = self.embedding
        total: Tensor = self.embedding
        for _ in range(self.num_layers):
            layer = propagate(self.adjacency, layer)
            total = total + layer
        mean = total / (self.num_layers + 1)
        return mean[: self.num_users], mean[self.num_users :]

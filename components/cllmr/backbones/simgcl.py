"""SimGCL (Yu et al., SIGIR 2022)."""

import torch
from torch import Tensor
from torch.nn import functional

from components.cllmr.backbones.lightgcn import LightGCN
from components.cllmr.graph import propagate
from components.cllmr.sampling import Batch


class SimGCL(LightGCN):
    """LightGCN whose nodes must be recognised between two noisy passes: no graph is augmented.

    After each propagation a vector of length `ssl_noise` is added in the layer's own orthant. The ranking sees no noise. Users
    and chosen items of the batch are contrasted with all nodes of their kind (`ssl_candidates`).
    """

    def nodes(self, embedding: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.smoothed(self.graph.adjacency, embedding)

    def auxiliary_loss(self, batch: Batch, users: Tensor, items: Tensor, generator: torch.Generator) -> Tensor:
        first, second = (self.perturbed(generator) for _ in range(2))
        return self.config.ssl_weight * self.contrast(first, second, torch.unique(batch.users), torch.unique(batch.items))

    def perturbed(self, generator: torch.Generator) -> Tensor:
        """Representations of all nodes by a noisy pass, (num_nodes, embedding_dim)."""
        layer: Tensor = self.embedding
        total: Tensor = self.embedding
        for _ in range(self.config.num_layers):
            layer = propagate(self.graph.adjacency, layer)
            noise = functional.normalize(torch.rand(layer.shape, generator=generator).to(layer), dim=1)
            layer = layer + self.config.ssl_noise * torch.sign(layer) * noise
            total = total + layer
        return self.scaled(total, self.config.num_layers + 1)

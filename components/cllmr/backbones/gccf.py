"""LR-GCCF (Chen et al., AAAI 2020)."""

import torch
from torch import Tensor

from components.cllmr.backbones.base import Backbone
from components.cllmr.config import ModelConfig
from components.cllmr.graph import Graph, propagate


class GCCF(Backbone):
    """Linear propagation with self-loops, all layers side by side: no weights, no activation (METHOD d.4).

    Self-loops count in the degrees: an edge weighs 1/√((d_u + 1)(d_i + 1)), a node's own loop 1/(d + 1).
    """

    def __init__(self, graph: Graph, config: ModelConfig) -> None:
        super().__init__(graph, config)
        self.output_dim = config.embedding_dim * (config.num_layers + 1)
        self.weight: Tensor
        self.register_buffer("weight", graph.normalised(torch.ones_like(graph.weight), self_loops=1.0), persistent=False)

    def nodes(self, embedding: Tensor, generator: torch.Generator | None) -> Tensor:
        weight = self.weight
        if generator is not None and self.config.edge_keep < 1.0:
            weight = self.graph.dropped(weight, self.config.edge_keep, generator)
        adjacency, own = self.graph.matrix(weight), 1 / (self.graph.degree[:, None] + 1)
        layers = [embedding]
        for _ in range(self.config.num_layers):
            layers.append(propagate(adjacency, layers[-1]) + own * layers[-1])
        return torch.cat(layers, dim=1)

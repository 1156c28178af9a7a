"""DCCF (Ren et al., SIGIR 2023): disentangled contrastive collaborative filtering."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.cllmr.backbones.base import Backbone
from components.cllmr.config import ModelConfig
from components.cllmr.graph import Graph, edge_products, propagate, propagate_weighted
from components.cllmr.objective import info_nce
from components.cllmr.sampling import Batch

_SMALLEST = 1e-8
"""Keeps a node without neighbours, or with none that it resembles, at zero instead of 0/0."""


class DCCF(Backbone):
    """Every layer adds four views of its nodes, and three of them must resemble the fourth.

    Local: propagation. Global: a node as a mixture of `num_intents` intents of its side. Adaptive, twice: propagation with
    edges weighted by how much their ends resemble each other, in the local and in the global view.
    """

    def __init__(self, graph: Graph, config: ModelConfig) -> None:
        super().__init__(graph, config)
        if config.num_layers:  # parameters that nothing uses would stop data-parallel training
            self.user_intents = nn.Parameter(torch.empty(config.embedding_dim, config.num_intents))
            self.item_intents = nn.Parameter(torch.empty(config.embedding_dim, config.num_intents))
            for intents in (self.user_intents, self.item_intents):
                nn.init.xavier_normal_(intents)
        self._views: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def nodes(self, embedding: Tensor, generator: torch.Generator | None) -> Tensor:
        adjacency = self.adjacency(generator)
        x, total, views = embedding, embedding, []
        for _ in range(self.config.num_layers):
            local = propagate(adjacency, x)
            mixed = self._mixed(x)
            adaptive = [self._adaptive(ends, x) for ends in (local, mixed)]
            views.append((local, mixed, adaptive[0], adaptive[1]))
            x = local + mixed + adaptive[0] + adaptive[1] + x
            total = total + x
        if generator is not None:
            self._views = views  # of this step, for its auxiliary loss: computing them is most of the cost
        return self.scaled(total, self.config.num_layers + 1)

    def auxiliary_loss(self, batch: Batch, users: Tensor, items: Tensor, generator: torch.Generator) -> Tensor:
        views, self._views = self._views, []
        rows = torch.cat([torch.unique(batch.users), torch.unique(batch.items) + self.graph.num_users])
        split = int((rows < self.graph.num_users).sum())
        total = self.embedding.new_zeros(())
        for local, *others in views:
            anchors = local.index_select(0, rows)
            for other in others:
                targets = other.index_select(0, rows)
                for side in (slice(None, split), slice(split, None)):
                    total = total + info_nce(anchors[side], targets[side], self.config.ssl_temperature)
        return self.config.ssl_weight * total

    def _mixed(self, x: Tensor) -> Tensor:
        """Nodes as mixtures of the intents: softmax(x C) C^T for each side."""
        split = self.graph.num_users
        sides = ((x[:split], self.user_intents), (x[split:], self.item_intents))
        return torch.cat([torch.softmax(side @ intents, dim=1) @ intents.T for side, intents in sides])

    def _adaptive(self, ends: Tensor, x: Tensor) -> Tensor:
        """Mean of the neighbours' `x`, weighted by (1 + cosine of the ends) / 2."""
        likeness = (edge_products(self.graph, functional.normalize(ends, dim=1)) + 1) / 2
        summed = propagate_weighted(self.graph, likeness, torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        return summed[:, :-1] / summed[:, -1:].clamp_min(_SMALLEST)  # the column of ones has become the sum of the weights

"""SGL (Wu et al., SIGIR 2021), edge dropout."""

import torch
from torch import Tensor

from components.cllmr.backbones.lightgcn import LightGCN
from components.cllmr.sampling import Batch


class SGL(LightGCN):
    """LightGCN whose nodes must be recognised between two views of the graph, each without some of its edges.

    The ranking sees the whole graph; `ssl_edge_keep` is the share of edges of a view. Users, items and negatives of the batch
    are contrasted, each once, with all nodes of their kind (`ssl_candidates`).
    """

    def nodes(self, embedding: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.smoothed(self.graph.adjacency, embedding)

    def auxiliary_loss(self, batch: Batch, users: Tensor, items: Tensor, generator: torch.Generator) -> Tensor:
        graph, keep = self.graph, self.config.ssl_edge_keep
        first, second = (
            self.smoothed(graph.matrix(graph.dropped(graph.weight, keep, generator)), self.embedding) for _ in range(2)
        )
        rows = torch.unique(batch.users), torch.unique(torch.cat([batch.items, batch.negatives]))
        return self.config.ssl_weight * self.contrast(first, second, *rows)

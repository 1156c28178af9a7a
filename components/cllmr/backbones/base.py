"""What a backbone is."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from components.cllmr.config import ModelConfig
from components.cllmr.graph import Graph
from components.cllmr.objective import info_nce
from components.cllmr.sampling import Batch


class Backbone(nn.Module, ABC):
    """An ID table of all nodes and what the graph makes of it.

    State that a step leaves to the next (a count, a running mean) belongs in a buffer: a checkpoint holds no other.

    Args:
        graph: of the training interactions.
        config: of the whole model; a backbone reads its own fields.
    """

    def __init__(self, graph: Graph, config: ModelConfig) -> None:
        super().__init__()
        self.graph = graph
        self.config = config
        self.output_dim = config.embedding_dim
        """Width of the representations."""
        self.embedding = nn.Parameter(torch.empty(graph.num_nodes, config.embedding_dim))
        nn.init.normal_(self.embedding, std=config.embedding_std)

    def forward(self, generator: torch.Generator | None = None, embedding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Representations of all users (num_users, output_dim) and all items (num_items, output_dim).

        Args:
            generator: source of edge drop and noise in training, on the CPU; without it nothing is random.
            embedding: replaces the ID table, (num_nodes, embedding_dim), as RLMRec-Gen does to mask nodes.
        """
        nodes = self.nodes(self.embedding if embedding is None else embedding, generator)
        return nodes[: self.graph.num_users], nodes[self.graph.num_users :]

    @abstractmethod
    def nodes(self, embedding: Tensor, generator: torch.Generator | None) -> Tensor:
        """Representations of all nodes: (num_nodes, embedding_dim) -> (num_nodes, output_dim)."""

    def auxiliary_loss(self, batch: Batch, users: Tensor, items: Tensor, generator: torch.Generator) -> Tensor | None:
        """The backbone's own self-supervised loss of a step, weighted; None where it has none.

        Args:
            batch: of the step.
            users, items: what `forward` gave for the step.
            generator: as of `forward`.
        """
        return None

    def adjacency(self, generator: torch.Generator | None) -> Tensor:
        """The normalised adjacency, in training without the edges that `edge_keep` drops."""
        if generator is None or self.config.edge_keep == 1.0:
            return self.graph.adjacency
        return self.graph.matrix(self.graph.dropped(self.graph.weight, self.config.edge_keep, generator))

    def scaled(self, total: Tensor, num_layers: int) -> Tensor:
        """The sum of `num_layers` layers, or their mean, by `layer_combination`."""
        return total / num_layers if self.config.layer_combination == "mean" else total

    def contrast(self, first: Tensor, second: Tensor, users: Tensor, items: Tensor) -> Tensor:
        """InfoNCE of two views of all nodes (num_nodes, dim), sum of the users' and the items' mean.

        Args:
            users: distinct rows of users that must find their own second view.
            items: distinct rows of items that must.
        """
        config, split = self.config, self.graph.num_users
        parts = []
        for rows, one, other in ((users, first[:split], second[:split]), (items, first[split:], second[split:])):
            anchors = one.index_select(0, rows)
            if config.ssl_candidates == "all":
                parts.append(info_nce(anchors, other, config.ssl_temperature, own=rows))
            else:
                parts.append(info_nce(anchors, other.index_select(0, rows), config.ssl_temperature))
        return parts[0] + parts[1]

"""AutoCF (Xia et al., WWW 2023): automated self-supervised learning by a masked graph auto-encoder."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.cllmr.backbones.base import Backbone
from components.cllmr.config import ModelConfig
from components.cllmr.graph import Graph, propagate
from components.cllmr.objective import mean_log_sum_exp
from components.cllmr.sampling import Batch

_SMALLEST = 1e-8
_AGREEMENT_WEIGHT = 0.1
"""The published code counts the agreement in one step of ten, with a weight of 1, whatever `ssl_weight` is."""


class AutoCF(Backbone):
    """An encoder that does not see the neighbourhoods of some seeds, and a decoder that attends over what may be missing.

    In training every step draws `mask_seeds` nodes, those that agree with their surroundings more often, and takes the edges
    within `mask_depth` hops of them away. The encoder smooths over the rest; the decoder, one layer of attention, sees the
    rest, every node itself, and random pairs of masked nodes, as many as edges were taken.

    The published loss, -e_u.e_i + log Σ_j exp(e_u.e_j), is the softmax ranking loss over all items: that is the model's
    business (`loss: softmax`, `similarity: inner_product`, `temperature: 1`, `num_negatives` of at least the items; a user's
    other items do not count against the one that is asked for). Here are the terms beside it: nodes of the batch spread from
    all of their kind, and seeds agree with their surroundings. The published code keeps a mask for ten steps, has a random
    pair for every edge and drops double pairs; here a mask lasts one step, so that a step depends on nothing but the weights.
    """

    def __init__(self, graph: Graph, config: ModelConfig) -> None:
        super().__init__(graph, config)
        dim = config.embedding_dim
        self.num_heads = math.gcd(4, dim)
        self.query, self.key, self.value = (nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim))) for _ in range(3))
        self._agreement: Tensor | None = None

    def nodes(self, embedding: Tensor, generator: torch.Generator | None) -> Tensor:
        graph = self.graph
        own = torch.arange(graph.num_nodes, device=embedding.device)
        if generator is None:
            adjacency, source, target = graph.adjacency, graph.user_nodes, graph.item_nodes
        else:
            seeds = self._seeds(embedding, generator)
            kept, masked = self.masked(seeds)
            adjacency = graph.matrix(graph.normalised(kept.to(embedding)))
            num_pairs = int((~kept).sum())
            pairs = masked[torch.randint(len(masked), (2, num_pairs), generator=generator).to(masked.device)]
            source, target = (
                torch.cat([side[kept], pair]) for side, pair in zip((graph.user_nodes, graph.item_nodes), pairs, strict=True)
            )
        x, total = embedding, embedding
        for _ in range(self.config.num_layers):
            x = propagate(adjacency, x)
            total = total + x
        decoded = self.attended(x, torch.cat([source, target, own]), torch.cat([target, source, own]))
        return self.scaled(total + decoded, self.config.num_layers + 2)

    def auxiliary_loss(self, batch: Batch, users: Tensor, items: Tensor, generator: torch.Generator) -> Tensor:
        agreement, self._agreement = self._agreement, None
        assert agreement is not None, "the loss belongs to a training pass"
        spread = self.embedding.new_zeros(())
        for rows, side in ((batch.users, users), (batch.items, items)):
            anchors = side.index_select(0, torch.unique(rows))
            nothing = rows.new_zeros(2, 0)
            spread = spread + mean_log_sum_exp(torch.full_like(anchors[:, 0], -torch.inf), anchors, side, nothing)
        return self.config.ssl_weight * spread - _AGREEMENT_WEIGHT * agreement

    def masked(self, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """What is hidden around `seeds`: which edges stay, (num_edges,) bool, and the masked nodes, (num_masked,).

        A node within less than `mask_depth` hops of a seed is masked and loses all its edges.
        """
        graph = self.graph
        hidden = torch.zeros(graph.num_nodes, dtype=torch.bool, device=seeds.device)
        hidden[seeds] = True
        kept = torch.ones(graph.num_edges, dtype=torch.bool, device=seeds.device)
        for hop in range(self.config.mask_depth):
            if hop:
                hidden[graph.user_nodes[~kept]] = True
                hidden[graph.item_nodes[~kept]] = True
            kept = ~(hidden[graph.user_nodes] | hidden[graph.item_nodes])
        return kept, torch.nonzero(hidden).squeeze(1)

    def attended(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Attention of every node over the nodes it has pairs with, `num_heads` heads: (num_nodes, dim) -> (num_nodes, dim).

        Args:
            source: the node that attends, (num_pairs,).
            target: the node it attends to, (num_pairs,).
        """
        shape = (-1, self.num_heads, x.shape[1] // self.num_heads)
        query, key, value = (x @ weight for weight in (self.query, self.key, self.value))
        match = (query.index_select(0, source) * key.index_select(0, target)).view(shape).sum(dim=2)  # (num_pairs, num_heads)
        match = match.clamp(-10.0, 10.0).exp()
        share = match / (torch.zeros_like(x[:, : self.num_heads]).index_add(0, source, match) + _SMALLEST)[source]
        passed = share.repeat_interleave(shape[2], dim=1) * value.index_select(0, target)
        return torch.zeros_like(x).index_add(0, source, passed)

    def _seeds(self, embedding: Tensor, generator: torch.Generator) -> Tensor:
        """Nodes drawn with odds of σ(cosine with the mean of the nodes up to two hops away); keeps the mean log of them all."""
        graph = self.graph
        everyone = graph.matrix(torch.ones_like(graph.weight))
        degree = graph.degree[:, None]
        near = propagate(everyone, embedding)
        far = propagate(everyone, near) - degree * embedding  # walks of two steps that do not return
        count = degree + propagate(everyone, degree) - degree
        surroundings = functional.normalize((near + far) / (count + _SMALLEST), dim=1)
        score = functional.logsigmoid((surroundings * functional.normalize(embedding, dim=1)).sum(dim=1))
        self._agreement = score.mean()
        uniform = torch.rand(graph.num_nodes, generator=generator).to(score).clamp_min(torch.finfo(score.dtype).tiny)
        odds = score.detach() - torch.log(-torch.log(uniform))  # Gumbel: the largest are a draw without replacement
        return odds.topk(min(self.config.mask_seeds, graph.num_nodes)).indices

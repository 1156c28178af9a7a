"""AlphaRec (Sheng et al., ICLR 2025): no ID embeddings; text through an MLP, smoothed over the graph, trained by InfoNCE.

An item starts from its text, a user from the mean text of the items chosen; both go through one MLP of two layers, then through
LightGCN's propagation; the score is the cosine.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from components.cllmr.graph import Graph, propagate
from components.cllmr.objective import sampled_softmax
from components.cllmr.sampling import Sampler
from components.evaluate.baselines import Factors
from components.evaluate.metrics import rank


@dataclass(frozen=True)
class AlphaRecSettings:
    """The published ones, but for a larger step and fewer epochs, and what is tuned."""

    temperature: PositiveFloat = 0.15
    embedding_dim: PositiveInt = 64
    num_layers: NonNegativeInt = 2
    num_negatives: PositiveInt = 256
    learning_rate: PositiveFloat = 1e-3
    batch_size: PositiveInt = 4096
    max_epochs: PositiveInt = 60
    evaluate_every: PositiveInt = 4
    patience: PositiveInt = 3
    """Validations without a better Recall@20 before training stops."""


class AlphaRec(nn.Module):
    """Representations of all nodes from their text, (num_nodes, text_dim) -> (num_nodes, embedding_dim), unit rows."""

    def __init__(self, graph: Graph, text: Tensor, settings: AlphaRecSettings) -> None:
        super().__init__()
        self.graph, self.num_layers = graph, settings.num_layers
        self.text: Tensor
        self.register_buffer("text", text, persistent=False)
        hidden = text.shape[1] // 2
        self.map = nn.Sequential(nn.Linear(text.shape[1], hidden), nn.LeakyReLU(), nn.Linear(hidden, settings.embedding_dim))

    def forward(self) -> Tensor:
        layer: Tensor = self.map(self.text)
        total = layer
        for _ in range(self.num_layers):
            layer = propagate(self.graph.adjacency, layer)
            total = total + layer
        return functional.normalize(total, dim=1)


def fit(
    train: sp.csr_array, validation: sp.csr_array, item_text: npt.NDArray[np.float32], settings: AlphaRecSettings, seed: int
) -> Factors:
    """Trains until the validation Recall@20 stops rising: factors with unit rows.

    Args:
        train: (num_users, num_items), binary.
        validation: same shape.
        item_text: unit rows, (num_items, text_dim).
    """
    torch.manual_seed(seed)
    users, items = train.nonzero()
    num_users = train.shape[0]
    chosen = functional.normalize(torch.from_numpy(np.asarray(train @ item_text, dtype=np.float32)), dim=1)
    graph = Graph(users, items, *train.shape)
    model = AlphaRec(graph, torch.cat([chosen, torch.from_numpy(item_text)]), settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    sampler = Sampler(users, items, train.shape[1], settings.batch_size, settings.num_negatives, seed)
    best, best_recall, stale, epoch = _factors(model, num_users), -1.0, 0, 0
    while epoch < settings.max_epochs and stale < settings.patience:
        for step in range(sampler.steps_per_epoch):
            batch = sampler.batch(epoch, step)
            nodes = model()
            anchors = nodes.index_select(0, batch.users) / settings.temperature
            positive = (anchors * nodes.index_select(0, num_users + batch.items)).sum(dim=1)
            opposing = nodes.index_select(0, num_users + batch.negatives)
            loss = sampled_softmax(positive, anchors, opposing, batch.false_negatives)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        epoch += 1
        if epoch % settings.evaluate_every == 0 or epoch == settings.max_epochs:
            found = _factors(model, num_users)
            recall = rank(found.score, train, validation).mean()["recall@20"]
            stale += 1
            if recall > best_recall:
                best, best_recall, stale = found, recall, 0
    return best


@torch.no_grad()
def _factors(model: AlphaRec, num_users: int) -> Factors:
    nodes = model().numpy()
    return Factors(nodes[:num_users].copy(), nodes[num_users:].copy())

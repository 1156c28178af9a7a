"""Matrix factorisation: the ID table itself."""

import torch
from torch import Tensor

from components.cllmr.backbones.base import Backbone


class MatrixFactorisation(Backbone):
    """No graph: a node's representation is its row of the table."""

    def nodes(self, embedding: Tensor, generator: torch.Generator | None) -> Tensor:
        return embedding

"""Attention pooling: a rival encoder that reads the text embedding as a sequence of pieces.

The embedding is cut into pieces of equal width; learned queries attend over them, each query gives a part of z.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.cllmr.config import ModelConfig
from components.cllmr.encoders.base import SideEncoder, xavier

PIECES = 8
QUERIES = 4


class AttentionPooling(SideEncoder):
    """softmax(Q K^T / sqrt(width)) V over the pieces, then a linear map of the queries' answers to output_dim."""

    def __init__(self, text_dim: int, rank: int, output_dim: int, config: ModelConfig) -> None:
        super().__init__(config)
        self.width = -(-text_dim // PIECES)
        self.padding = self.width * PIECES - text_dim
        self.queries = nn.Parameter(torch.empty(QUERIES, self.width))
        self.place = nn.Parameter(torch.empty(PIECES, self.width))
        self.keys = nn.Linear(self.width, self.width)
        self.values = nn.Linear(self.width, self.width)
        self.output = nn.Linear(QUERIES * self.width, output_dim)
        xavier(self)
        nn.init.normal_(self.queries, std=self.width**-0.5)
        nn.init.normal_(self.place, std=0.02)

    def encode(self, text: Tensor, spectrum: Tensor) -> Tensor:
        pieces = functional.pad(text, (0, self.padding)).reshape(len(text), PIECES, self.width)
        pieces = pieces + self.place  # otherwise no query could tell one piece from another
        weights = torch.softmax(self.keys(pieces) @ self.queries.T / self.width**0.5, dim=1)  # (num_nodes, PIECES, QUERIES)
        answers = weights.transpose(1, 2) @ self.values(pieces)  # (num_nodes, QUERIES, width)
        z: Tensor = self.output(functional.leaky_relu(answers.flatten(1)))
        return z

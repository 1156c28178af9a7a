"""What every side encoder is: from a node's text (and its row of the spectrum) to z in the space of the backbone's output."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from components.cllmr.config import ModelConfig
from components.cllmr.objective import info_nce


class Encoded(NamedTuple):
    """One training pass of an encoder over a set of nodes."""

    z: Tensor
    """Side representation, (num_nodes, output_dim)."""
    loss: Tensor
    """The encoder's own loss, a scalar, mean per node: the negative ELBO (E8) of "sse"; zero where there is none."""


class SideEncoder(nn.Module):
    """Side representations of users and items, with one set of weights for both.

    Subclasses are built with (text_dim, rank, output_dim, config): the widths of the text embeddings, of the spectrum and of
    the backbone's output, which need not be `config.embedding_dim` (GCCF's is wider). A node without text has
    the row that the model learned for it (`CLLMR.none_token`), one without interactions a zero row of spectrum; zero rows
    of either give finite results.
    """

    mask_ratio: float = 0.0
    """Share of all nodes whose ID embedding the model replaces by `mask_token` in a training step, before it propagates."""
    mask_token: nn.Parameter
    """(1, embedding_dim); only where `mask_ratio` is positive."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.temperature = config.alignment_temperature

    def prepare(self, text: Tensor) -> None:
        """Called once, before training, with the text of all nodes, (num_nodes, text_dim); most have nothing to prepare."""

    @abstractmethod
    def encode(self, text: Tensor, spectrum: Tensor) -> Tensor:
        """z without noise, for evaluation and serving, (num_nodes, output_dim): a node's depends on its own rows alone.

        Args:
            text: text embeddings with unit rows, (num_nodes, text_dim).
            spectrum: (num_nodes, rank), scaled to mean row norm 1 (E3).
        """

    def forward(self, text: Tensor, spectrum: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Training pass over rows as in `encode`: without noise and without a loss of its own, unless a subclass has them.

        Args:
            generator: source of all noise, on the CPU, so that a step can be repeated.
        """
        return Encoded(self.encode(text, spectrum), text.new_zeros(()))

    def alignment(self, collaborative: Tensor, z: Tensor, text: Tensor) -> Tensor:
        """Loss that ties the backbone to the side information (E9), a scalar; row by row of the same nodes.

        Called with nodes of the batch, users and items apart; where `mask_ratio` is positive, with hidden nodes instead.

        Args:
            collaborative: the backbone's representations, (num_nodes, output_dim).
            z: as `forward` returns it, (num_nodes, output_dim).
            text: (num_nodes, text_dim).
        """
        return info_nce(collaborative, z, self.temperature)


def two_layers(input_dim: int, other_dim: int, output_dim: int) -> nn.Sequential:
    """RLMRec's perceptron: input_dim -> (input_dim + other_dim) / 2 -> LeakyReLU -> output_dim."""
    hidden = (input_dim + other_dim) // 2
    return nn.Sequential(nn.Linear(input_dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, output_dim))


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in all linear layers of `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

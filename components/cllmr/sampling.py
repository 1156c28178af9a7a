"""Mini-batches as a pure function of (seed, epoch, step, rank), so that a resumed run sees what the unbroken one would have."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.cllmr.graph import IntArray


class Batch(NamedTuple):
    """Interactions of one step and what they are ranked against."""

    users: Tensor
    """Rows of the users, (batch,) int64."""
    items: Tensor
    """Rows of the items they chose, (batch,) int64."""
    negatives: Tensor
    """Softmax: items shared by the batch, (num_negatives,). BPR: one item per pair, (batch,)."""
    is_positive: Tensor
    """Softmax: which shared negatives the user has chosen, (batch, num_negatives) bool. BPR: empty."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


class Sampler:
    """Draws batches from distinct training interactions.

    Args:
        users, items: rows of the interactions, (num_interactions,) each.
        num_items: how many items there are to draw negatives from.
        batch_size: interactions per step, over all ranks.
        num_negatives: shared negatives per step and rank; 0 draws one negative per interaction instead (BPR).
        seed: of everything drawn.
    """

    def __init__(
        self, users: IntArray, items: IntArray, num_items: int, batch_size: int, num_negatives: int, seed: int
    ) -> None:
        order = np.lexsort((items, users))
        self.users, self.items = users[order].astype(np.int64), items[order].astype(np.int64)
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.num_negatives = min(num_negatives, num_items)
        self._keys = self.users * num_items + self.items
        self._start = np.searchsorted(self.users, np.arange(self.users.max(initial=0) + 2))

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every interaction once."""
        return -(-len(self.users) // self.batch_size)

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The share of rank `rank` in step `step` of epoch `epoch`; shares of one step have equal sizes."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.users))
        chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
        share = -(-len(chosen) // world_size)
        chosen = np.resize(chosen, share * world_size)[rank * share : (rank + 1) * share]
        rng = np.random.default_rng([self.seed, epoch, step, rank])
        users, items = self.users[chosen], self.items[chosen]
        if self.num_negatives:
            negatives: IntArray = rng.choice(self.num_items, self.num_negatives, replace=False)
            is_positive = self._among(users, negatives)
        else:
            negatives = self._unseen(users, rng)
            is_positive = np.zeros((0, 0), dtype=bool)
        return Batch(*(torch.from_numpy(array) for array in (users, items, negatives, is_positive)))

    def _among(self, users: IntArray, negatives: IntArray) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        """Which of `negatives` (distinct) each user has interacted with."""
        slot = np.full(self.num_items, -1)
        slot[negatives] = np.arange(len(negatives))
        lengths = self._start[users + 1] - self._start[users]
        rows = np.repeat(np.arange(len(users)), lengths)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        slots = slot[self.items[np.repeat(self._start[users], lengths) + within]]
        mask = np.zeros((len(users), len(negatives)), dtype=bool)
        mask[rows[slots >= 0], slots[slots >= 0]] = True
        return mask

    def _unseen(self, users: IntArray, rng: np.random.Generator) -> IntArray:
        """One uniform item per user that the user has not interacted with.

        A user who has (almost) everything keeps the last draw: 100 rounds miss with probability density**100.
        """
        drawn: IntArray = rng.integers(self.num_items, size=len(users))
        for _ in range(100):
            keys = users * self.num_items + drawn
            found = self._keys[np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)] == keys
            if not found.any():
                break
            drawn[found] = rng.integers(self.num_items, size=int(found.sum()))
        return drawn

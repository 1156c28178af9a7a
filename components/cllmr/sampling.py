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
    false_negatives: Tensor
    """Softmax: (pair, negative) where the user has chosen the shared negative, (2, n) int64, pairs ascending. BPR: (2, 0)."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


class _Epoch(NamedTuple):
    """What is drawn once for a whole epoch."""

    place: tuple[int, int]
    """Epoch and rank."""
    order: IntArray
    """Permutation of the interactions."""
    negatives: IntArray
    """BPR: one item per interaction. Softmax: empty."""


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
        self._current: _Epoch | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every interaction once."""
        return -(-len(self.users) // self.batch_size)

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The share of rank `rank` in step `step` of epoch `epoch`; shares of one step have equal sizes."""
        drawn = self._epoch(epoch, rank)
        chosen = drawn.order[step * self.batch_size : (step + 1) * self.batch_size]
        share = -(-len(chosen) // world_size)
        chosen = np.resize(chosen, share * world_size)[rank * share : (rank + 1) * share]
        users, items = self.users[chosen], self.items[chosen]
        if self.num_negatives:
            rng = np.random.default_rng([self.seed, epoch, step, rank])
            negatives: IntArray = rng.choice(self.num_items, self.num_negatives, replace=False)
            false_negatives = self._among(users, negatives)
        else:
            negatives = drawn.negatives[chosen]
            false_negatives = np.zeros((2, 0), dtype=np.int64)
        return Batch(*(torch.from_numpy(array) for array in (users, items, negatives, false_negatives)))

    def _epoch(self, epoch: int, rank: int) -> _Epoch:
        """Kept for all steps of an epoch: drawn anew for each, the permutation alone would be a tenth of the training."""
        if self._current is None or self._current.place != (epoch, rank):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.users))
            rng = np.random.default_rng([self.seed, epoch, self.steps_per_epoch, rank])  # a place that no step has
            negatives = np.zeros(0, dtype=np.int64) if self.num_negatives else self._unseen(rng)
            self._current = _Epoch((epoch, rank), order, negatives)
        return self._current

    def _among(self, users: IntArray, negatives: IntArray) -> IntArray:
        """(pair, negative) for every one of `negatives` (distinct) that the pair's user has interacted with, (2, n)."""
        slot = np.full(self.num_items, -1)
        slot[negatives] = np.arange(len(negatives))
        lengths = self._start[users + 1] - self._start[users]
        rows = np.repeat(np.arange(len(users)), lengths)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        slots = slot[self.items[np.repeat(self._start[users], lengths) + within]]
        found = slots >= 0
        return np.stack([rows[found], slots[found]])

    def _unseen(self, rng: np.random.Generator) -> IntArray:
        """One uniform item per interaction that its user has not interacted with.

        For the whole epoch at once: users ascend, so the search stays in the cache, eight times faster than batch by batch.
        A user who has (almost) everything keeps the last draw: 100 rounds miss with probability density**100.
        """
        drawn: IntArray = rng.integers(self.num_items, size=len(self.users))
        doubtful = np.arange(len(drawn))
        for _ in range(100):
            keys = self.users[doubtful] * self.num_items + drawn[doubtful]
            seen = self._keys[np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)] == keys
            doubtful = doubtful[seen]
            if not len(doubtful):
                break
            drawn[doubtful] = rng.integers(self.num_items, size=len(doubtful))
        return drawn

"""Text similarity that looks for the nearest of a user's items instead of their average.

The cosine of a user's mean text and an item's is the mean of the cosines to the user's items: many half-similar items outweigh
one that fits. Raising the positive part of each cosine to a power before they are summed lets the near ones decide,

    s_ui = sum over the user's items j of max(0, cos(z_i, z_j))^power

which is a kernel density of the user's history. An item needs no interactions to have a score.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.linear.ease import centred_unit_rows
from components.cllmr.linear.scores import SMALLEST_DEVIATION, LinearScores, strongest

Floats = npt.NDArray[np.float32]

BLOCK_CELLS = 1 << 22  # similarities that are held at a time, 16 MiB


@dataclass(frozen=True)
class KernelScores:
    """A fitted model; nothing but its inputs is kept, kernel rows are made for a block of users at a time."""

    train: sp.csr_array
    """(num_users, num_items); values weigh the items of a history."""
    side: Floats
    """Side representations of the items, unit rows or zero, (num_items, dim): see `ease.centred_unit_rows`."""
    power: float
    """1 is the cosine to the user's mean (but for negative parts), large ones see the nearest item alone."""

    def linear(self, count: int, block_size: int = 1024) -> LinearScores:
        """The same model with the `count` nearest items of every item, as it is served."""
        rows = (self.side[at : at + block_size] for at in range(0, len(self.side), block_size))
        blocks = [strongest(self._kernel(some, self.side).T, count) for some in rows]
        return LinearScores.of_weights(self.train, sp.csr_array(sp.hstack(blocks)))

    def _kernel(self, rows: Floats, others: Floats) -> Floats:
        """(n, dim) and (m, dim) -> (n, m)."""
        kernel: Floats = np.maximum(rows @ others.T, 0.0) ** np.float32(self.power)
        return kernel

    def score(self, users: npt.NDArray[np.int64], items: npt.NDArray[np.int64] | None = None) -> Floats:
        """Rows of the users (n,) -> (n, num_items), or (n, len(items)) of these items alone."""
        side = self.side if items is None else self.side[items]
        history = self.train[users]
        chosen, column = np.unique(history.indices, return_inverse=True)
        narrow = sp.csr_array((history.data, column, history.indptr), shape=(len(users), len(chosen)))
        told = np.flatnonzero(side.any(axis=1))  # nothing is like an item without side information
        scores, histories = np.zeros((len(users), len(side)), dtype=np.float32), self.side[chosen]
        block = max(1, BLOCK_CELLS // max(1, len(chosen)))
        for start in range(0, len(told), block):
            some = told[start : start + block]
            scores[:, some] = narrow @ self._kernel(histories, side[some])
        return scores


class Placed(NamedTuple):
    """New items among those that a user was ranked: each of shape (num_new,)."""

    scores: npt.NDArray[np.float64]
    """Standard deviations above the mean item, as the member "text" has it before its weight."""
    ranks: npt.NDArray[np.int64]
    """1 where no item has a higher score."""


@dataclass(frozen=True)
class NewItems:
    """Scores of items that nobody has chosen yet, from their text alone, in the units of the items that there are."""

    side: Floats
    """Of the items that there are, as in `KernelScores`, (num_items, dim)."""
    mean: Floats
    """What all their texts share, (dim,): see `ease.centred_unit_rows`."""
    power: float

    @classmethod
    def of(cls, embeddings: npt.NDArray[np.floating], power: float) -> "NewItems":
        """Made of the text embeddings of the items that there are, rows of zeros where there is no text, (num_items, dim)."""
        told = np.linalg.norm(embeddings, axis=1) > 0
        mean = embeddings[told].mean(axis=0) if told.any() else np.zeros(embeddings.shape[1])
        return cls(centred_unit_rows(embeddings), np.asarray(mean, dtype=np.float32), power)

    def rows(self, embeddings: npt.NDArray[np.floating]) -> Floats:
        """New items' text embeddings to the rows that training would have made of them: (num_new, dim), of at least dim
        components; where training kept the leading ones of an embedding, so does this."""
        kept = np.asarray(embeddings, dtype=np.float32)[:, : len(self.mean)]
        return _unit(_unit(kept) - self.mean)

    def placed(self, rows: Floats, history: npt.NDArray[np.int64]) -> Placed | None:
        """Where new items stand for somebody whose history are these items; None where their texts say nothing about any item.

        Args:
            rows: of `rows`, (num_new, dim).
            history: item rows.
        """
        known, new = self._similarity(self.side, history), self._similarity(rows, history)
        deviation = known.std()
        if deviation <= SMALLEST_DEVIATION:
            return None
        return Placed((new - known.mean()) / deviation, 1 + (known[None] > new[:, None]).sum(axis=1))

    def of_history(self, history: npt.NDArray[np.int64]) -> Floats:
        """Scores of the items that there are for somebody whose history are these items, (num_items,)."""
        return self._similarity(self.side, history).astype(np.float32)

    def _similarity(self, rows: Floats, history: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """(n, dim) -> (n,)."""
        chosen, found = self.side[history].T, np.empty(len(rows))
        block = max(1, BLOCK_CELLS // max(1, len(history)))
        for start in range(0, len(rows), block):
            kernel = np.maximum(rows[start : start + block] @ chosen, 0.0) ** np.float32(self.power)
            found[start : start + block] = kernel.sum(axis=1, dtype=np.float64)
        return found

    def cosines(self, rows: Floats) -> Floats:
        """Of new items with those that there are, (num_new, num_items)."""
        return np.asarray(rows @ self.side.T, dtype=np.float32)


def _unit(rows: Floats) -> Floats:
    """Rows scaled to length 1, (n, dim)."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))

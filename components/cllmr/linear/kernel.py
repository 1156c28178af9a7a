"""Text similarity that looks for the nearest of a user's items instead of their average.

The cosine of a user's mean text and an item's is the mean of the cosines to the user's items: many half-similar items outweigh
one that fits. Raising the positive part of each cosine to a power before they are summed lets the near ones decide,

    s_ui = sum over the user's items j of max(0, cos(z_i, z_j))^power

which is a kernel density of the user's history. An item needs no interactions to have a score.

A share of the cosine may be that of the rare words which the texts begin with (`components.cllmr.linear.words`); a text without
words is as one that has none in common with any.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.linear.ease import centred_unit_rows
from components.cllmr.linear.scores import SMALLEST_DEVIATION, LinearScores, strongest
from components.cllmr.linear.words import ItemWords

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]

BLOCK_CELLS = 1 << 22  # similarities that are held at a time, 16 MiB


@dataclass(frozen=True)
class TextRows:
    """Texts that can be compared with each other."""

    side: Floats
    """Unit rows or zero, (n, dim)."""
    words: sp.csr_array | None = None
    """Unit rows or zero of the words, see `ItemWords`, (n, BUCKETS); None with a share of 0."""
    share: float = 0.0
    """Of the words in a similarity, 0 to 1."""

    def __len__(self) -> int:
        return len(self.side)

    def __getitem__(self, rows: Rows | slice) -> "TextRows":
        return TextRows(self.side[rows], None if self.words is None else self.words[rows], self.share)

    def kernel(self, others: "TextRows", power: float) -> Floats:
        """Similarities, (n,) and (m,) -> (n, m)."""
        similarity: Floats = self.side @ others.side.T
        if self.words is not None and others.words is not None:
            similarity *= np.float32(1 - self.share)
            similarity += np.float32(self.share) * (self.words @ others.words.T).toarray()
        kernel: Floats = np.maximum(similarity, 0.0) ** np.float32(power)
        return kernel


@dataclass(frozen=True)
class KernelScores:
    """A fitted model; nothing but its inputs is kept, kernel rows are made for a block of users at a time."""

    train: sp.csr_array
    """(num_users, num_items); values weigh the items of a history."""
    side: Floats
    """Side representations of the items, unit rows or zero, (num_items, dim): see `ease.centred_unit_rows`."""
    power: float
    """1 is the cosine to the user's mean (but for negative parts), large ones see the nearest item alone."""
    words: sp.csr_array | None = None
    """Of the items: see `TextRows`."""
    share: float = 0.0
    """Of the words."""

    def linear(self, count: int, block_size: int = 1024) -> LinearScores:
        """The same model with the `count` nearest items of every item, as it is served."""
        rows = (self._texts[at : at + block_size] for at in range(0, len(self.side), block_size))
        blocks = [strongest(some.kernel(self._texts, self.power).T, count) for some in rows]
        return LinearScores.of_weights(self.train, sp.csr_array(sp.hstack(blocks)))

    @property
    def _texts(self) -> TextRows:
        return TextRows(self.side, self.words, self.share)

    def score(self, users: npt.NDArray[np.int64], items: npt.NDArray[np.int64] | None = None) -> Floats:
        """Rows of the users (n,) -> (n, num_items), or (n, len(items)) of these items alone."""
        texts = self._texts if items is None else self._texts[items]
        history = self.train[users]
        chosen, column = np.unique(history.indices, return_inverse=True)
        narrow = sp.csr_array((history.data, column, history.indptr), shape=(len(users), len(chosen)))
        told = np.flatnonzero(texts.side.any(axis=1))  # nothing is like an item without side information
        scores, histories = np.zeros((len(users), len(texts)), dtype=np.float32), self._texts[chosen]
        block = max(1, BLOCK_CELLS // max(1, len(chosen)))
        for start in range(0, len(told), block):
            some = told[start : start + block]
            scores[:, some] = narrow @ histories.kernel(texts[some], self.power)
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
    words: ItemWords | None = None
    """None: the words that texts begin with do not count."""

    @classmethod
    def of(cls, embeddings: npt.NDArray[np.floating], power: float, words: ItemWords | None = None) -> "NewItems":
        """Made of the text embeddings of the items that there are, rows of zeros where there is no text, (num_items, dim)."""
        told = np.linalg.norm(embeddings, axis=1) > 0
        mean = embeddings[told].mean(axis=0) if told.any() else np.zeros(embeddings.shape[1])
        return cls(centred_unit_rows(embeddings), np.asarray(mean, dtype=np.float32), power, words)

    @property
    def known(self) -> TextRows:
        """The items that there are."""
        return TextRows(self.side) if self.words is None else TextRows(self.side, self.words.rows, self.words.share)

    def rows(self, embeddings: npt.NDArray[np.floating], texts: Sequence[str | None]) -> TextRows:
        """New items to the rows that training would have made of them, (num_new,).

        Args:
            embeddings: of their texts, (num_new, at least dim); where training kept the leading components of an embedding, so
                does this.
            texts: themselves.
        """
        kept = np.asarray(embeddings, dtype=np.float32)[:, : len(self.mean)]
        side = _unit(_unit(kept) - self.mean)
        return TextRows(side) if self.words is None else TextRows(side, self.words.of_new(texts), self.words.share)

    def placed(self, rows: TextRows, history: npt.NDArray[np.int64]) -> Placed | None:
        """Where new items stand for somebody whose history are these items; None where their texts say nothing about any item.

        Args:
            rows: of `rows`, (num_new,).
            history: item rows.
        """
        known, new = self._similarity(self.known, history), self._similarity(rows, history)
        deviation = known.std()
        if deviation <= SMALLEST_DEVIATION:
            return None
        return Placed((new - known.mean()) / deviation, 1 + (known[None] > new[:, None]).sum(axis=1))

    def of_history(self, history: npt.NDArray[np.int64]) -> Floats:
        """Scores of the items that there are for somebody whose history are these items, (num_items,)."""
        return self._similarity(self.known, history).astype(np.float32)

    def _similarity(self, rows: TextRows, history: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """(n,) -> (n,)."""
        chosen, found = self.known[history], np.empty(len(rows))
        block = max(1, BLOCK_CELLS // max(1, len(history)))
        for start in range(0, len(rows), block):
            kernel = rows[start : start + block].kernel(chosen, self.power)
            found[start : start + block] = kernel.sum(axis=1, dtype=np.float64)
        return found

    def cosines(self, rows: TextRows) -> Floats:
        """Of new items' meaning with that of those that there are, (num_new, num_items)."""
        return np.asarray(rows.side @ self.side.T, dtype=np.float32)


def _unit(rows: Floats) -> Floats:
    """Rows scaled to length 1, (n, dim)."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))

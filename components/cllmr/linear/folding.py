"""The user's side of an inner product from a history alone: for who was not there when the model was fitted.

A graph model or a factorisation knows its users by a row of numbers each. What that row would be for a history h is nearly
linear in the vectors of the history's items (of implicit ALS it is the solution of a linear system in them):

    a(h) = M mean_{i in h} w_i b_i          w_i = degree_i ^ -POWER

M is the ridge regression of the known users' rows on the means of their histories, one for each member, so that its size does
not depend on how many users or items there are. Popular items say less about a taste, hence w.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

POWER = 0.25
"""Of 0, .25 and .5 the best or level with it on three data sets (``tests/benchmarks/RESULTS.md``)."""
BLOCK_SIZE = 16_384  # users whose rows are held in double precision at a time


@dataclass(frozen=True)
class Folding:
    """A fitted map from histories to users' rows."""

    matrix: Floats
    """M, (d, d): row vectors are multiplied from the left."""
    item_weights: Floats
    """w, (num_items,)."""
    deviation: float
    """What scores of the known users' rows deviate by over the items, on average: the weight of what is folded in."""

    def user(self, items: npt.NDArray[np.floating]) -> Floats:
        """a(h) of the mean of weighted item vectors, (d,)."""
        return np.asarray(items @ self.matrix, dtype=np.float32)


def weights_of(degree: npt.NDArray[np.number]) -> Floats:
    """w of items with so many interactions, (num_items,)."""
    return np.asarray(np.maximum(degree, 1.0) ** -POWER, dtype=np.float32)


def fit_folding(users: Floats, items: Floats, histories: sp.csr_array, members: Sequence[slice], l2: float) -> Folding:
    """The map of one model.

    Args:
        users: a, (num_users, d).
        items: b, (num_items, d).
        histories: of these users, binary, (num_users, num_items); who has none teaches nothing.
        members: columns of each member, which are mapped apart; all others become 0.
        l2: λ > 0, in units of the mean square of what is regressed on.
    """
    item_weights = weights_of(np.asarray(histories.sum(axis=0)))
    known = np.flatnonzero(np.diff(histories.indptr))
    matrix = np.zeros((items.shape[1], items.shape[1]))
    for columns in members:
        vectors = item_weights[:, None] * items[:, columns]
        gram, right = np.zeros((2, vectors.shape[1], vectors.shape[1]))
        for start in range(0, len(known), BLOCK_SIZE):
            rows = known[start : start + BLOCK_SIZE]
            means = mean_vectors(histories[rows], vectors).astype(np.float64)
            gram += means.T @ means
            right += means.T @ users[rows, columns]
        ridge = l2 * max(np.trace(gram) / len(gram), np.finfo(np.float32).tiny)
        matrix[columns, columns] = np.linalg.solve(gram + ridge * np.eye(len(gram)), right)
    chosen = np.concatenate([np.arange(items.shape[1])[columns] for columns in members])
    covariance, deviation = np.atleast_2d(np.cov(items[:, chosen], rowvar=False, bias=True)), 0.0
    for start in range(0, len(known), BLOCK_SIZE):
        told = users[known[start : start + BLOCK_SIZE]][:, chosen].astype(np.float64)
        deviation += np.sqrt(np.maximum(((told @ covariance) * told).sum(axis=1), 0.0)).sum()
    return Folding(matrix.astype(np.float32), item_weights, float(deviation / max(len(known), 1)))


def mean_vectors(histories: sp.csr_array, vectors: npt.NDArray[np.floating]) -> Floats:
    """The mean of `vectors` over each history, rows of zeros where it is empty: (num_histories, d)."""
    length = np.maximum(np.diff(histories.indptr), 1)[:, None]
    return np.asarray((histories @ vectors) / length, dtype=np.float32)

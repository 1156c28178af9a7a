"""The user's side of an inner product from a history alone: for who was not there when the model was fitted.

A graph model or a factorisation knows its users by a row of numbers each. What that row would be for a history h is nearly
linear in the vectors of the history's items (of implicit ALS it is the solution of a linear system in them):

    a(h) = M mean_{i in h} b_i

M is the ridge regression of the known users' rows on the means of their histories, one for each member, so that its size does
not depend on how many users or items there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Floats = npt.NDArray[np.float32]

BLOCK_SIZE = 16_384  # users whose rows are held in double precision at a time


@dataclass(frozen=True)
class Folding:
    """A fitted map from histories to users' rows."""

    matrix: Floats
    """M, (d, d): row vectors are multiplied from the left."""
    deviation: float
    """What scores of the known users' rows deviate by over the items, on average: the weight of what is folded in."""

    def user(self, vectors: npt.NDArray[np.floating]) -> Floats:
        """a(h) of the vectors of a history's items, (n, d) -> (d,); zeros of none."""
        return np.asarray(vectors.sum(axis=0) / max(len(vectors), 1) @ self.matrix, dtype=np.float32)


class MemberColumns(NamedTuple):
    """Columns of one member, which is mapped by itself."""

    columns: slice
    l2: float
    """λ > 0, in units of the mean square of what is regressed on."""


def fit_folding(users: Floats, items: Floats, histories: sp.csr_array, members: Sequence[MemberColumns]) -> Folding:
    """The map of one model.

    Args:
        users: a, (num_users, d).
        items: b, (num_items, d).
        histories: of these users, binary, (num_users, num_items); who has none teaches nothing.
        members: all other columns become 0.
    """
    known = np.flatnonzero(np.diff(histories.indptr))
    blocks = [known[start : start + BLOCK_SIZE] for start in range(0, len(known), BLOCK_SIZE)]
    matrix = np.zeros((items.shape[1], items.shape[1]))
    for columns, l2 in members:
        gram, right = np.zeros((2, *matrix[columns, columns].shape))
        for rows in blocks:
            means = (histories[rows] @ items[:, columns] / np.diff(histories.indptr)[rows, None]).astype(np.float64)
            gram += means.T @ means
            right += means.T @ users[rows, columns]
        ridge = l2 * max(np.trace(gram) / len(gram), np.finfo(np.float32).tiny)
        matrix[columns, columns] = np.linalg.solve(gram + ridge * np.eye(len(gram)), right)
    told = np.concatenate([np.arange(items.shape[1])[columns] for columns, _ in members])
    covariance, deviation = np.atleast_2d(np.cov(items[:, told], rowvar=False, bias=True)), 0.0
    for rows in blocks:
        of_users = users[rows][:, told].astype(np.float64)
        deviation += np.sqrt(np.maximum(((of_users @ covariance) * of_users).sum(axis=1), 0.0)).sum()
    return Folding(matrix.astype(np.float32), float(deviation / max(len(known), 1)))

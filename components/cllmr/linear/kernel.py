"""Text similarity that looks for the nearest of a user's items instead of their average.

The cosine of a user's mean text and an item's is the mean of the cosines to the user's items: many half-similar items outweigh
one that fits. Raising the positive part of each cosine to a power before they are summed lets the near ones decide,

    s_ui = sum over the user's items j of max(0, cos(z_i, z_j))^power

which is a kernel density of the user's history. An item needs no interactions to have a score.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class KernelScores:
    """A fitted model; nothing but its inputs is kept, kernel rows are made for a block of users at a time."""

    train: sp.csr_array
    """(num_users, num_items), binary."""
    side: Floats
    """Side representations of the items, unit rows or zero, (num_items, dim): see `ease.centred_unit_rows`."""
    power: float
    """1 is the cosine to the user's mean (but for negative parts), large ones see the nearest item alone."""

    def score(self, users: npt.NDArray[np.int64]) -> Floats:
        """Rows of the users (n,) -> (n, num_items)."""
        history = self.train[users]
        chosen, column = np.unique(history.indices, return_inverse=True)
        narrow = sp.csr_array((history.data, column, history.indptr), shape=(len(users), len(chosen)))
        kernel = np.maximum(self.side[chosen] @ self.side.T, 0.0) ** np.float32(self.power)
        return np.asarray(narrow @ kernel, dtype=np.float32).reshape(len(users), len(self.side))

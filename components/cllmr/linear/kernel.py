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

from components.cllmr.linear.scores import LinearScores, strongest

Floats = npt.NDArray[np.float32]


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
        blocks = [
            strongest(self._kernel(self.side[at : at + block_size]).T, count) for at in range(0, len(self.side), block_size)
        ]
        return LinearScores.of_weights(self.train, sp.csr_array(sp.hstack(blocks)))

    def _kernel(self, rows: Floats) -> Floats:
        """(n, dim) -> (n, num_items)."""
        kernel: Floats = np.maximum(rows @ self.side.T, 0.0) ** np.float32(self.power)
        return kernel

    def score(self, users: npt.NDArray[np.int64]) -> Floats:
        """Rows of the users (n,) -> (n, num_items)."""
        history = self.train[users]
        chosen, column = np.unique(history.indices, return_inverse=True)
        narrow = sp.csr_array((history.data, column, history.indptr), shape=(len(users), len(chosen)))
        return np.asarray(narrow @ self._kernel(self.side[chosen]), dtype=np.float32).reshape(len(users), len(self.side))

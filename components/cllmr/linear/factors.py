"""Side information in matrix factorisation: item factors drawn towards what their side representation says they are.

Implicit ALS (Hu et al. 2008) solves for every item a ridge regression that shrinks its factor to 0. Here it shrinks to W z_i
instead, with W the ridge regression of the items' factors on their side representations z (as in collaborative topic
regression, Wang and Blei 2011): many interactions outweigh the side information, few do not, and an item without any is where
its side information puts it.
"""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Floats = npt.NDArray[np.float32]


def side_map(
    factors: npt.NDArray[np.floating], side: npt.NDArray[np.floating], degree: npt.NDArray[np.integer], l2: float
) -> Floats:
    """W of the ridge regression factors ~ side W, each item weighted by its interactions: (side_dim, dim).

    Args:
        factors: (num_items, dim).
        side: centred side representations, (num_items, side_dim).
        degree: training interactions of each item, (num_items,); an item without any teaches nothing.
        l2: > 0, in units of one interaction.
    """
    weighted = side * degree[:, None]
    solved = np.linalg.solve(weighted.T @ side + l2 * np.eye(side.shape[1]), weighted.T @ factors)
    return np.asarray(solved, dtype=np.float32)


def aligned_item_factors(
    train: sp.csr_array,
    user_factors: npt.NDArray[np.floating],
    prior: npt.NDArray[np.floating],
    alpha: float,
    regularization: float,
) -> Floats:
    """One item half-sweep of implicit ALS with prior means: (num_items, dim).

    Minimises for each item sum_u c_ui (r_ui - u . v)^2 + regularization |v - prior_i|^2 with confidence c = alpha times the
    interaction's weight where r = 1, and 1 elsewhere (the convention of the `implicit` library).

    Args:
        train: weights of the interactions, mostly 1, (num_users, num_items).
        user_factors: (num_users, dim).
        prior: (num_items, dim).
        alpha: confidence of an interaction.
        regularization: > 0.
    """
    by_item = train.T.tocsr()
    users = user_factors.astype(np.float64)
    dim = users.shape[1]
    everybody = users.T @ users + regularization * np.eye(dim)
    inverse = np.linalg.inv(everybody)
    factors = np.empty(prior.shape, dtype=np.float32)
    for item in range(len(factors)):
        of_item = slice(by_item.indptr[item], by_item.indptr[item + 1])
        chosen, confidence = users[by_item.indices[of_item]], alpha * by_item.data[of_item].astype(np.float64)
        right, more = confidence @ chosen + regularization * prior[item], confidence - 1
        if len(chosen) < dim:  # most items: a system as large as their users are many (Woodbury), not as the factors are
            spread = chosen @ inverse
            alone = inverse @ right
            small = np.eye(len(chosen)) + more[:, None] * (spread @ chosen.T)
            factors[item] = alone - np.linalg.solve(small, more * (chosen @ alone)) @ spread
        else:
            factors[item] = np.linalg.solve(everybody + (chosen.T * more) @ chosen, right)
    return factors

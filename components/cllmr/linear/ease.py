"""EASE with side information and degree normalisation: one Cholesky factorisation, no training loop.

Plain EASE (Steck 2019) is ridge regression of every item on all the others, B = I - P diag(P)^-1 with P = (XᵀX + λI)^-1, so
that diag(B) = 0 and the scores of a user are x_u B. Three things are added, each of which is off at its neutral value:

* **Side information** as more rows of X ("collective" EASE): G = XᵀX + a ZZᵀ with Z the items' side representations, centred,
  unit rows. An item nobody has chosen yet then still has neighbours. Z must not hold the interactions themselves (they are in
  XᵀX already, and would be counted twice): it comes from an encoder that reads text alone, with the spectrum in its prior.
* **Normalisation** of X to D_u^-u X D_i^-i: long histories and popular items weigh less in the regression.
* **Popularity** of the target by n_j^p: p = i undoes the normalisation of the target, p < i recommends less popular items.

λ and a are in units of the unnormalised problem: both are multiplied by trace(G_normalised) / trace(XᵀX), so that one setting
means the same amount of regularisation whatever the powers.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.linear.scores import LinearScores, strongest

Floats = npt.NDArray[np.float32]
_MIRRORED = 512  # rows


@dataclass(frozen=True)
class EaseSettings:
    """What is tuned on validation."""

    l2: float
    """λ > 0."""
    side_weight: float = 0.0
    """a >= 0; 0 leaves the side information out."""
    user_power: float = 0.0
    """u, 0 to 1."""
    item_power: float = 0.0
    """i, 0 to 1."""
    popularity_power: float = 0.0
    """p, 0 to 1."""


@dataclass(frozen=True)
class EaseScores:
    """A fitted model: s_uj = (x_u B)_j n_j^p."""

    train: sp.csr_array
    """Histories that are scored, (num_users, num_items)."""
    regression: Floats
    """B, zero diagonal, (num_items, num_items); shared by models that differ in p alone."""
    item_scale: Floats
    """n_j^p, (num_items,)."""

    @property
    def weights(self) -> Floats:
        """What a user's item adds to the score of another, (num_items, num_items)."""
        return self.regression * self.item_scale

    def linear(self, count: int) -> LinearScores:
        """The same model with the `count` strongest weights of every item, as it is served."""
        return LinearScores.of_weights(self.train, strongest(self.weights, count))

    def score(self, users: npt.NDArray[np.int64]) -> Floats:
        """Rows of the users (n,) -> (n, num_items)."""
        return np.asarray(self.train[users] @ self.regression, dtype=np.float32) * self.item_scale


class Ease:
    """All fits on one training matrix: Gram matrices are computed once and shared by the settings that are tried.

    Args:
        train: training interactions, (num_users, num_items), binary or with weights in [0, 1].
        side: side representations of the items, (num_items, dim), any length; None without side information. Rows of zeros
            are items without side information.
    """

    def __init__(self, train: sp.csr_array, side: npt.NDArray[np.floating] | None = None) -> None:
        self._train = train
        self._user_degree, self._item_degree = (np.maximum(train.sum(axis=axis, dtype=np.float64), 1.0) for axis in (1, 0))
        self._clicks = max(float((train.data.astype(np.float64) ** 2).sum()), 1.0)  # trace(XᵀX)
        self._side = None if side is None else centred_unit_rows(side)
        self._gram: tuple[float, Floats] | None = None
        self._regression: tuple[EaseSettings, Floats] | None = None

    def fit(self, settings: EaseSettings) -> "EaseScores":
        """The fitted model; settings that differ from the last ones in `popularity_power` alone cost nothing."""
        regression = replace(settings, popularity_power=0.0)
        if self._regression is None or self._regression[0] != regression:
            self._regression = None  # at 20,000 items a matrix has 1.6 GB
            weights = self._weights(regression, np.float32)
            if weights is None:  # λ is below the rounding of a float32 Gram matrix with large counts
                weights = self._weights(regression, np.float64)
            assert weights is not None, "XᵀX + λI is positive definite for λ > 0"
            self._regression = (regression, weights)
        scale = (self._item_degree**settings.popularity_power).astype(np.float32)
        return EaseScores(self._train, self._regression[1], scale)

    def _weights(self, settings: EaseSettings, precision: type[np.floating]) -> Floats | None:
        """B (num_items, num_items), None where the Gram matrix is not positive definite in that precision."""
        gram = self._user_weighted_gram(settings.user_power).astype(precision)
        scale_of_item = (self._item_degree**-settings.item_power).astype(precision)
        gram *= scale_of_item[:, None]
        gram *= scale_of_item[None, :]
        unit = precision(np.trace(gram, dtype=np.float64) / self._clicks)
        if settings.side_weight:
            assert self._side is not None, "a side weight needs side representations"
            weighted = np.sqrt(precision(settings.side_weight) * unit) * self._side
            gram += weighted @ weighted.T
        gram[np.diag_indices_from(gram)] += precision(settings.l2) * unit
        weights = _regression_weights(gram)
        if weights is None:
            return None
        weights *= scale_of_item[:, None]
        return weights.astype(np.float32, copy=False)

    def _user_weighted_gram(self, user_power: float) -> Floats:
        if self._gram is None or self._gram[0] != user_power:
            self._gram = None  # two of these at once may not fit
            weighted = sp.csr_array(sp.diags_array(self._user_degree**-user_power) @ self._train)
            self._gram = (user_power, (weighted.T @ weighted).toarray(order="C").astype(np.float32))
        return self._gram[1]


def centred_unit_rows(side: npt.NDArray[np.floating]) -> Floats:
    """Rows minus their mean (what all of them share says nothing), scaled to length 1; rows of zeros stay zero: (n, dim)."""
    told = np.linalg.norm(side, axis=1) > 0
    centred = np.zeros(side.shape, dtype=np.float32)
    if told.any():
        centred[told] = side[told] - side[told].mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    result: Floats = np.divide(centred, lengths, out=np.zeros_like(centred), where=lengths > 1e-12)
    return result


def _regression_weights(gram: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """B = I - P diag(P)^-1 of an (n, n) matrix, which is overwritten; None where it is not positive definite."""
    from scipy.linalg.lapack import get_lapack_funcs

    factorise, invert = get_lapack_funcs(("potrf", "potri"), (gram,))
    # the inverse from the Cholesky factor, in place; the matrix is symmetric, so Fortran's order of the transpose is the same
    factor, failed = factorise(gram.T, lower=True, overwrite_a=True)
    if failed:
        return None
    inverse, failed = invert(factor, lower=True, overwrite_c=True)
    assert not failed, "a Cholesky factor with a positive diagonal can be inverted"
    weights: npt.NDArray[Any] = inverse.T
    for start in range(0, len(weights), _MIRRORED):  # LAPACK fills one half; block by block, for whole copies are large
        rows = slice(start, start + _MIRRORED)
        weights[rows, rows] = np.triu(weights[rows, rows]) + np.triu(weights[rows, rows], 1).T
        weights[start + _MIRRORED :, rows] = weights[rows, start + _MIRRORED :].T
    weights /= -np.diag(weights).copy()
    np.fill_diagonal(weights, 0.0)
    return weights

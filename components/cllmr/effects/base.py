"""What every formulation returns, and what it is fitted from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.errors import ConfigError

FloatMatrix = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.float64]
EffectKind = Literal["tnie", "pnde", "none"]
EFFECT_KINDS: tuple[EffectKind, ...] = ("tnie", "pnde", "none")


class Factors(NamedTuple):
    """Scores as inner products."""

    users: FloatMatrix
    """a_u, (num_users, dim)."""
    items: FloatMatrix
    """b_i, (num_items, dim)."""


class Effects(NamedTuple):
    """Effects on pairs of a user and an item, (num_pairs,) each."""

    total: FloatMatrix
    direct: FloatMatrix
    indirect: FloatMatrix
    debiased: FloatMatrix


@dataclass(frozen=True)
class EffectFactors:
    """TE_ui = a_u . b_i and NDE_ui = c_u . d_i.

    Raises:
        ValueError: the shapes do not fit together.
    """

    users: FloatMatrix
    """a_u, (num_users, p)."""
    items: FloatMatrix
    """b_i, (num_items, p)."""
    direct_users: FloatMatrix
    """c_u, (num_users, r)."""
    direct_items: FloatMatrix
    """d_i, (num_items, r)."""

    def __post_init__(self) -> None:
        left, right = (self.users, self.direct_users), (self.items, self.direct_items)
        rows = len({len(x) for x in left}) == 1 and len({len(x) for x in right}) == 1
        if not rows or any(a.shape[1] != b.shape[1] for a, b in zip(left, right, strict=True)):
            shapes = [x.shape for x in (*left, *right)]
            raise ValueError(
                f"shapes of a, c, b, d are {shapes}: rows of a and c, of b and d, columns of a and b, of c and d agree"
            )

    def debiased(self, strength: float) -> Factors:
        """Factors of y = TE - λ NDE: [a_u, c_u] and [b_i, -λ d_i], p + r dimensions."""
        return Factors(
            np.hstack([self.users, self.direct_users]), np.hstack([self.items, np.float32(-strength) * self.direct_items])
        )

    def factors(self, kind: EffectKind, strength: float = 1.0) -> Factors:
        """What is served: "tnie" TE - λ NDE, "pnde" the direct effect alone, "none" the factual score.

        Raises:
            ConfigError: there is no such effect.
        """
        if kind == "tnie":
            return self.debiased(strength)
        if kind == "pnde":
            return Factors(self.direct_users, self.direct_items)
        if kind == "none":
            return Factors(self.users, self.items)
        raise ConfigError(f"effect is {kind!r}, allowed are {', '.join(EFFECT_KINDS)}", "set the effect to one of them")

    def effects(self, users: npt.NDArray[np.int64], items: npt.NDArray[np.int64], strength: float) -> Effects:
        """Effects of the pairs (users[n], items[n])."""
        total = np.einsum("nd,nd->n", self.users[users], self.items[items])
        direct = np.einsum("nd,nd->n", self.direct_users[users], self.direct_items[items])
        return Effects(total, direct, total - direct, total - np.float32(strength) * direct)


Refit = Callable[[sp.csr_array, FloatMatrix], Factors]
"""The same model, with the same settings and seed, fitted on another log and other texts: (log, text) -> factors.

The log holds weights in [0, 1], (num_users, num_items) float32; text is (num_items, text_dim), rows of zeros meaning none.
"""


@dataclass(frozen=True)
class Evidence:
    """What a formulation may learn from."""

    factual: Factors
    """The model as it is."""
    train: sp.csr_array
    """Binary training interactions, (num_users, num_items) float32."""
    text: FloatMatrix
    """Item text embeddings with unit rows, (num_items, text_dim)."""
    refit: Refit
    references: FloatMatrix | None = None
    """What would have been written of each item without evidence, less the mean of the texts, (num_items, text_dim); a row of
    zeros where nothing was. None where no language model writes."""


Effect = Callable[[Evidence], EffectFactors]


def reference(items: FloatMatrix) -> FloatMatrix:
    """b̄, the mean of all b_j, whose product with a_u is the reference state of a mediator a_u . b_i: (dim,)."""
    return items.mean(axis=0, dtype=np.float64).astype(np.float32)


def gated(items: FloatMatrix, gate: FloatMatrix, strength: float) -> FloatMatrix:
    """g_i (b_i - λ b̄), what g_u a_u is multiplied by for y = TE - λ NDE of gates (E13-E16); λ = 0 is the total effect.

    Args:
        items: b_i of the mediator, (num_items, dim).
        gate: g_i, (num_items,).
        strength: λ.
    """
    return gate[:, None] * (items - np.float32(strength) * reference(items))


def contrast(factual: Factors, counterfactual: Factors) -> EffectFactors:
    """The direct effect as the difference of two models: NDE = TE - Y(counterfactual), hence y(λ = 1) = Y(counterfactual)."""
    return EffectFactors(
        *factual,
        np.hstack([factual.users, counterfactual.users]),
        np.hstack([factual.items, -counterfactual.items]),
    )


def centred(text: npt.NDArray[np.floating], around: npt.NDArray[np.floating] | None = None) -> FloatArray:
    """Rows minus the mean of all, or of those of `around`; rows of zeros (no text) stay zero and do not count: (n, dim)."""
    told = np.linalg.norm(text, axis=1) > 0
    others = text[told] if around is None else around[np.linalg.norm(around, axis=1) > 0]
    result = np.zeros(text.shape, dtype=np.float64)
    if told.any():
        result[told] = text[told] - (others.mean(axis=0, dtype=np.float64) if len(others) else 0.0)
    return result


def ridge(text: FloatArray, strength: float) -> FloatArray:
    """The penalty λI of a ridge regression on `text` (n, text_dim)."""
    return strength * np.eye(text.shape[1])


def unit_rows(rows: npt.NDArray[np.floating]) -> FloatArray:
    """Rows scaled to length 1; rows of zeros stay zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 1e-12, lengths, 1.0), dtype=np.float64)


def ridge_map(text: FloatArray, target: npt.NDArray[np.floating], penalty: FloatArray) -> FloatArray:
    """Coefficients of the regression of centred `target` (n,) or (n, k) on `text`: (text_dim,) or (text_dim, k).

    Args:
        penalty: positive definite, (text_dim, text_dim); λI for a ridge.
    """
    return np.asarray(np.linalg.solve(text.T @ text + penalty, text.T @ (target - target.mean(axis=0))))


def cross_fitted(text: FloatArray, target: FloatArray, penalty: FloatArray, seed: int = 0, folds: int = 5) -> FloatArray:
    """Prediction of each item's `target` (n,) from its text by the regression on the items of the other folds."""
    fold = np.random.default_rng(seed).permutation(len(text)) % folds
    result = np.empty(len(target))
    for held_out in range(folds):
        fit = fold != held_out
        result[~fit] = text[~fit] @ ridge_map(text[fit], target[fit], penalty) + target[fit].mean()
    return result

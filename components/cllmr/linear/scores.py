"""The one form of score that is served: an inner product plus weights from a user's items to all others.

    s_ui = a_u . b_i + sum_j h_uj W_ji

Graph models, matrix factorisation and popularity are inner products (a, b), EASE and text similarity are weights between items
(h the user's history, W sparse). A weighted sum of such scores, each standardised per user, is again such a score: factors side
by side, histories side by side, W one above the other. So is the mixture of a factual and a counterfactual model. Numpy and
scipy only: training, evaluation and serving share it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.linear.compact import CompactItems
from components.cllmr.linear.folding import Folding

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

SMALLEST_DEVIATION = 1e-9
"""Scores of a user that vary less say nothing about items."""
FEWEST_TOGETHER, MANY_TOGETHER = 4, 64
BLOCK_SIZE = 4096
"""Of `products`: users from which on one product for all is faster than one each, and than blocks of items; and how many items
are a block; measured."""


@dataclass(frozen=True)
class LinearScores:
    """A fitted model, whatever it was."""

    users: Floats
    """a_u, (num_users, d); d = 0 where nothing is an inner product."""
    items: Floats | CompactItems
    """b_i, (num_items, d); compact in an endpoint that is short of memory."""
    history: sp.csr_array
    """h_u, (num_users, m); m = 0 where nothing is a weight between items."""
    weights: sp.csr_array
    """W, (m, num_items)."""
    folds: Floats | None = None
    """What an item of a history adds to a_u, (m, d): for who has no row here, or did more since. a_u has it already."""
    folding: Folding | None = None
    """Likewise of the members that are inner products: a_u of a whole history."""

    @classmethod
    def of_factors(cls, users: npt.NDArray[np.floating], items: npt.NDArray[np.floating]) -> "LinearScores":
        """a_u . b_i alone."""
        none = (sp.csr_array((len(users), 0), dtype=np.float32), sp.csr_array((0, len(items)), dtype=np.float32))
        return cls(np.asarray(users, dtype=np.float32), np.asarray(items, dtype=np.float32), *none)

    @classmethod
    def of_weights(cls, history: sp.csr_array, weights: sp.csr_array) -> "LinearScores":
        """h_u W alone."""
        num_users, num_items = history.shape[0], weights.shape[1]
        none = (np.empty((num_users, 0), dtype=np.float32), np.empty((num_items, 0), dtype=np.float32))
        return cls(*none, history, weights)

    def score(self, users: Rows) -> Floats:
        """Rows of the users (n,) -> (n, num_items)."""
        scores = products(self.users[users], self.items)
        if self.weights.nnz:
            scores += (self.history[users] @ self.weights).toarray()
        return scores

    def pairs(self, user: int, items: Rows) -> npt.NDArray[np.float64]:
        """Scores of one user with some items, in double precision: (len(items),)."""
        scores = self.items[items].astype(np.float64) @ self.users[user].astype(np.float64)
        if self.weights.nnz:
            history = self.history[[user]]
            rows = self.weights[history.indices]  # to choose columns first would look at every weight there is
            scores += (history.data.astype(np.float64) @ rows)[items]
        return np.asarray(scores)

    def folded(self, block_weights: Sequence[float], items: Rows) -> Floats:
        """Scores of somebody whose history is `items` and who has no row here: about what `joined` would give him, without the
        members that know users where there is no `folding`, (num_items,).

        Args:
            block_weights: weights of the members whose W lie one above the other, (num_items, num_items) each.
            items: history, item rows.
        """
        num_items = len(self.items)
        total = np.zeros(num_items, dtype=np.float32)
        for number, weight in enumerate(block_weights):
            total += np.float32(weight) * standardised(self._of_history(number * num_items + items)[None])[0]
        if self.folding is not None:
            user = self.folding.user(self.items[items])
            total += np.float32(self.folding.deviation) * standardised(products(user[None], self.items))[0]
        return total

    def added(self, user: int, items: Rows, seen: Rows) -> Floats:
        """What further `items` in the history of a user add to his scores, (num_items,); every block's scale stays.

        Args:
            user: row.
            items: that are new.
            seen: the history that his row is of.
        """
        num_items = len(self.items)
        history = self.history[[user]]
        total = np.zeros(num_items, dtype=np.float32)
        for start in range(0, history.shape[1], num_items):
            mine = (history.indices >= start) & (history.indices < start + num_items)
            if mine.any():
                total += history.data[mine].mean() * self._of_history(start + items)
        if self.folding is not None:
            moved = self.folding.user(self.items[np.concatenate((seen, items))]) - self.folding.user(self.items[seen])
            total += products(moved[None], self.items)[0]
        return total

    def _of_history(self, rows: Rows) -> Floats:
        """What these rows of W, and of `folds`, give every item, (num_items,)."""
        scores = np.asarray(self.weights[rows].sum(axis=0), dtype=np.float32)
        if self.folds is not None:
            scores += products(self.folds[rows].sum(axis=0)[None], self.items)[0]
        return scores


def products(users: Floats, items: Floats | CompactItems) -> Floats:
    """Inner products (n, num_items), block by block of the items.

    A matrix product of few rows and very many columns is what BLAS libraries do worst: two rows at once cost more than twice as
    much as one after the other. Blocks turned round, and transposed while they are in the cache, take the half of it; of many
    rows they take twice as long.
    """
    if len(users) >= MANY_TOGETHER and isinstance(items, np.ndarray):
        return np.asarray(users @ items.T, dtype=np.float32)
    scores = np.empty((len(users), len(items)), dtype=np.float32)
    if len(users) < FEWEST_TOGETHER and isinstance(items, np.ndarray):
        for row, user in enumerate(users):
            np.matmul(items, user, out=scores[row])
        return scores
    for start in range(0, len(items), BLOCK_SIZE):
        block = slice(start, start + BLOCK_SIZE)
        scores[:, block] = np.matmul(items[block], users.T).T
    return scores


def standardised(scores: npt.NDArray[np.floating]) -> Floats:
    """Every row with mean 0 and standard deviation 1 over the items; rows without variation become 0: (n, num_items)."""
    scores = np.asarray(scores, dtype=np.float32)
    deviation = scores.std(axis=1, keepdims=True)
    centred = scores - scores.mean(axis=1, keepdims=True)
    result: Floats = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > SMALLEST_DEVIATION)
    return result


def by_popularity(counts: npt.NDArray[np.number]) -> Floats:
    """Logarithms of the items' interactions, standardised: (num_items,)."""
    scores: Floats = standardised(np.log1p(counts)[None])[0]
    return scores


@dataclass(frozen=True)
class Standard:
    """What a score has on average over the items, per user."""

    mean: npt.NDArray[np.float64]
    """(num_users,)."""
    deviation: npt.NDArray[np.float64]
    """(num_users,)."""

    @classmethod
    def of(cls, scores: LinearScores, block_size: int = 512) -> "Standard":
        """Mean and standard deviation over all items of every user's scores."""
        mean, deviation = np.empty((2, len(scores.users)))
        factors = not scores.weights.nnz  # of those, the moments of the items tell them without a score
        if factors:
            items = _array(scores.items)
            centre, covariance = items.mean(axis=0, dtype=np.float64), np.atleast_2d(np.cov(items, rowvar=False, bias=True))
        for start in range(0, len(mean), block_size):  # the table of all users and items may not fit into memory
            rows = slice(start, min(start + block_size, len(mean)))
            if factors:
                users = scores.users[rows].astype(np.float64)
                mean[rows] = users @ centre
                deviation[rows] = np.sqrt(np.maximum(((users @ covariance) * users).sum(axis=1), 0.0))
                continue
            block = scores.score(np.arange(rows.start, rows.stop))
            mean[rows], deviation[rows] = block.mean(axis=1, dtype=np.float64), block.std(axis=1, dtype=np.float64)
        return cls(mean, deviation)


def joined(members: Sequence[LinearScores], weights: Sequence[float], standards: Sequence[Standard]) -> LinearScores:
    """sum_m weight_m (s_m - mean_m) / deviation_m; a user whose scores of a member do not vary gets nothing from it.

    Args:
        members: at least one; those of weight 0 are left out.
        weights: one per member.
        standards: of each member, or of the model it stands in for.
    """
    kept = [(one, weight, of) for one, weight, of in zip(members, weights, standards, strict=True) if weight]
    assert kept, "an ensemble has a member with a weight"
    scales = [
        np.divide(weight, of.deviation, out=np.zeros_like(of.deviation), where=of.deviation > SMALLEST_DEVIATION)
        for _, weight, of in kept
    ]
    offset = -sum(scale * of.mean for scale, (_, _, of) in zip(scales, kept, strict=True))
    num_items = len(kept[0][0].items)
    users = [one.users * scale[:, None] for scale, (one, _, _) in zip(scales, kept, strict=True)]
    history = [sp.diags_array(scale) @ one.history for scale, (one, _, _) in zip(scales, kept, strict=True)]
    return LinearScores(
        np.hstack([*users, np.asarray(offset)[:, None]]).astype(np.float32),
        np.hstack([*(_array(one.items) for one, _, _ in kept), np.ones((num_items, 1), dtype=np.float32)]),
        sp.csr_array(sp.hstack(history), dtype=np.float32),
        sp.csr_array(sp.vstack([one.weights for one, _, _ in kept]), dtype=np.float32),
    )


def mixed(factual: LinearScores, counterfactual: LinearScores, strength: float) -> LinearScores:
    """(1 - λ) factual + λ counterfactual; where the two share the users' side (the same object), it is not doubled.

    Of known users: what is folded in is folded into the two models apart.
    """
    if strength in (0.0, 1.0):  # one of the two alone: half the work
        return counterfactual if strength else factual
    shares = np.float32(1 - strength), np.float32(strength)
    parts = (factual, counterfactual)
    if factual.users is counterfactual.users:
        users, items = factual.users, sum(share * _array(part.items) for share, part in zip(shares, parts, strict=True))
    else:
        users = np.hstack([share * part.users for share, part in zip(shares, parts, strict=True)])
        items = np.hstack([_array(part.items) for part in parts])
    if factual.history is counterfactual.history:
        history = factual.history
        weights = sum(share * part.weights for share, part in zip(shares, parts, strict=True))
    else:
        history = sp.hstack([share * part.history for share, part in zip(shares, parts, strict=True)])
        weights = sp.vstack([part.weights for part in parts])
    return LinearScores(users, np.asarray(items), sp.csr_array(history), sp.csr_array(weights))


def mixtures(factual: LinearScores, counterfactual: LinearScores, strengths: Sequence[float], users: Rows) -> Iterator[Floats]:
    """Scores of `mixed` for some users at each strength, each model asked once for all of them: (n, num_items) each."""
    ours = factual.score(users)
    theirs = ours if counterfactual is factual else counterfactual.score(users)
    for strength in strengths:
        yield np.float32(1 - strength) * ours + np.float32(strength) * theirs


def _array(items: Floats | CompactItems) -> Floats:
    assert isinstance(items, np.ndarray), "compact items are scored, not computed with"
    return items


def strongest(weights: npt.NDArray[np.floating], count: int) -> sp.csr_array:
    """For every target item (column) its `count` largest weights by absolute value, more where some are equal: (m, num_items).

    What is left out is small: a matrix of 20,000 items has 1.6 GB in full, and 0.2 GB with 1,000 weights an item.
    """
    if count >= len(weights):
        return sp.csr_array(weights, dtype=np.float32)
    kept: list[Any] = []
    for start in range(0, weights.shape[1], 1024):  # a copy of the whole matrix would be as large as itself
        block = weights[:, start : start + 1024]
        size = np.abs(block)
        threshold = np.partition(size, len(size) - count, axis=0)[len(size) - count]
        kept.append(sp.csr_array(np.where(size >= threshold, block, 0.0), dtype=np.float32))
    return sp.csr_array(sp.hstack(kept))


def as_tensors(scores: LinearScores, name: str) -> dict[str, npt.NDArray[Any]]:
    """Plain arrays for a file: ``<name>.users``, ``<name>.history.indptr`` and so on; see `from_tensors`."""
    tensors: dict[str, npt.NDArray[Any]] = {
        f"{name}.users": np.ascontiguousarray(scores.users),
        f"{name}.items": np.ascontiguousarray(_array(scores.items)),
    }
    for part, matrix in (("history", scores.history), ("weights", scores.weights)):
        tensors[f"{name}.{part}.data"] = matrix.data.astype(np.float32)
        tensors[f"{name}.{part}.indices"] = matrix.indices.astype(np.int32)
        tensors[f"{name}.{part}.indptr"] = matrix.indptr.astype(np.int64)
    if scores.folds is not None:
        tensors[f"{name}.folds"] = np.ascontiguousarray(scores.folds, dtype=np.float32)
    if (folding := scores.folding) is not None:
        deviation = np.array([folding.deviation], dtype=np.float32)
        tensors |= {f"{name}.folding.matrix": folding.matrix, f"{name}.folding.deviation": deviation}
    return tensors


def from_tensors(tensors: Mapping[str, Any], name: str) -> LinearScores:
    """The inverse of `as_tensors`; items may be compact.

    Raises:
        ValueError: a tensor is missing, of another type, not finite, or does not fit the others.
    """
    users, items = (_tensor(tensors, f"{name}.{part}", 2, np.float32) for part in ("users", "items"))
    if users.shape[1] != items.shape[1]:
        raise ValueError(f"{name}.users and {name}.items have shapes {users.shape} and {items.shape}")
    rows = len(_tensor(tensors, f"{name}.weights.indptr", 1, np.int64)) - 1
    history = _csr(tensors, f"{name}.history", (len(users), rows))
    folds = _tensor(tensors, f"{name}.folds", 2, np.float32) if f"{name}.folds" in tensors else None
    if folds is not None and folds.shape != (rows, users.shape[1]):
        raise ValueError(f"{name}.folds has shape {folds.shape}, not {(rows, users.shape[1])}")
    weights, folding = (
        _csr(tensors, f"{name}.weights", (rows, len(items))),
        _folding(tensors, f"{name}.folding", items.shape[1]),
    )
    return LinearScores(users, items, history, weights, folds, folding)


def _folding(tensors: Mapping[str, Any], name: str, dim: int) -> Folding | None:
    if f"{name}.matrix" not in tensors:
        return None
    matrix = _tensor(tensors, f"{name}.matrix", 2, np.float32)
    deviation = _tensor(tensors, f"{name}.deviation", 1, np.float32)
    if (found := (matrix.shape, deviation.shape)) != (wanted := ((dim, dim), (1,))):
        raise ValueError(f"{name} has shapes {found}, not {wanted}")
    return Folding(matrix, float(deviation[0]))


def _csr(tensors: Mapping[str, Any], name: str, shape: tuple[int, int]) -> sp.csr_array:
    data = _tensor(tensors, f"{name}.data", 1, np.float32)
    indices = _tensor(tensors, f"{name}.indices", 1, np.int32)
    indptr = _tensor(tensors, f"{name}.indptr", 1, np.int64)
    ordered = len(indptr) == shape[0] + 1 and indptr[0] == 0 and indptr[-1] == len(indices) and (np.diff(indptr) >= 0).all()
    if not ordered or len(data) != len(indices) or (indices.size and (indices.min() < 0 or indices.max() >= shape[1])):
        raise ValueError(f"{name} is no sparse matrix of shape {shape}")
    return sp.csr_array((data, indices, indptr), shape=shape)


def _tensor(tensors: Mapping[str, Any], name: str, ndim: int, dtype: type) -> Any:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    tensor = tensors[name]
    if tensor.ndim != ndim or tensor.dtype != dtype:
        raise ValueError(f"{name} has shape {tensor.shape} and type {tensor.dtype}, expected {ndim} axes of {np.dtype(dtype)}")
    if isinstance(tensor, CompactItems):
        return tensor  # its numbers were looked at when they were read
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        raise ValueError(f"{name} has {int((~np.isfinite(tensor)).sum())} values that are not finite")
    return tensor

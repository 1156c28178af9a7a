"""Scores for somebody who has done nothing yet, from his own text: the user that the text lets expect.

Scores are linear in the user's side of a model, a_u and h_u (`components.cllmr.linear.scores`), so a ridge regression of that
side on the texts of known users is the ridge regression of all scores at once:

    (a, h) = mean(a, h) + (t - mean t) B        B = (TᵀT + λ I)^-1 Tᵀ (A, H), T and (A, H) centred

Of a the map itself is kept, which is small for any number of items; of h, what the weights between items make of it: the h of a
text has no zeros, and its product with the weights would be paid by every answer.

The same for the factual and the counterfactual model, so that the answer can be debiased like any other. A strong λ leaves the
mean user. What the mean user likes is no best guess for a newcomer where members of a model take popularity out, so popularity
joins with a weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from components.cllmr.linear.scores import Floats, LinearScores, Rows, products, standardised

FOLDS = 5
BLOCK_SIZE = 4096  # users whose texts are held in double precision at a time


@dataclass(frozen=True)
class Side:
    """The user's side of one model as a function of a text; the first row is what a text without a word of its own gives."""

    users: Floats
    """Of a, (1 + dim, d)."""
    by_history: Floats
    """Of h W, (1 + dim, num_items); (1 + dim, 0) of a model without weights between items."""

    def score(self, texts: Floats, model: LinearScores) -> Floats:
        """Centred texts (n, dim) -> scores in that model, (n, num_items)."""
        given = np.hstack([np.ones((len(texts), 1), np.float32), texts])
        scores = products(given @ self.users, model.items)
        if self.by_history.shape[1]:
            scores += given @ self.by_history
        return scores


@dataclass(frozen=True)
class Newcomers:
    """Answers a text; fitted by `Fits`, chosen by `components.train.newcomers`.

    `sides` are of the models, "factual" and "counterfactual", one and the same object where the models share them.
    """

    mean: Floats
    """Of the texts of known users, (dim,)."""
    sides: Mapping[str, Side]
    popularity_weight: float
    """Of popularity, beside the standardised scores of the model."""

    def score(self, texts: Floats, name: str, model: LinearScores, popularity: Floats) -> Floats:
        """Embeddings of texts (n, dim) -> scores in the model of that name, (n, num_items).

        Args:
            texts: of newcomers, as the encoder gives them.
            name: which model.
            model: the model itself.
            popularity: as that model scores it, before its weight, standardised, (num_items,).
        """
        by_text = standardised(self.sides[name].score(texts - self.mean, model))
        return by_text + np.float32(self.popularity_weight) * popularity

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Plain arrays for a file; see `of_tensors`."""
        found: dict[str, npt.NDArray[Any]] = {
            "mean": self.mean,
            "popularity_weight": np.array([self.popularity_weight], np.float32),
        }
        for name, side in self.sides.items():
            if name == "factual" or side is not self.sides["factual"]:
                found |= {f"{name}.users": side.users, f"{name}.by_history": side.by_history}
        return found

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Any], models: Mapping[str, LinearScores]) -> Self:
        """The inverse of `tensors`.

        Raises:
            ValueError: a tensor is missing, of another type, not finite, or does not fit the models.
        """
        mean, weight = _checked(tensors, "mean", (None,)), _checked(tensors, "popularity_weight", (1,))
        sides: dict[str, Side] = {}
        for name, model in models.items():
            if name != "factual" and f"{name}.users" not in tensors:
                sides[name] = sides["factual"]
                continue
            rows = 1 + len(mean)
            users = _checked(tensors, f"{name}.users", (rows, model.items.shape[1]))
            width = model.weights.shape[1] if model.weights.nnz else 0
            sides[name] = Side(users, _checked(tensors, f"{name}.by_history", (rows, width)))
        return cls(mean, sides, float(weight[0]))


class Fits:
    """All fits on the texts of some users: what does not depend on λ is computed once.

    Args:
        texts: embeddings, (num_users, dim).
        users: rows that are fitted on, each with a text.
        models: fitted, of all users; "factual" first.
    """

    def __init__(self, texts: Floats, users: Rows, models: Mapping[str, LinearScores]) -> None:
        # the first column takes the mean user; the texts are centred, so what is regressed on them need not be
        columns = np.hstack([np.full((len(users), 1), 1 / len(users), np.float32), texts[users]])  # (num_fitted, 1 + dim)
        centred = columns[:, 1:]
        self.mean: Floats = centred.mean(axis=0)
        centred -= self.mean
        blocks = [centred[start : start + BLOCK_SIZE] for start in range(0, len(users), BLOCK_SIZE)]
        self._values, self._vectors = np.linalg.eigh(sum(some.T.astype(np.float64) @ some for some in blocks))
        for some in blocks:  # in place: with a text for everybody, each copy is a GB for a million users
            some[:] = some @ self._vectors
        factual, self._along = models["factual"], dict[str, Side]()
        for name, model in models.items():
            parts = ("users", "history", "weights")
            shared = name != "factual" and all(getattr(model, part) is getattr(factual, part) for part in parts)
            self._along[name] = self._along["factual"] if shared else _along(columns, model, users)

    def fit(self, l2: float, popularity_weight: float) -> Newcomers:
        """The map for these models.

        Args:
            l2: λ > 0.
            popularity_weight: see `Newcomers`.
        """
        shrunk = (self._vectors / (np.maximum(self._values, 0.0) + l2)).astype(np.float32)

        def shrink(along: Floats) -> Floats:
            return np.vstack([along[:1], shrunk @ along[1:]])

        sides: dict[str, Side] = {}
        for name, side in self._along.items():
            shared = name != "factual" and side is self._along["factual"]
            sides[name] = sides["factual"] if shared else Side(shrink(side.users), shrink(side.by_history))
        return Newcomers(self.mean, sides, popularity_weight)


def _along(columns: Floats, model: LinearScores, users: Rows) -> Side:
    """The side of a model along each direction of the texts, (num_fitted, 1 + dim), of the users."""
    by_history = np.empty((columns.shape[1], 0), np.float32)
    if model.weights.nnz:
        by_history = np.asarray((model.history[users].T @ columns).T @ model.weights, dtype=np.float32)
    return Side(columns.T @ model.users[users], by_history)


@dataclass(frozen=True)
class CrossFitted:
    """Users as if they were new: each is answered by what was fitted without him, by popularity where he has no text."""

    texts: Floats
    """(num_users, dim)."""
    fold: Rows
    """Of each user, (num_users,)."""
    fits: Sequence[Newcomers]
    """Of each fold, fitted on the others."""
    model: LinearScores
    """The factual or the counterfactual one."""
    popularity: Floats
    """As that model scores it, see `Newcomers.score`."""

    def score(self, users: Rows) -> Floats:
        """Rows of the users (n,) -> (n, num_items)."""
        scores = np.repeat(self.popularity[None], len(users), axis=0)
        told = self.texts[users].any(axis=1)
        for number, newcomers in enumerate(self.fits):
            mine = told & (self.fold[users] == number)
            if mine.any():
                scores[mine] = newcomers.score(self.texts[users[mine]], "factual", self.model, self.popularity)
        return scores


class CrossFits:
    """Fits without each of `FOLDS` parts of the users who have a text, drawn by `seed`.

    Args:
        texts: embeddings, (num_users, dim), rows of zeros where there is none.
        seed: of the parts.
        model: the factual or the counterfactual one.
    """

    def __init__(self, texts: Floats, seed: int, model: LinearScores) -> None:
        self._texts, self._model = texts, model
        self.users: Rows = np.flatnonzero(texts.any(axis=1))
        self._fold = np.random.default_rng(seed).integers(FOLDS, size=len(texts))
        parts = (self.users[self._fold[self.users] != number] for number in range(FOLDS))
        self._fits = [Fits(texts, part, {"factual": model}) for part in parts]

    def fit(self, popularity: Floats, l2: float, popularity_weight: float) -> CrossFitted:
        """See `Fits` and `CrossFitted`."""
        fits = [fits.fit(l2, popularity_weight) for fits in self._fits]
        return CrossFitted(self._texts, self._fold, fits, self._model, popularity)


def _checked(tensors: Mapping[str, Any], name: str, shape: tuple[int | None, ...]) -> Floats:
    tensor: Floats | None = tensors.get(name)
    if tensor is None:
        raise ValueError(f"{name} is missing")
    fits = tensor.ndim == len(shape) and all(size in (None, length) for size, length in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != np.float32 or not np.isfinite(tensor).all():
        raise ValueError(f"{name} has shape {tensor.shape} and type {tensor.dtype}, expected {shape} finite numbers of float32")
    return tensor

"""Scores for somebody who has done nothing yet, from his own text: the user that the text lets expect.

Scores are linear in the user's side of a model, a_u and h_u (`components.cllmr.linear.scores`), so a ridge regression of that
side on the texts of known users is the ridge regression of all scores at once, and is kept as small as the user's side is:

    (a, h) = mean(a, h) + (t - mean t) B        B = (TᵀT + λ I)^-1 Tᵀ (A, H), T and (A, H) centred

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


@dataclass(frozen=True)
class Side:
    """The user's side of one model as a function of a text; the first row is what a text without a word of its own gives."""

    users: Floats
    """Of a, (1 + dim, d)."""
    history: Floats
    """Of h, (1 + dim, m)."""

    def score(self, texts: Floats, model: LinearScores) -> Floats:
        """Centred texts (n, dim) -> scores in that model, (n, num_items)."""
        given = np.hstack([np.ones((len(texts), 1), np.float32), texts])
        scores = products(given @ self.users, model.items)
        if model.weights.nnz:
            scores += np.asarray((given @ self.history) @ model.weights, dtype=np.float32)
        return scores


@dataclass(frozen=True)
class Newcomers:
    """Answers a text; fitted by `Fits`, chosen by `components.train.newcomers`.

    `sides` are of the models, "factual" and "counterfactual", one and the same object where the models share the user's side.
    """

    mean: Floats
    """Of the texts of known users, (dim,)."""
    sides: Mapping[str, Side]
    popularity_weight: float
    """Of popularity, beside the standardised scores of the model."""

    def score(self, texts: Floats, name: str, model: LinearScores, popularity: Rows) -> Floats:
        """Embeddings of texts (n, dim) -> scores in the model of that name, (n, num_items).

        Args:
            texts: of newcomers, as the encoder gives them.
            name: which model.
            model: the model itself.
            popularity: training interactions of the items, (num_items,).
        """
        by_text = standardised(self.sides[name].score(texts - self.mean, model))
        return by_text + np.float32(self.popularity_weight) * standardised(np.log1p(popularity)[None])

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Plain arrays for a file; see `of_tensors`."""
        found: dict[str, npt.NDArray[Any]] = {
            "mean": self.mean,
            "popularity_weight": np.array([self.popularity_weight], np.float32),
        }
        for name, side in self.sides.items():
            if name == "factual" or side is not self.sides["factual"]:
                found |= {f"{name}.users": side.users, f"{name}.history": side.history}
        return found

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Any], models: Mapping[str, LinearScores]) -> Self:
        """The inverse of `tensors`.

        Raises:
            ValueError: a tensor is missing, of another type, not finite, or does not fit the models.
        """
        mean, weight = (_checked(tensors, name, (None,)) for name in ("mean", "popularity_weight"))
        sides: dict[str, Side] = {}
        for name, model in models.items():
            if name != "factual" and f"{name}.users" not in tensors:
                sides[name] = sides["factual"]
                continue
            rows = 1 + len(mean)
            users = _checked(tensors, f"{name}.users", (rows, model.items.shape[1]))
            sides[name] = Side(users, _checked(tensors, f"{name}.history", (rows, model.weights.shape[0])))
        return cls(mean, sides, float(weight[0]))


class Fits:
    """All fits on the texts of some users: what is decomposed is decomposed once for all λ.

    Args:
        texts: embeddings, (num_users, dim).
        users: rows that are fitted on, each with a text.
    """

    def __init__(self, texts: Floats, users: Rows) -> None:
        self._users = users
        self.mean: Floats = texts[users].mean(axis=0)
        self._centred: Floats = texts[users] - self.mean
        self._values, self._vectors = np.linalg.eigh(self._centred.T.astype(np.float64) @ self._centred)

    def fit(self, models: Mapping[str, LinearScores], l2: float, popularity_weight: float) -> Newcomers:
        """The map for some models, "factual" first.

        Args:
            models: fitted, of all users.
            l2: λ > 0.
            popularity_weight: see `Newcomers`.
        """
        inverse = (self._vectors / (np.maximum(self._values, 0.0) + l2)) @ self._vectors.T
        regression = (inverse @ self._centred.T).astype(np.float32)  # (dim, num_fitted)
        factual, sides = models["factual"], dict[str, Side]()
        for name, model in models.items():
            shared = model is not factual and model.users is factual.users and model.history is factual.history
            sides[name] = sides["factual"] if shared else self._side(regression, model)
        return Newcomers(self.mean, sides, popularity_weight)

    def _side(self, regression: Floats, model: LinearScores) -> Side:
        """The texts are centred, so what is regressed on them need not be."""
        users, history = model.users[self._users], model.history[self._users]
        means = users.mean(axis=0, dtype=np.float64), np.asarray(history.mean(axis=0))
        parts = (np.vstack([mean[None], regression @ side]) for mean, side in zip(means, (users, history), strict=True))
        return Side(*(np.asarray(part, dtype=np.float32) for part in parts))


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
    """The factual one."""
    popularity: Rows

    def score(self, users: Rows) -> Floats:
        """Rows of the users (n,) -> (n, num_items)."""
        scores = np.repeat(standardised(np.log1p(self.popularity)[None]), len(users), axis=0)
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
    """

    def __init__(self, texts: Floats, seed: int) -> None:
        self._texts = texts
        self.users: Rows = np.flatnonzero(texts.any(axis=1))
        self._fold = np.random.default_rng(seed).integers(FOLDS, size=len(texts))
        self._fits = [Fits(texts, self.users[self._fold[self.users] != number]) for number in range(FOLDS)]

    def fit(self, model: LinearScores, popularity: Rows, l2: float, popularity_weight: float) -> CrossFitted:
        """See `Fits`."""
        fits = [fits.fit({"factual": model}, l2, popularity_weight) for fits in self._fits]
        return CrossFitted(self._texts, self._fold, fits, model, popularity)


def _checked(tensors: Mapping[str, Any], name: str, shape: tuple[int | None, ...]) -> Floats:
    tensor: Floats | None = tensors.get(name)
    if tensor is None:
        raise ValueError(f"{name} is missing")
    fits = tensor.ndim == len(shape) and all(size in (None, length) for size, length in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != np.float32 or not np.isfinite(tensor).all():
        raise ValueError(f"{name} has shape {tensor.shape} and type {tensor.dtype}, expected {shape} finite numbers of float32")
    return tensor

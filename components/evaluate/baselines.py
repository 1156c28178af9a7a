"""Strong, simple rivals on the same split: each is tuned on validation over a small grid and tested once.

A baseline is fitted on the training interactions alone, like the model it is compared with, and gives dense scores of all
items for a block of users. What a fit needs beside the interactions (text, the backbone's settings) comes in `Inputs`.
"""

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from pydantic import Field, PositiveFloat, PositiveInt

from components.cllmr.linear.ease import Ease, EaseSettings, centred_unit_rows
from components.cllmr.linear.ensemble import Scores, by_lot
from components.evaluate.config import LABELS, BaselineName, EvaluateConfig
from components.evaluate.metrics import MOST_CHOOSING, PRIMARY, IntArray, Ranking, rank

FloatMatrix = npt.NDArray[np.float32]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What baselines may learn from."""

    train: sp.csr_array
    """Training interactions, (num_users, num_items) float32, binary."""
    validation: sp.csr_array
    """Held-out interactions to tune on, same shape."""
    user_text: FloatMatrix
    """Text embeddings of the users with unit rows, or zero where there is no text, (num_users, dim)."""
    item_text: FloatMatrix
    """Text embeddings of the items with unit rows, or zero where there is no text, (num_items, dim)."""
    train_config: Mapping[str, Any]
    """Settings of the train stage: the bare backbone is trained with the same ones."""


@dataclass(frozen=True)
class Tuned:
    """The best setting of one baseline on validation."""

    baseline: Scores
    settings: Settings
    validation: Ranking
    """Of all users, also where some of very many chose the setting."""
    grid: list[dict[str, Any]]
    """Every setting tried with its validation NDCG@10, in the order tried."""


@dataclass(frozen=True)
class FixedScores:
    """One score per item, the same for every user: popularity."""

    item_scores: FloatMatrix

    def score(self, users: IntArray) -> FloatMatrix:
        return np.broadcast_to(self.item_scores, (len(users), len(self.item_scores))).copy()


@dataclass(frozen=True)
class RandomScores:
    """Uniform scores that depend on (seed, user) only, not on which users are scored together."""

    seed: int
    num_items: int

    def score(self, users: IntArray) -> FloatMatrix:
        rows = [np.random.default_rng([self.seed, int(user)]).random(self.num_items, dtype=np.float32) for user in users]
        return np.stack(rows)


@dataclass(frozen=True)
class Factors:
    """Scores as inner products."""

    users: FloatMatrix
    items: FloatMatrix

    def score(self, users: IntArray) -> FloatMatrix:
        return np.asarray(self.users[users] @ self.items.T, dtype=np.float32)


@dataclass(frozen=True)
class ItemToItem:
    """A user's score of an item is the sum of its weights from the user's training items: x_u @ W."""

    train: sp.csr_array
    weights: FloatMatrix | sp.csr_array

    def score(self, users: IntArray) -> FloatMatrix:
        scores = self.train[users] @ self.weights
        return np.asarray(scores.toarray() if sp.issparse(scores) else scores, dtype=np.float32)


def popularity(inputs: Inputs) -> Scores:
    """Items by their number of training interactions."""
    return FixedScores(np.asarray(inputs.train.sum(axis=0), dtype=np.float32).ravel())


def text_cosine(inputs: Inputs, centred: bool) -> Scores:
    """Cosine of the user's text and the item's text.

    Args:
        centred: subtract the mean of the users' (items') embeddings first, which takes out what all texts share.
    """
    users, items = inputs.user_text, inputs.item_text
    if centred:
        users, items = centred_unit_rows(users), centred_unit_rows(items)
    return Factors(users, items)


def bm25_knn(inputs: Inputs, neighbours: PositiveInt, b: Annotated[float, Field(ge=0, le=1)]) -> Scores:
    """Item-kNN on BM25-weighted interactions (implicit's, K1 = 1.2)."""
    from implicit.nearest_neighbours import BM25Recommender
    from implicit.utils import ParameterWarning

    model = BM25Recommender(K=neighbours, K1=1.2, B=b, num_threads=num_threads())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParameterWarning)  # about the format of the library's own weighted copy
        model.fit(sp.csr_matrix(inputs.train), show_progress=False)
    return ItemToItem(inputs.train, sp.csr_array(model.similarity, dtype=np.float32))


def ials(
    inputs: Inputs,
    factors: PositiveInt,
    alpha: PositiveFloat,
    regularization: PositiveFloat,
    iterations: PositiveInt,
    seed: int,
) -> Factors:
    """Implicit ALS (Hu et al. 2008). Rows are solved independently, so the result does not depend on the number of threads."""
    from implicit.cpu.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    model = AlternatingLeastSquares(
        factors=factors,
        alpha=alpha,
        regularization=regularization,
        iterations=iterations,
        num_threads=num_threads(),
        random_state=seed,
    )
    with threadpool_limits(1, "blas"):  # the library's own threads call BLAS: more below them only gets in the way
        model.fit(sp.csr_matrix(inputs.train), show_progress=False)
    return Factors(np.asarray(model.user_factors), np.asarray(model.item_factors))


def ease(inputs: Inputs, l2: float, text_weight: float = 0.0) -> Scores:
    """EASE (Steck 2019).

    Args:
        l2: λ.
        text_weight: a of "collective EASE": adds a·SSᵀ to the Gram matrix, S the centred unit rows of the items' text.
    """
    return Ease(inputs.train, inputs.item_text if text_weight else None).fit(EaseSettings(l2, text_weight))


def alpharec(inputs: Inputs, temperature: float, seed: int) -> Scores:
    """The items' text through an MLP and a graph convolution."""
    from components.evaluate.alpharec import AlphaRecSettings, fit

    return fit(inputs.train, inputs.validation, inputs.item_text, AlphaRecSettings(temperature), seed)


def lightgcn_base(inputs: Inputs, on_progress: Callable[..., None]) -> Scores:
    """The backbone without side information, by the train stage's own loop and settings, in this process."""
    from components.train.loop import fit_base

    users, items = fit_base(inputs.train, inputs.validation, dict(inputs.train_config), on_progress)
    return Factors(np.asarray(users, dtype=np.float32), np.asarray(items, dtype=np.float32))


def labels(names: Collection[BaselineName], train_config: Mapping[str, Any]) -> dict[str, str]:
    """`LABELS`, with the name of the backbone that the train stage is set to, if it is among `names`."""
    if "lightgcn" not in names:
        return LABELS
    from components.cllmr.backbones import BACKBONES
    from components.train.config import TrainConfig

    backbone = BACKBONES[TrainConfig.parse(dict(train_config), "train").model.backbone]
    return {**LABELS, "lightgcn": f"{backbone.__name__} (no side information)"}


def grid(name: BaselineName, config: EvaluateConfig) -> list[Settings]:
    """The settings that are tried for one baseline; a single empty one where there is nothing to tune."""
    if name == "text_cosine":
        return [{"centred": centred} for centred in (False, True)]
    if name == "bm25_knn":
        return [{"neighbours": k, "b": b} for k, b in product(config.bm25_neighbours, config.bm25_b)]
    if name == "ials":
        tried = product(config.ials_factors, config.ials_alpha, config.ials_regularization)
        return [{"factors": factors, "alpha": alpha, "regularization": reg} for factors, alpha, reg in tried]
    if name == "ease":
        return [{"l2": l2} for l2 in config.ease_l2]
    if name == "ease_text":
        return [{"l2": l2, "text_weight": weight} for l2, weight in product(config.ease_l2, config.ease_text_weight)]
    if name == "alpharec":
        return [{"temperature": temperature} for temperature in config.alpharec_temperature]
    return [{}]


def fit(
    name: BaselineName,
    settings: Settings,
    inputs: Inputs,
    config: EvaluateConfig,
    on_progress: Callable[..., None] = lambda **figures: None,
) -> Scores:
    """One fitted baseline."""
    if name == "popularity":
        return popularity(inputs)
    if name == "random":
        return RandomScores(config.seed, inputs.train.shape[1])
    if name == "text_cosine":
        return text_cosine(inputs, **settings)
    if name == "bm25_knn":
        return bm25_knn(inputs, **settings)
    if name == "ials":
        return ials(inputs, **settings, iterations=config.ials_iterations, seed=config.seed)
    if name in ("ease", "ease_text"):
        return ease(inputs, **settings)
    if name == "alpharec":
        return alpharec(inputs, **settings, seed=config.seed)
    return lightgcn_base(inputs, on_progress)


def skip_reason(name: BaselineName, inputs: Inputs, config: EvaluateConfig) -> str | None:
    """Why a baseline cannot run on these data, or None."""
    num_items = inputs.train.shape[1]
    if name in ("ease", "ease_text") and num_items > config.ease_max_items:
        return f"{num_items:,} items are more than ease_max_items = {config.ease_max_items:,}"
    if name in ("text_cosine", "ease_text", "alpharec") and not inputs.item_text.any():
        return "no item has text"
    return None


def tune(
    name: BaselineName,
    inputs: Inputs,
    config: EvaluateConfig,
    on_progress: Callable[..., None] = lambda **figures: None,
) -> Tuned:
    """Fits a baseline with every setting of its grid and keeps the one with the best validation NDCG@10 (first of equals)."""
    tried: list[dict[str, Any]] = []
    best: tuple[float, Scores, Settings, Ranking] | None = None
    users = by_lot(inputs.validation, MOST_CHOOSING)
    for settings in grid(name, config):
        baseline = fit(name, settings, inputs, config, on_progress)
        ranking = rank(baseline.score, inputs.train, inputs.validation, config.block_size, users)
        value = ranking.mean()[PRIMARY]
        tried.append({**settings, PRIMARY: round(value, 6)})
        if best is None or value > best[0]:
            best = (value, baseline, settings, ranking)
    assert best is not None, "a grid has at least one setting"
    _, baseline, settings, ranking = best
    if len(users) == MOST_CHOOSING:
        ranking = rank(baseline.score, inputs.train, inputs.validation, config.block_size)
    return Tuned(baseline, settings, ranking, tried)


def is_at_edge(tuned: Tuned) -> Iterator[str]:
    """Numeric settings whose best value is the smallest or largest of their grid (of two, the largest): the optimum may lie
    outside."""
    for name, chosen in tuned.settings.items():
        values = sorted({entry[name] for entry in tuned.grid})
        edges = (values[0], values[-1]) if len(values) >= 3 else values[1:]
        if chosen in edges and not isinstance(chosen, bool):
            yield name


def num_threads() -> int:
    """Threads of a library that would otherwise take every core of the host: OMP_NUM_THREADS, or the cores it may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))

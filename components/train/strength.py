"""Chooses the debias strength λ on the validation interactions."""

from collections.abc import Sequence
from functools import partial

import scipy.sparse as sp

from components.cllmr.linear.scores import LinearScores, mixtures
from components.evaluate.metrics import PRIMARY, rank_several


def strength_curve(
    factual: LinearScores,
    counterfactual: LinearScores,
    train: sp.csr_array,
    validation: sp.csr_array,
    grid: Sequence[float],
) -> list[dict[str, float]]:
    """Validation NDCG@10 of the debiased score for every λ of `grid`: [{debias, ndcg@10}]."""
    rankings = rank_several(partial(mixtures, factual, counterfactual, grid), seen=train, held_out=validation)
    return [
        {"debias": debias, PRIMARY: round(ranking.mean()[PRIMARY], 6)} for debias, ranking in zip(grid, rankings, strict=True)
    ]


def choose_strength(curve: Sequence[dict[str, float]], tolerance: float) -> float:
    """The largest λ whose validation NDCG@10 is within `tolerance` (relative) of the best of the curve."""
    best = max(point[PRIMARY] for point in curve)
    return max(point["debias"] for point in curve if point[PRIMARY] >= (1 - tolerance) * best)

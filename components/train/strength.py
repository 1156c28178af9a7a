"""Chooses the debias strength λ on the validation interactions."""

from collections.abc import Sequence
from functools import partial

import scipy.sparse as sp

from components.evaluate.metrics import PRIMARY, rank
from serving.scorer import Scorer


def strength_curve(
    scorer: Scorer, train: sp.csr_array, validation: sp.csr_array, grid: Sequence[float]
) -> list[dict[str, float]]:
    """Validation NDCG@10 of the debiased score for every λ of `grid`: [{debias, ndcg@10}]."""
    rankings = {debias: rank(partial(scorer.score_all, debias=debias), seen=train, held_out=validation) for debias in grid}
    return [{"debias": debias, PRIMARY: round(ranking.mean()[PRIMARY], 6)} for debias, ranking in rankings.items()]


def choose_strength(curve: Sequence[dict[str, float]], tolerance: float) -> float:
    """The largest λ whose validation NDCG@10 is within `tolerance` (relative) of the best of the curve."""
    best = max(point[PRIMARY] for point in curve)
    return max(point["debias"] for point in curve if point[PRIMARY] >= (1 - tolerance) * best)

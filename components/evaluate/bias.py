"""Where exposure goes: popularity, coverage and concentration of what is recommended, and what the propensity does to it.

Exposure of an item is its number of appearances in the top lists; `top_items` is always (num_users, k) item rows with
`NO_ITEM` for empty places.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.linear.ranking import NO_ITEM, head_items
from components.evaluate.metrics import IntArray, ScoreBlock, blocks, masked

DECILES = 10


def exposure(top_items: IntArray, num_items: int) -> IntArray:
    """Appearances of each item in the top lists, (num_items,)."""
    return np.bincount(top_items[top_items != NO_ITEM], minlength=num_items).astype(np.int64)


def exposure_share(top_items: IntArray, group: npt.NDArray[np.bool_]) -> float:
    """Share of all places in the top lists that items of `group` hold, 0 to 1.

    Args:
        top_items: (num_users, k) item rows.
        group: membership of each item, (num_items,) bool.
    """
    places = top_items[top_items != NO_ITEM]
    return float(group[places].mean()) if len(places) else 0.0


def average_popularity(top_items: IntArray, popularity: IntArray) -> float:
    """Training interactions of a recommended item, averaged per list and then over users (ARP)."""
    shown = top_items != NO_ITEM
    counts = np.where(shown, popularity[np.maximum(top_items, 0)], 0).sum(axis=1)
    lengths = shown.sum(axis=1)
    return float((counts[lengths > 0] / lengths[lengths > 0]).mean()) if lengths.any() else 0.0


def gini(counts: npt.NDArray[np.integer]) -> float:
    """Gini coefficient of non-negative counts: 0 all equal, 1 - 1/n all on one item."""
    total = counts.sum()
    if not total:
        return 0.0
    ordered = np.sort(counts).astype(np.float64)
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * total))


def exposure_summary(top_items: IntArray, popularity: IntArray) -> dict[str, float]:
    """Average popularity, coverage, Gini and head/tail shares of one set of top lists."""
    counts = exposure(top_items, len(popularity))
    head = head_items(popularity)
    return {
        "average_popularity": round(average_popularity(top_items, popularity), 4),
        "coverage": round(float((counts > 0).mean()), 6),
        "gini": round(gini(counts), 6),
        "head_share": round(exposure_share(top_items, head), 6),
        "tail_share": round(exposure_share(top_items, ~head), 6),
    }


def genericness(text: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Mean cosine of each item's text to the texts of all items: high when a text could be about anything.

    Args:
        text: embeddings with unit rows, (num_items, dim), of items that have a text.

    Returns:
        (num_items,).
    """
    return np.asarray(text @ (text.sum(axis=0) / max(len(text), 1)), dtype=np.float64)


def correlation(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> float | None:
    """Pearson correlation, None where one side does not vary."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    if len(left) < 2 or np.ptp(left) < 1e-9 or np.ptp(right) < 1e-9:
        return None
    return round(float(np.corrcoef(left, right)[0, 1]), 6)


def exposure_by_decile(top_items: IntArray, values: npt.NDArray[Any]) -> list[float]:
    """Share of exposure of each decile of the items, ordered by `values`, lowest first: ten shares that sum to 1.

    Items of equal value are treated alike, whatever their rows: each has the mean exposure of them all, in every decile that
    they reach into. All zero when nothing is exposed.

    Args:
        top_items: (num_users, k) item rows.
        values: what the items are ordered by, (num_items,).
    """
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    of_group = np.bincount(group, weights=exposure(top_items, len(values)))
    # exposure of the lowest items by their number: a straight line through equal ones
    bounds = np.arange(DECILES + 1) * (len(values) / DECILES)
    below = np.interp(bounds, np.append(0, sizes.cumsum()), np.append(0, of_group.cumsum()))
    return [round(float(share), 6) for share in np.diff(below) / max(below[-1], 1)]


def rank_shift(
    factual: ScoreBlock, debiased: ScoreBlock, seen: sp.csr_array, users: IntArray, block_size: int = 512
) -> dict[str, float]:
    """How far debiasing moves items: mean absolute change of rank, over all ranked items and over the factual top ten.

    Args:
        factual, debiased: scores of all items for a block of users.
        seen: interactions left out of the ranking, (num_users, num_items).
        users: rows of the users to look at.
    """
    moved = moved_top = pairs = pairs_top = 0
    for block in blocks(users, block_size):
        before, after = (_ranks(masked(score(block), seen, block)) for score in (factual, debiased))
        ranked = before >= 0
        change = np.abs(after - before)
        top = ranked & (before < 10)
        moved, pairs = moved + int(change[ranked].sum()), pairs + int(ranked.sum())
        moved_top, pairs_top = moved_top + int(change[top].sum()), pairs_top + int(top.sum())
    return {"all": round(moved / max(pairs, 1), 4), "top10": round(moved_top / max(pairs_top, 1), 4)}


def _ranks(scores: npt.NDArray[np.float32]) -> IntArray:
    """Rank of each item, 0 the best, ties by item row, -1 for -inf: (n, num_items) -> (n, num_items)."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.empty(order.shape, dtype=np.int64)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(scores.shape[1]), scores.shape), axis=1)
    ranks[np.isneginf(scores)] = -1
    return ranks


def propensity_report(
    propensity: npt.NDArray[np.floating],
    popularity: IntArray,
    text: npt.NDArray[np.floating],
    top_factual: IntArray,
    top_debiased: IntArray,
) -> dict[str, Any]:
    """What the items' propensity follows and whom it exposes.

    Args:
        propensity: how much an item's text speaks for it whatever the user, (num_items,).
        popularity: training interactions, (num_items,).
        text: item text embeddings with unit rows, (num_items, dim), rows of zeros where there is none: how generic a text is
            is known of the others alone.
        top_factual, top_debiased: top lists of the two scores.
    """
    told = text.any(axis=1)
    return {
        "mean": round(float(propensity.mean()), 6),
        "std": round(float(propensity.std()), 6),
        "correlation_genericness": correlation(propensity[told], genericness(text[told])),
        "correlation_log_popularity": correlation(propensity, np.log1p(popularity)),
        "exposure_by_decile": {
            "factual": exposure_by_decile(top_factual, propensity),
            "debiased": exposure_by_decile(top_debiased, propensity),
        },
    }

"""Figures over seeds, paired tests over users, and analysis of variance of a grid of two factors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
DECIMALS = 12  # beyond them is rounding: the mean of five equal values is often not quite their value, and tests count signs


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "std", "per_seed"}; the standard deviation is the sample's (n - 1), 0 for a single value."""
    array = np.asarray(values, dtype=np.float64)
    return {
        "mean": round(float(array.mean()), 6),
        "std": round(float(array.std(ddof=1)), 6) if len(array) > 1 else 0.0,
        "per_seed": [round(float(value), 6) for value in array],
    }


def paired(ours: npt.NDArray[np.floating], theirs: npt.NDArray[np.floating]) -> dict[str, float | None]:
    """Paired comparison of two models over the same users.

    Args:
        ours, theirs: a metric of each user, averaged over seeds, (num_users,).

    Returns:
        difference of the means, relative_percent (of theirs; None where theirs is 0 and ours is not), p of the paired t-test
        and of Wilcoxon's signed-rank test, both two-sided; 1 where no user differs, and for a single user, who shows nothing.
    """
    from scipy import stats

    difference = (ours.astype(np.float64) - theirs).round(DECIMALS)
    mean, base = float(difference.mean()), float(theirs.mean())
    t_p = wilcoxon_p = 1.0
    if difference.any() and len(difference) > 1:
        wilcoxon_p = float(stats.wilcoxon(difference).pvalue)
        # equal differences have no variance: then the test is sure of what it sees
        t_p = float(stats.ttest_1samp(difference, 0).pvalue) if np.ptp(difference) else 0.0
    nothing = None if mean else 0.0  # no share of 0 is more than 0
    return {
        "difference": round(mean, 6),
        "relative_percent": round(100 * mean / base, 3) if base else nothing,
        "t_p": t_p,
        "wilcoxon_p": wilcoxon_p,
    }


def two_way(values: npt.NDArray[np.floating]) -> dict[str, Any]:
    """Two-way analysis of variance with interaction, in blocks.

    The model is y_bij = block_b + A_i + B_j + AB_ij + error, of means over the repeats; blocks are data sets, whose level
    differs and whose response to the factors may: that is the error, so an effect is significant when data sets agree on it.
    Repeats on the same data set say nothing of others and are no degrees of freedom. With a single block there is nothing to
    agree: the error is between its repeats, and what is found is found of that data set alone.

    Args:
        values: (num_blocks, num_a, num_b, num_repeats), balanced.

    Returns:
        For "a", "b" and "interaction" {sum_of_squares, df, f, p} (f and p None without degrees of freedom for the error),
        "error" {sum_of_squares, df}, and "interaction_effects": AB_ij, (num_a, num_b).
    """
    from scipy import stats

    y = np.asarray(values, dtype=np.float64)
    if len(y) > 1:
        y = y.mean(axis=3, keepdims=True)
    blocks, num_a, num_b, repeats = y.shape
    grand = y.mean()
    a = y.mean(axis=(0, 2, 3)) - grand
    b = y.mean(axis=(0, 1, 3)) - grand
    cells = y.mean(axis=(0, 3)) - grand
    interaction = cells - a[:, None] - b[None, :]
    block = y.mean(axis=(1, 2, 3)) - grand
    residual = (y - grand - block[:, None, None, None] - cells[None, :, :, None]).round(DECIMALS)
    error_sum = float((residual**2).sum())
    error_df = y.size - 1 - (blocks - 1) - (num_a * num_b - 1)
    parts = {
        "a": (blocks * num_b * repeats * float((a**2).sum()), num_a - 1),
        "b": (blocks * num_a * repeats * float((b**2).sum()), num_b - 1),
        "interaction": (blocks * repeats * float((interaction**2).sum()), (num_a - 1) * (num_b - 1)),
    }
    found: dict[str, Any] = {"error": {"sum_of_squares": error_sum, "df": error_df}}
    for name, (total, df) in parts.items():
        f = (total / df) / (error_sum / error_df) if df and error_df > 0 and error_sum > 0 else None
        found[name] = {
            "sum_of_squares": total,
            "df": df,
            "f": f,
            "p": None if f is None else float(stats.f.sf(f, df, error_df)),
        }
    found["interaction_effects"] = interaction.round(6).tolist()
    return found


def means(rankings: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    """Metric -> value of each user, averaged over the seeds."""
    return {name: np.mean([ranking[name] for ranking in rankings], axis=0) for name in rankings[0]}

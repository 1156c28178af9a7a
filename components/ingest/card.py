"""The data card: what came in, what was removed and why, and how the rest is distributed."""

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from components.ids import SPLIT, SPLITS, TIMESTAMP, TRAIN
from components.ingest.dataset import Dataset

POPULARITY_SHARES = (1, 5, 10, 20, 50)


def describe(dataset: Dataset) -> dict[str, Any]:
    """Figures of the data set that is handed on: counts, density, degrees, popularity, times."""
    matrix, train = dataset.matrix(), dataset.matrix(TRAIN)
    popularity = np.bincount(train.indices, minlength=dataset.num_items)
    counts = dataset.interactions[SPLIT].value_counts()
    return {
        "users": dataset.num_users,
        "items": dataset.num_items,
        "interactions": int(matrix.nnz),
        "density": round(matrix.nnz / (dataset.num_users * dataset.num_items), 6),
        "splits": {name: int(counts.get(name, 0)) for name in SPLITS},
        "user_degree": degree_summary(np.diff(matrix.indptr)),
        "item_degree": degree_summary(np.bincount(matrix.indices, minlength=dataset.num_items)),
        "cold_items": int((popularity == 0).sum()),
        "popularity_curve": popularity_curve(popularity),
        "popularity_gini": round(gini(popularity), 4),
        "time_range": time_range(dataset.interactions[TIMESTAMP].to_numpy(np.int64)),
    }


def degree_summary(degrees: npt.NDArray[np.integer]) -> dict[str, float]:
    """Least, median, mean and most interactions of a user or item."""
    return {
        "min": int(degrees.min()),
        "median": float(np.median(degrees)),
        "mean": round(float(degrees.mean()), 2),
        "max": int(degrees.max()),
    }


def popularity_curve(popularity: npt.NDArray[np.integer]) -> dict[str, float]:
    """Share of the interactions that the most popular items have: {"1": of the top 1 % of items, "5": ...}.

    The number of items is rounded up. All zero when there is no interaction.
    """
    cumulated = np.cumsum(np.sort(popularity)[::-1])
    total = max(int(cumulated[-1]), 1)
    return {
        str(percent): round(float(cumulated[math.ceil(len(popularity) * percent / 100) - 1]) / total, 4)
        for percent in POPULARITY_SHARES
    }


def gini(counts: npt.NDArray[np.integer]) -> float:
    """Gini coefficient: 0 when all have the same, (n - 1) / n when one has all; 0 when there is nothing."""
    ascending = np.sort(counts).astype(np.float64)
    size, total = len(ascending), float(ascending.sum())
    if total == 0:
        return 0.0
    return float((2 * np.arange(1, size + 1) - size - 1) @ ascending / (size * total))


def time_range(times: npt.NDArray[np.int64]) -> dict[str, str] | None:
    """First and last time of an interaction, ISO 8601 in UTC; None when no interaction carries a time."""
    known = times[times > 0]
    if len(known) == 0:
        return None
    return {"first": iso(int(known.min())), "last": iso(int(known.max()))}


def iso(seconds: int) -> str:
    """Unix seconds, up to the year 9999, as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()

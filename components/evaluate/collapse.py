"""Dimensional collapse of representations: their singular values and how many of them carry weight."""

from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 4096
"""Rows that are held in double precision at a time."""


def singular_values(representations: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Singular values of the centred matrix, largest first: (num_nodes, dim) -> (min(num_nodes, dim),)."""
    from scipy.linalg import svdvals

    mean = representations.mean(axis=0, dtype=np.float64)
    triangle = np.empty((0, len(mean)))  # of the rows so far: it has their singular values, small ones as precisely
    for start in range(0, len(representations), BLOCK_SIZE):
        block = representations[start : start + BLOCK_SIZE] - mean
        triangle = np.asarray(np.linalg.qr(np.vstack([triangle, block]), mode="r"))
    return np.asarray(svdvals(triangle))


def effective_rank(values: npt.NDArray[np.floating]) -> float:
    """exp(entropy of σ/Σσ) of singular values (METHOD a.4): 1 when all weight is on one axis, dim when it is spread evenly.

    Zero when there is no variation at all (every value is 0).
    """
    total = values.sum()
    if not total:
        return 0.0
    share = values[values > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def collapse(representations: dict[str, npt.NDArray[np.floating]]) -> dict[str, dict[str, Any]]:
    """Name -> {dim, effective_rank, singular_values (relative to the largest)} of each non-empty representation."""
    result: dict[str, dict[str, Any]] = {}
    for name, matrix in representations.items():
        if not matrix.size:
            continue  # a model without side encoder has no side representation
        values = singular_values(matrix)
        relative = values / values[0] if values[0] else values
        result[name] = {
            "dim": int(matrix.shape[1]),
            "effective_rank": round(effective_rank(values), 4),
            "singular_values": [round(float(value), 6) for value in relative],
        }
    return result

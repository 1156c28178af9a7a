"""The best items of many users at once, where what serves them (`serving.ranking`) looks for one user's."""

import numpy as np
import numpy.typing as npt

NO_ITEM = -1
"""Fills a ranking that is shorter than asked for, because fewer items are left after masking."""

HEAD_SHARE = 0.2
"""The head is this share of the items, the most popular in training."""


def head_items(popularity: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Membership of the head: the `HEAD_SHARE` most popular items, at least one, ties by the lower row."""
    head = np.zeros(len(popularity), dtype=bool)
    size = max(1, round(HEAD_SHARE * len(popularity)))
    head[np.argsort(-popularity, kind="stable")[:size]] = True
    return head


def top_k(scores: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.int64]:
    """Columns of the k largest scores of each row, best first, ties by the lower column.

    Args:
        scores: (n, num_items); -inf marks items that must not be ranked.
        k: length of the ranking.

    Returns:
        (n, k), NO_ITEM at the end where fewer than k items can be ranked.

    Raises:
        ValueError: a score is NaN: a ranking of it would be arbitrary.
    """
    if np.isnan(scores).any():
        raise ValueError(f"scores hold NaN in {int(np.isnan(scores).any(axis=1).sum())} of {len(scores)} rows")
    num_rows, num_items = scores.shape
    kept = min(k, num_items)
    threshold = np.partition(scores, num_items - kept, axis=1)[:, num_items - kept, None]
    chosen = scores >= threshold
    for row in np.flatnonzero(np.count_nonzero(chosen, axis=1) > kept):  # more tie with the last one than there is room for
        tied = np.flatnonzero(scores[row] == threshold[row])
        above = np.count_nonzero(chosen[row]) - len(tied)
        chosen[row, tied[kept - above :]] = False
    columns = np.flatnonzero(chosen).reshape(num_rows, kept) % num_items  # ascending, so a stable sort breaks ties by column
    values = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    columns = np.take_along_axis(columns, order, axis=1)
    columns[np.isneginf(np.take_along_axis(values, order, axis=1))] = NO_ITEM
    return np.pad(columns, ((0, 0), (0, k - kept)), constant_values=NO_ITEM).astype(np.int64)

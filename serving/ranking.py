"""From the scores of all items to the best of those that may be ranked."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

_GROUP = 128  # items whose best is looked at first: a hundred thousand scores become eight hundred


class Ranking(NamedTuple):
    """Items from best to worst."""

    rows: Rows
    scores: Floats


class Matching(NamedTuple):
    """The items that pass a filter; made once for all who ask for it."""

    penalty: Floats
    """0 for an item that passes, else -inf, (num_items,): adding it to scores takes a fiftieth of choosing by a mask."""
    num_items: int
    """How many pass."""

    @classmethod
    def of(cls, mask: npt.NDArray[np.bool_]) -> "Matching":
        """Made of which items pass, (num_items,)."""
        return cls(np.where(mask, np.float32(0), np.float32(-np.inf)), int(mask.sum()))

    def passes(self, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Whether items pass, by row."""
        passing: npt.NDArray[np.bool_] = self.penalty[rows] == 0
        return passing


class Candidates:
    """Which items may be ranked: all but some, or some alone.

    Kept as the rows of those few. Making a mask of all items, and reading it, costs more than all the rest of a ranking.

    Args:
        num_items: all there are.
        excluded: item rows that are no candidates.
        allowed: item rows that alone are candidates; None: all.
        matching: the items that alone are candidates; None: all.
    """

    def __init__(self, num_items: int, excluded: Rows, allowed: Rows | None = None, matching: Matching | None = None) -> None:
        self._num_items = num_items
        self._excluded = excluded  # with repeats: to find them takes longer than to leave out the same item again
        self._allowed = None if allowed is None else np.setdiff1d(allowed, self._excluded)
        if self._allowed is not None and matching is not None:  # few are left: no mask is needed
            self._allowed, matching = self._allowed[matching.passes(self._allowed)], None
        self._matching = matching

    def __len__(self) -> int:
        if self._allowed is not None:
            return len(self._allowed)
        excluded = np.unique(self._excluded)
        if self._matching is not None:
            return self._matching.num_items - int(self._matching.passes(excluded).sum())
        return self._num_items - len(excluded)

    def without(self, rows: Rows) -> "Candidates":
        """All but these."""
        if not len(rows):
            return self
        excluded = np.concatenate((self._excluded, rows)) if len(self._excluded) else rows
        return Candidates(self._num_items, excluded, self._allowed, self._matching)

    def contains(self, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Whether items are candidates, by row."""
        if self._allowed is not None:
            return np.isin(rows, self._allowed)
        kept: npt.NDArray[np.bool_] = np.isin(rows, self._excluded, invert=True)
        return kept if self._matching is None else kept & self._matching.passes(rows)

    def masked(self, scores: Floats) -> Floats:
        """The scores of all items, -inf for those that are no candidates."""
        if self._allowed is None:
            masked = scores.copy() if self._matching is None else scores + self._matching.penalty
            masked[self._excluded] = -np.inf
        else:
            masked = np.full_like(scores, -np.inf)
            masked[self._allowed] = scores[self._allowed]
        return masked


def top_k(scores: Floats, k: int, candidates: Candidates | None = None) -> Ranking:
    """The k best of the candidate items, best first; equal scores rank by item row, so the answer is one and the same.

    Args:
        scores: (num_items,), finite.
        k: items wanted.
        candidates: None: all items.
    """
    masked = scores if candidates is None else candidates.masked(scores)
    rows = _worth_a_look(masked, k)
    values = masked[rows]
    rows, values = rows[values > -np.inf], values[values > -np.inf]
    if 0 < k < len(rows):
        kept = values >= np.partition(values, -k)[-k]  # all that tie with the k-th too
        rows, values = rows[kept], values[kept]
    best = np.lexsort((rows, -values))[: max(k, 0)]
    return Ranking(rows[best], values[best])


def _worth_a_look(scores: Floats, k: int) -> Rows:
    """Rows among which the k best are, with all that tie with the last of them: most of many are ruled out in groups.

    k groups have a best of at least the k-th group's, so a group whose best is less has none of the k best. A group is every
    n-th item, as numpy finds the greatest of columns eight times as fast as that of rows.
    """
    num_groups = len(scores) // _GROUP
    if not 0 < k <= num_groups:
        return np.arange(len(scores))
    whole = num_groups * _GROUP
    best = scores[:whole].reshape(_GROUP, num_groups).max(axis=0)
    least = np.partition(best, -k)[-k]
    grouped = (np.arange(0, whole, num_groups)[:, None] + np.flatnonzero(best >= least)).ravel()
    rows = np.concatenate((grouped, np.arange(whole, len(scores))))
    return rows[scores[rows] >= least]


def rank_of(scores: Floats, rows: Rows, candidates: Candidates) -> Rows:
    """Rank (1 = best) of given items in the whole ranking of the candidates, ties by item row, 0 for one that is none:
    (len(rows),)."""
    masked = candidates.masked(scores)
    ordered, values = np.sort(masked), masked[rows]  # sorting rows by their scores takes ten times as long
    least, most = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    ranks = len(ordered) - most + 1
    for place in np.flatnonzero(most - least > 1):
        ranks[place] += np.count_nonzero(masked[: rows[place]] == values[place])
    return np.where(values > -np.inf, ranks, 0)

"""Full-ranking metrics: Recall@k and NDCG@k over all items, per user, with paired bootstrap intervals over users.

Protocol (CLLMR and RLMRec, METHOD d.3): every item is ranked for every user; only the user's training items are masked
(validation items stay in the ranking at test time); users without held-out items are skipped; metrics are means over users.

    Recall@k = hits in the top k / number of the user's held-out items
    NDCG@k   = sum over hits of 1/log2(rank + 1)  /  the same sum of an ideal ranking (min(k, held-out items) hits at the top)

Ties are broken by item row, the lower row first, so that a ranking is a function of the scores alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.linear.ranking import NO_ITEM, top_k

CUTOFFS = (5, 10, 20)
METRICS = tuple(f"{name}@{k}" for name in ("recall", "ndcg") for k in CUTOFFS)
PRIMARY = "ndcg@10"
"""What baselines are tuned by and challengers are judged by."""
MOST_CHOOSING = 50_000
"""Users by whose validation interactions settings are chosen, at most: that many tell them apart."""

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
ScoreBlock = Callable[[IntArray], npt.NDArray[np.float32]]
"""Scores of all items for some users: rows of the users (n,) -> (n, num_items)."""


@dataclass(frozen=True)
class Ranking:
    """The top of every evaluated user's ranking and what it is worth."""

    users: IntArray
    """Rows of the users with held-out items, (num_evaluated,), ascending."""
    top_items: IntArray
    """Item rows, best first, (num_evaluated, max(CUTOFFS)); NO_ITEM where nothing is left to rank."""
    per_user: dict[str, npt.NDArray[np.float64]]
    """Metric -> value of each user, (num_evaluated,)."""

    def mean(self) -> dict[str, float]:
        """Metric -> mean over users."""
        return {name: float(values.mean()) for name, values in self.per_user.items()}


def blocks(users: IntArray, block_size: int) -> Iterator[IntArray]:
    """`users` in consecutive pieces of at most `block_size`."""
    for start in range(0, len(users), block_size):
        yield users[start : start + block_size]


def masked(scores: FloatArray, seen: sp.csr_array, users: IntArray) -> npt.NDArray[np.float32]:
    """A copy of `scores` (n, num_items) with -inf at the interactions `seen` (num_users, num_items) of `users` (n,)."""
    scores = np.array(scores, dtype=np.float32)
    rows, columns = seen[users].nonzero()
    scores[rows, columns] = -np.inf
    return scores


def rank(
    score: ScoreBlock, seen: sp.csr_array, held_out: sp.csr_array, block_size: int = 512, users: IntArray | None = None
) -> Ranking:
    """Ranks all items for every user with held-out items, and measures the rankings.

    Args:
        score: scores of all items for a block of users.
        seen: interactions to mask, (num_users, num_items).
        held_out: interactions to find, (num_users, num_items), binary.
        block_size: users scored at once.
        users: evaluate only these rows (those with held-out items among them).

    Raises:
        ValueError: no user has a held-out item, or a score is NaN.
    """
    return rank_several(lambda block: (score(block),), seen, held_out, block_size, users)[0]


def rank_several(
    scores: Callable[[IntArray], Iterable[FloatArray]],
    seen: sp.csr_array,
    held_out: sp.csr_array,
    block_size: int = 512,
    users: IntArray | None = None,
) -> list[Ranking]:
    """As `rank`, for models whose scores come from the same work: `scores` gives those of every model for a block of users."""
    size = np.diff(held_out.indptr)
    evaluated = np.flatnonzero(size).astype(np.int64)
    if users is not None:
        evaluated = np.intersect1d(evaluated, users)
    if not len(evaluated):
        raise ValueError("no user has a held-out interaction: there is nothing to evaluate")
    tops: list[list[IntArray]] = []
    hits: list[list[npt.NDArray[np.bool_]]] = []
    for block in blocks(evaluated, block_size):
        relevant = held_out[block]
        found = [top_k(masked(each, seen, block), max(CUTOFFS)) for each in scores(block)]
        tops.append(found)
        hits.append([among(relevant, top) for top in found])
    return [
        Ranking(evaluated, np.concatenate(top), measure(np.concatenate(hit), size[evaluated]))
        for top, hit in zip(zip(*tops, strict=True), zip(*hits, strict=True), strict=True)
    ]


def among(relevant: sp.csr_array, items: IntArray) -> npt.NDArray[np.bool_]:
    """Which of each user's `items` (num_users, k) are among the user's `relevant` ones (num_users, num_items), without a
    dense copy of these; NO_ITEM is not."""
    num_users, num_items = relevant.shape
    row, column = relevant.nonzero()
    keys = np.sort(row.astype(np.int64) * num_items + column)
    asked = np.arange(num_users)[:, None] * num_items + items
    if not len(keys):
        return np.zeros(asked.shape, dtype=bool)
    found = keys[np.minimum(np.searchsorted(keys, asked), len(keys) - 1)] == asked
    return np.asarray(found & (items != NO_ITEM))


def measure(hits: npt.NDArray[np.bool_], num_held_out: npt.NDArray[np.integer]) -> dict[str, npt.NDArray[np.float64]]:
    """All metrics of each user.

    Args:
        hits: whether the item at each rank is held out, (num_users, at least max(CUTOFFS)).
        num_held_out: held-out items of each user, (num_users,), all positive.

    Returns:
        Metric name -> (num_users,).
    """
    discount = 1.0 / np.log2(np.arange(2, max(CUTOFFS) + 2))
    ideal = np.cumsum(discount)
    result: dict[str, npt.NDArray[np.float64]] = {}
    for k in CUTOFFS:
        result[f"recall@{k}"] = hits[:, :k].sum(axis=1) / num_held_out
        result[f"ndcg@{k}"] = (hits[:, :k] * discount[:k]).sum(axis=1) / ideal[np.minimum(k, num_held_out) - 1]
    return {name: result[name] for name in METRICS}


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of the same users for every model: intervals of means, and of paired differences."""

    num_users: int
    num_samples: int
    seed: int

    def counts(self) -> Iterator[IntArray]:
        """How often each user is drawn, (num_users,), in one resample with replacement after the other: all of them would take
        kilobytes for each user."""
        rng = np.random.default_rng(self.seed)
        for _ in range(self.num_samples):
            yield np.bincount(rng.integers(self.num_users, size=self.num_users), minlength=self.num_users)

    def intervals(self, values: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
        """95 % percentile interval of the mean of each column of `values` (num_users, any); give a difference of two models
        for a paired one."""
        means = [count @ values / self.num_users for count in self.counts()]
        low, high = np.percentile(means, [2.5, 97.5], axis=0)
        return list(zip(low.tolist(), high.tolist(), strict=True))


def summarise(ranking: Ranking, bootstrap: Bootstrap) -> dict[str, dict[str, object]]:
    """Metric -> {"mean", "ci95": [low, high]}, rounded to six digits."""
    return _summary(ranking.per_user, bootstrap)


def paired_difference(
    left: Mapping[str, npt.NDArray[np.float64]], right: Mapping[str, npt.NDArray[np.float64]], bootstrap: Bootstrap
) -> dict[str, dict[str, object]]:
    """Metric -> mean of left - right over the same users, with its paired 95 % interval."""
    return _summary({name: left[name] - right[name] for name in METRICS}, bootstrap)


def _summary(per_user: Mapping[str, npt.NDArray[np.float64]], bootstrap: Bootstrap) -> dict[str, dict[str, object]]:
    intervals = bootstrap.intervals(np.column_stack(list(per_user.values())))
    return {
        name: {"mean": round(float(values.mean()), 6), "ci95": [round(end, 6) for end in interval]}
        for (name, values), interval in zip(per_user.items(), intervals, strict=True)
    }

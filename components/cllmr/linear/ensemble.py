"""Several models as one: the weighted sum of their scores, each standardised per user, weights chosen on validation.

Standardised because scores of different models have different scales, and scales that differ between users: for user u,
z_ui = (s_ui - mean_j s_uj) / std_j s_uj. Only the scale matters to a ranking, and for members whose score is an inner product
a_u . b_i it is a property of the user: std_u² = a_uᵀ Cov(b) a_u. So an ensemble of inner products is one inner product, of the
user row [w_m a_mu / std_mu] and the item row [b_mi], concatenated over the members.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.linear.ranking import NO_ITEM, top_k
from components.cllmr.linear.scores import standardised

Floats = npt.NDArray[np.float32]
Figures = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

STEPS = (-0.4, -0.2, -0.1, -0.05, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Changes of one weight that are tried, in units of a standard deviation of a member's scores."""
MIN_GAIN = 5e-4
"""A change of a weight must raise the validation metric by this share, so that noise adds no members."""
SAMPLES = 8
"""Bootstrap samples of the users, each of which has its own best weights."""
LEAST = 0.02
"""A smaller weight than this share is none: a member costs memory and time in every answer."""
MOST_USERS = 20_000
"""Users whose scores are held in memory at once; that many tell weights apart."""
_CUTOFF = 10
_LAST = np.finfo(np.float32).min  # after all scores; places are filled with masked items where there are too few others
_DISCOUNT = 1.0 / np.log2(np.arange(2, _CUTOFF + 2))


class Scores(Protocol):
    """Anything fitted that scores all items for a block of users."""

    def score(self, users: Rows) -> Floats:
        """Rows of the users (n,) -> (n, num_items)."""
        ...


@dataclass(frozen=True)
class Ensemble:
    """The weighted sum of standardised members; members of weight 0 are not asked."""

    members: Sequence[Scores]
    weights: Sequence[float]

    def score(self, users: Rows) -> Floats:
        """Rows of the users (n,) -> (n, num_items)."""
        parts = ((w, member) for w, member in zip(self.weights, self.members, strict=True) if w)
        total: Floats | None = None
        for weight, member in parts:
            part = np.float32(weight) * standardised(member.score(users))
            total = part if total is None else total + part
        assert total is not None, "an ensemble has a member with a weight"
        return total


@dataclass(frozen=True)
class Candidates:
    """What the choice of weights looks at: of each validation user, the items that any member ranks high.

    The ten best of a weighted sum are nearly always among the members' own best, so a metric over these columns stands for the
    one over all items at a fraction of its cost; the metric that is reported is the one over all items.
    """

    scores: Floats
    """Standardised scores, (num_members, num_users, num_candidates)."""
    excluded: npt.NDArray[np.bool_]
    """Places that hold a masked item, or one that an earlier place holds, (num_users, num_candidates)."""
    relevant: npt.NDArray[np.bool_]
    """Places that hold an item to find; none that is excluded, as these are among the ten where there are fewer items,
    (num_users, num_candidates)."""
    ideal: npt.NDArray[np.float64]
    """DCG@10 of an ideal ranking, (num_users,)."""

    @classmethod
    def collect(
        cls, members: Sequence[Scores], seen: sp.csr_array, held_out: sp.csr_array, per_member: int = 60, block_size: int = 256
    ) -> "Candidates":
        """Asks every member once for every user with held-out interactions, or for `MOST_USERS` of them by lot.

        Args:
            members: fitted models.
            seen: interactions that are not ranked, (num_users, num_items).
            held_out: interactions to find, same shape.
            per_member: items kept of each member's ranking.
            block_size: users scored at once.
        """
        size = np.diff(held_out.indptr)
        users = by_lot(held_out, MOST_USERS)
        kept = min(per_member, held_out.shape[1])
        scores, excluded, relevant = [], [], []
        for start in range(0, len(users), block_size):
            block = users[start : start + block_size]
            parts = [standardised(member.score(block)) for member in members]
            masked = seen[block].toarray() > 0
            chosen = [top_k(np.where(masked, _LAST, part), kept) for part in parts]
            columns = np.sort(np.concatenate(chosen, axis=1), axis=1)
            out = np.take_along_axis(masked, columns, axis=1)
            out[:, 1:] |= columns[:, 1:] == columns[:, :-1]
            scores.append(np.stack([np.take_along_axis(part, columns, axis=1) for part in parts]))
            excluded.append(out)
            relevant.append(np.take_along_axis(held_out[block].toarray() > 0, columns, axis=1) & ~out)
        ideal = np.cumsum(_DISCOUNT)[np.minimum(size[users], _CUTOFF) - 1]
        return cls(np.concatenate(scores, axis=1), np.concatenate(excluded), np.concatenate(relevant), ideal)

    def ndcg(self, weights: npt.NDArray[np.floating]) -> Figures:
        """NDCG@10 of the weighted sum over these candidates, of each user: (num_users,)."""
        total = np.tensordot(weights.astype(np.float32), self.scores, axes=1)
        total[self.excluded] = -np.inf
        top = top_k(total, _CUTOFF)
        hits = np.take_along_axis(self.relevant, np.maximum(top, 0), axis=1) & (top != NO_ITEM)
        return np.asarray((hits * _DISCOUNT).sum(axis=1) / self.ideal)


def by_lot(held_out: sp.csr_array, most: int) -> Rows:
    """Rows of the users with held-out interactions, ascending; of more than `most` so many, always the same."""
    users = np.flatnonzero(np.diff(held_out.indptr)).astype(np.int64)
    return users if len(users) <= most else np.sort(np.random.default_rng(0).choice(users, most, replace=False))


def choose_weights(
    candidates: Candidates, rounds: int = 3, negative: Sequence[bool] | None = None, start: Sequence[float] | None = None
) -> tuple[list[float], float]:
    """Weights whose absolute values sum to 1, (num_members,), and the mean NDCG@10 they reach.

    The mean over bootstrap samples of the users, of what coordinate ascent finds on each: the optimum is flat, so that one
    ascent ends anywhere on it, by the noise of the users it looks at. Weights below `LEAST` are 0. Deterministic: the samples
    are always the same, members and steps are tried in their order, and only a gain of `MIN_GAIN` moves a weight.

    Args:
        candidates: of the members.
        rounds: passes over the members.
        negative: which members may count against an item; all when None.
        start: first weights; the best single member when None.
    """
    number, users = candidates.scores.shape[:2]
    allowed = [True] * number if negative is None else negative
    known: dict[bytes, Figures] = {}

    def value(sample: Figures, weights: Figures) -> float:
        key = np.round(weights, 9).tobytes()  # samples that go the same way ask for the same
        if key not in known:
            known[key] = candidates.ndcg(weights)
        return float(sample @ known[key])

    samples = np.random.default_rng(0).multinomial(users, np.full(users, 1 / users), size=SAMPLES) / users
    found = [_ascent(partial(value, sample), allowed, rounds, start) for sample in samples]
    weights = np.mean(found, axis=0)
    weights[np.abs(weights) < LEAST] = 0.0
    weights = np.round(weights / np.abs(weights).sum(), 6)
    return weights.tolist(), float(candidates.ndcg(weights).mean())


def _ascent(value: Callable[[Figures], float], allowed: Sequence[bool], rounds: int, start: Sequence[float] | None) -> Figures:
    """Coordinate ascent of the value: weights whose absolute values sum to 1."""
    number = len(allowed)
    if start is None:
        start = np.eye(number)[int(np.argmax([value(row) for row in np.eye(number)]))]
    weights: Figures = np.array(start, dtype=np.float64)
    best = value(weights)
    for _ in range(rounds):
        before = best
        for member in range(number):
            tried = [weights + step * np.eye(number)[member] for step in STEPS]
            tried = [one for one in tried if one.any() and (allowed[member] or one[member] > -1e-9)]
            values = [value(one) for one in tried]
            if values and max(values) > best * (1 + MIN_GAIN):
                best = max(values)
                weights = tried[int(np.argmax(values))]
        if best == before:
            break
    return weights / np.abs(weights).sum()

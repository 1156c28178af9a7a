"""The ladder a request goes down when it cannot be answered at its best: one rung after another, until one answers.

Now personalised -> popularity. A rung says why it has no answer; that reason is in the response and is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from components.ids import UNKNOWN
from serving.schemas import Method
from serving.scorer import Ranking, Scorer, top_k

UNKNOWN_USER = "unknown_user"


@dataclass(frozen=True)
class Query:
    """What one user's ranking needs."""

    user: int
    """User row, `UNKNOWN` for a user who is not in the bundle."""
    k: int
    debias: float | None
    """Debias strength, the bundle's own when None."""
    candidates: npt.NDArray[np.bool_]
    """(num_items,) bool: what may be ranked."""


@dataclass(frozen=True)
class Answer:
    """A ranking and how it was made."""

    ranking: Ranking
    method: Method
    reason: str | None
    """Why a better method was not used, None for the best one."""


class Rung(Protocol):
    """One way to answer."""

    method: Method

    def rank(self, query: Query) -> Ranking | str:
        """The ranking, or the reason why this rung has none."""
        ...


class Personalised:
    """The model's own ranking; needs a user of the training data."""

    method: Method = "personalised"

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def rank(self, query: Query) -> Ranking | str:
        """See Rung."""
        if query.user == UNKNOWN:
            return UNKNOWN_USER
        scores = self._scorer.score_all(np.array([query.user]), query.debias)[0]
        return top_k(scores, query.k, query.candidates)


class Popularity:
    """The items with most training interactions; always answers."""

    method: Method = "popularity"

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def rank(self, query: Query) -> Ranking | str:
        """See Rung."""
        return self._scorer.popular(query.k, exclude=np.flatnonzero(~query.candidates))


class Ladder:
    """Rungs from best to last; the last one always answers."""

    def __init__(self, rungs: Sequence[Rung]) -> None:
        self._rungs = list(rungs)

    @classmethod
    def of(cls, scorer: Scorer) -> "Ladder":
        """The ladder of this platform for one bundle."""
        return cls([Personalised(scorer), Popularity(scorer)])

    def rank(self, query: Query) -> Answer:
        """The first rung's ranking that there is, with the reason of the first rung that had none."""
        reason: str | None = None
        for rung in self._rungs:
            result = rung.rank(query)
            if isinstance(result, Ranking):
                return Answer(result, rung.method, reason)
            reason = reason or result
        raise AssertionError(f"the last rung has no answer: {reason}")

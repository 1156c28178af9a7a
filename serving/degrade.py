"""The ladder a request goes down when it cannot be answered at its best: one rung after another, until one answers.

Personalised -> fold-in of the history -> popularity. A rung says why it has no answer; that reason is in the response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from components.ids import UNKNOWN
from serving.schemas import Method
from serving.scorer import Scorer

UNKNOWN_USER = "unknown_user"
NO_HISTORY = "no_history"
NO_FOLD_IN = "no_fold_in"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Query:
    """What one user's scores need."""

    user: int
    """User row, `UNKNOWN` for a user who is not in the bundle."""
    history: npt.NDArray[np.int64]
    """Item rows of what is known of the user beside the training data, newest or oldest first."""
    recent: npt.NDArray[np.int64]
    """Of these, the ones that came with the request."""


class Rung(Protocol):
    """One way to answer."""

    method: Method

    def reason_against(self, query: Query) -> str | None:
        """Why this rung has no answer, None when it has one."""
        ...

    def scores(self, query: Query, debias: float) -> Floats:
        """Scores of all items, (num_items,), debiased with strength `debias`."""
        ...


class Personalised:
    """The model's own scores; needs a user of the training data."""

    method: Method = "personalised"

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def reason_against(self, query: Query) -> str | None:
        """See Rung."""
        return UNKNOWN_USER if query.user == UNKNOWN else None

    def scores(self, query: Query, debias: float) -> Floats:
        """See Rung."""
        return self._scorer.score_user(query.user, debias, query.recent)


class FoldIn:
    """Scores from a history alone; needs an item in it that the model knows."""

    method: Method = "fold_in"

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def reason_against(self, query: Query) -> str | None:
        """See Rung."""
        if not self._scorer.folds_in:
            return NO_FOLD_IN
        return None if query.history.size else NO_HISTORY

    def scores(self, query: Query, debias: float) -> Floats:
        """See Rung."""
        return self._scorer.fold_in(query.history, debias)


class Popularity:
    """Training interactions; always answers."""

    method: Method = "popularity"

    def __init__(self, scorer: Scorer) -> None:
        self._scores = scorer.popularity.astype(np.float32)

    def reason_against(self, query: Query) -> str | None:
        """See Rung."""
        return None

    def scores(self, query: Query, debias: float) -> Floats:
        """See Rung; counts have nothing to debias."""
        return self._scores


class Ladder:
    """Rungs from best to last; the last one always answers."""

    def __init__(self, rungs: Sequence[Rung]) -> None:
        self._rungs = list(rungs)

    @classmethod
    def of(cls, scorer: Scorer) -> "Ladder":
        """The ladder of this platform for one bundle."""
        return cls([Personalised(scorer), FoldIn(scorer), Popularity(scorer)])

    def rung(self, query: Query) -> tuple[Rung, str | None]:
        """The first rung that has an answer, and the reason of the first one that had none."""
        reason: str | None = None
        for rung in self._rungs:
            against = rung.reason_against(query)
            if against is None:
                return rung, reason
            reason = reason or against
        raise AssertionError(f"the last rung has no answer: {reason}")

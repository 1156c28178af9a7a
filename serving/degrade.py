"""The ladder a request goes down when it cannot be answered at its best: one rung after another, until one answers.

Personalised -> fold-in of the history -> side information only (texts of the history's items, or of a user who has none) ->
popularity -> static. A rung says why it has no answer; that
reason is in the response. All but the last are of a bundle (`Ladder`); the last one needs none and so stands with whoever asks
for an answer: it is what was popular when a model last answered (`Static`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from components.cllmr.linear.newcomers import Newcomers
from components.ids import UNKNOWN
from serving.attributes import Attributes
from serving.schemas import Method, RankedItem, RecommendRequest, RecommendResponse, UserRecommendations
from serving.scorer import Scorer
from serving.texts import Texts

UNKNOWN_USER = "unknown_user"
NO_HISTORY = "no_history"
NO_FOLD_IN = "no_fold_in"
NO_TEXTS = "no_texts"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Query:
    """What one user's scores need."""

    user: int
    """User row, `UNKNOWN` for a user without training interactions."""
    history: npt.NDArray[np.int64]
    """Item rows of what is known of the user beside the training data, ascending, each once."""
    recent: npt.NDArray[np.int64]
    """Of these, the ones that came with the request."""
    text: Floats | None = None
    """Embedding of the user's own text, (dim,), for who has no history; None where there is none."""


class Rung(Protocol):
    """One way to answer."""

    method: Method
    debiases: bool
    """Whether its scores depend on the strength."""

    def reason_against(self, query: Query) -> str | None:
        """Why this rung has no answer, None when it has one."""
        ...

    def scores(self, query: Query, debias: float) -> Floats:
        """Scores of all items, (num_items,), debiased with strength `debias`."""
        ...


class Personalised:
    """The model's own scores; needs a user who has training interactions."""

    method: Method = "personalised"
    debiases = True

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
    debiases = True

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


class SideInformation:
    """The texts of a history alone, for a model that makes nothing of one: of popularity alone, or from before graph models and
    factors told a user from a history. Needs texts in the bundle."""

    method: Method = "side_information"
    debiases = False

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def reason_against(self, query: Query) -> str | None:
        """See Rung."""
        if not query.history.size:
            return NO_HISTORY  # before the texts are read, which takes their memory
        return None if self._texts.are_there() else NO_TEXTS

    def scores(self, query: Query, debias: float) -> Floats:
        """See Rung; what the texts say by themselves is not known of a history, so nothing is taken out."""
        return self._texts.read().of_history(query.history)


class Newcomer:
    """The user's own text alone, for who has done nothing yet; needs that text, and a bundle that learned from others'."""

    method: Method = "side_information"
    debiases = True

    def __init__(self, scorer: Scorer, newcomers: Newcomers) -> None:
        self._scorer, self._newcomers = scorer, newcomers

    def reason_against(self, query: Query) -> str | None:
        """See Rung."""
        return NO_TEXTS if query.text is None else None

    def scores(self, query: Query, debias: float) -> Floats:
        """See Rung."""
        assert query.text is not None, "a rung with a reason against it is not asked"
        scorer, text = self._scorer, query.text[None]
        models = (("factual", scorer.factual, 1 - debias), ("counterfactual", scorer.counterfactual, debias))
        scores = np.zeros(scorer.num_items, dtype=np.float32)
        for name, model, share in models:
            if share:
                scores += np.float32(share) * self._newcomers.score(text, name, model, scorer.popularity_scores[name])[0]
        return scores


class Popularity:
    """What is popular; always answers."""

    method: Method = "popularity"
    debiases = True

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def reason_against(self, query: Query) -> str | None:
        """See Rung."""
        return None

    def scores(self, query: Query, debias: float) -> Floats:
        """See Rung; clicks that a text lured count as little as they do for users who are known."""
        return self._scorer.popular(debias)


class Ladder:
    """Rungs from best to last; the last one always answers."""

    def __init__(self, rungs: Sequence[Rung]) -> None:
        self._rungs = list(rungs)

    @classmethod
    def of(cls, scorer: Scorer, texts: Texts | None = None, newcomers: Newcomers | None = None) -> "Ladder":
        """The ladder of this platform for one bundle, its texts where they are at hand, and its newcomers where it has any."""
        sides: list[Rung] = [] if texts is None else [SideInformation(texts)]
        if newcomers is not None:
            sides.append(Newcomer(scorer, newcomers))
        return cls([Personalised(scorer), FoldIn(scorer), *sides, Popularity(scorer)])

    def rung(self, query: Query) -> tuple[Rung, str | None]:
        """The first rung that has an answer, and the reason of the first one that had none."""
        reason: str | None = None
        for rung in self._rungs:
            against = rung.reason_against(query)
            if against is None:
                return rung, reason
            reason = reason or against
        raise AssertionError(f"the last rung has no answer: {reason}")


@dataclass(frozen=True)
class Listed:
    """A ranking that is the same for everybody."""

    items: tuple[RankedItem, ...]
    """Best first."""
    attributes: Attributes
    """Of these items."""

    def allowed(self, request: RecommendRequest) -> list[RankedItem]:
        """Those that may be shown to anybody; raises FilterError when `request.filters` names what the items do not have."""
        passes = self.attributes.matching(request.filters).passes(np.arange(len(self.items))).tolist()
        allow, deny = None if request.allow is None else set(request.allow), set(request.deny)
        return [
            item
            for item, one in zip(self.items, passes, strict=True)
            if one and (allow is None or item.item_id in allow) and item.item_id not in deny
        ]


@dataclass(frozen=True)
class Static:
    """The last rung: what was most popular when a model last answered, for when none does."""

    debiased: Listed
    """By the strength of the model that told it, whatever a request asks for but 0."""
    factual: Listed
    model_version: str
    """Of that model."""
    debias: float
    """Its strength."""

    def recommend(self, request: RecommendRequest, histories: Sequence[Sequence[str]], reason: str) -> RecommendResponse:
        """The same list for everybody, without what is known to be seen or is not to be shown.

        Args:
            request: the question.
            histories: recent item ids of each user.
            reason: why no model answers.

        Raises:
            FilterError: `request.filters` names what the items do not have.
        """
        debiased, factual = (listed.allowed(request) for listed in (self.debiased, self.factual))
        items, debias = (factual, 0.0) if request.debias == 0 else (debiased, self.debias)

        def without(allowed: list[RankedItem], seen: set[str]) -> list[RankedItem]:
            kept = [item for item in allowed if item.item_id not in seen][: request.k]
            return [item.model_copy(update={"rank": rank}) for rank, item in enumerate(kept, start=1)]

        results = []
        for user_id, history in zip(request.users, histories, strict=True):
            seen = {*history, *request.recent.get(user_id, [])} if request.exclude_seen else set()
            results.append(
                UserRecommendations(
                    user_id=user_id,
                    cold=True,
                    method="static",
                    reason=reason,
                    model_version=self.model_version,
                    debias=debias,
                    items=without(items, seen),
                    factual=without(factual, seen) if request.compare else None,
                )
            )
        return RecommendResponse(model_version=self.model_version, debias=debias, results=results)

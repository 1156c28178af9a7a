"""A challenger on trial beside the champion: on a share of the users (canary), or on none of them, for comparison (shadow).

A user belongs to the share by a hash of his id and the challenger's fingerprint: the same user is always answered by the same
model, a larger share holds everybody of a smaller one, and the next challenger is tried on others.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import structlog

from serving.lifecycle import Live
from serving.recommender import Question
from serving.schemas import RecommendResponse, UserRecommendations
from serving.settings import Trial

MAX_WAITING = 16  # comparisons that may wait; more are left out and counted, as they must not hold up answers

_STANDARDISED = ("personalised", "fold_in", "popularity")  # methods whose scores are in standard deviations

log = structlog.get_logger()


class Part(NamedTuple):
    """Those users of a question whom one model answers."""

    model: Live
    places: Sequence[int]
    """Of these users among the question's."""
    question: Question
    """For these users alone."""


def parts(trial: Trial, champion: Live, challenger: Live | None, question: Question) -> list[Part]:
    """A question as each model is asked it, the champion first: a canary for its share, where it knows what is filtered by."""
    users = range(len(question.request.users))
    if challenger is None or trial.mode != "canary" or not challenger.recommender.filters.know(question.request.filters):
        return [Part(champion, users, question)]
    tried = share(trial, challenger, question)
    others = sorted(set(users).difference(tried))
    split = ((champion, others), (challenger, tried))
    return [Part(model, places, narrowed(question, places)) for model, places in split if places]


def model_of(trial: Trial, champion: Live, challenger: Live | None, user_id: str) -> Live:
    """Which model answers a user whose question has no filters."""
    if challenger is None or trial.mode != "canary" or not trial.holds(user_id, challenger.target.fingerprint):
        return champion
    return challenger


def share(trial: Trial, challenger: Live, question: Question) -> list[int]:
    """Which users of a question belong to the challenger's share, by their places."""
    return [at for at, user in enumerate(question.request.users) if trial.holds(user, challenger.target.fingerprint)]


def narrowed(question: Question, places: Sequence[int]) -> Question:
    """The question for some of its users."""
    request, histories, profiles = question
    if len(places) == len(request.users):
        return question
    users = [request.users[at] for at in places]
    kept = set(users)
    recent = {user_id: items for user_id, items in request.recent.items() if user_id in kept}
    asked = request.model_copy(update={"users": users, "recent": recent})
    return Question(asked, [histories[at] for at in places], profiles)


def joined(answers: Sequence[tuple[Sequence[int], RecommendResponse]]) -> RecommendResponse:
    """Answers to the parts of a request as one, whose version and debias strength are the first's."""
    if len(answers) == 1:
        return answers[0][1]
    results: dict[int, UserRecommendations] = {}
    for places, answer in answers:
        results |= zip(places, answer.results, strict=True)
    return answers[0][1].model_copy(update={"results": [results[at] for at in sorted(results)]})


class Told(Protocol):
    """Who is told how the two differ."""

    def compared(self, model_version: str, overlap: float, difference: float | None) -> None:
        """One user's rankings: the share of the items that both name, and how far their scores for these lie apart,
        where that can be said."""
        ...

    def left_out(self, model_version: str) -> None:
        """A request that a challenger had no part in: too many comparisons waited, or it does not know a filter."""
        ...


class Shadow:
    """Compares a challenger's rankings with the ones that were answered, in a thread of its own.

    Args:
        told: who is told.
    """

    def __init__(self, told: Told) -> None:
        self._told = told
        self._room = threading.BoundedSemaphore(MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shadow")

    def compare(self, challenger: Live, question: Question, answer: RecommendResponse) -> None:
        """Does so later, or not at all."""
        if not self._room.acquire(blocking=False):
            self._told.left_out(challenger.target.model_version)
            return
        self._thread.submit(self._compare, challenger, question, answer).add_done_callback(self._done)

    def _compare(self, challenger: Live, question: Question, answer: RecommendResponse) -> None:
        if not challenger.recommender.filters.know(question.request.filters):
            self._told.left_out(challenger.target.model_version)
            return
        other = challenger.recommender.recommend(*question)
        for ours, theirs in zip(answer.results, other.results, strict=True):
            self._told.compared(challenger.target.model_version, *difference(ours, theirs))

    def _done(self, comparison: "Future[None]") -> None:
        self._room.release()
        if error := comparison.exception():
            log.error("challenger cannot be compared", error=type(error).__name__, reason=str(error))


def difference(ours: UserRecommendations, theirs: UserRecommendations) -> tuple[float, float | None]:
    """Overlap@k, 0 to 1, and the mean absolute difference of the scores of items in both.

    None in place of the latter where there are none, and where the two do not score in the same standard deviations: by
    different methods, or by ones that compare texts.
    """
    first, second = ({item.item_id: item.score for item in ranking.items} for ranking in (ours, theirs))
    shared = first.keys() & second.keys()
    overlap = len(shared) / max(len(first), len(second), 1)
    is_comparable = ours.method == theirs.method and ours.method in _STANDARDISED
    apart = [abs(first[item_id] - second[item_id]) for item_id in shared if is_comparable]
    return overlap, float(np.mean(apart)) if apart else None

"""From a request and a bundle to an answer: ids in, ids and titles out. Pure: no Ray, no HTTP, no feature store.

The caller passes each user's history (recent item ids from the feature store, or none), and the side information of those who
have none; what counts as seen is the history and the training interactions in the bundle.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from components.cllmr.linear.kernel import NewItems
from components.cllmr.linear.newcomers import Newcomers
from components.ids import UNKNOWN
from serving.approximate import Exactness, ItemIndex
from serving.attributes import Attributes, Filters
from serving.degrade import NO_HISTORY, UNKNOWN_USER, Ladder, Listed, Query, Rung, Static
from serving.features import Profiles
from serving.lists import RankedLists
from serving.ranking import Candidates, Floats, Ranking, rank_of, top_k
from serving.schemas import (
    ExplainRequest,
    ExplainResponse,
    Explanation,
    ItemScore,
    ItemsRequest,
    ItemsResponse,
    ModelInfo,
    Neighbour,
    NewItemAnswer,
    NewItemScore,
    RankedItem,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
    UserRecommendations,
)
from serving.scorer import Scorer
from serving.texts import Texts

UNKNOWN_ITEM = "unknown_item"
COMPARED_PRODUCTS = 256
"""Products of an item and user that take as long as ranks among all items in two rankings do."""
SCORES_AT_ONCE = 1 << 22  # of a block of users and all items: 16 MiB, whatever a batch and a catalogue are

_NO_ROWS = np.empty(0, dtype=np.int64)
_RANKED_ITEMS = TypeAdapter(list[RankedItem])  # makes those of a ranking at once, which takes half as long as one by one


class Question(NamedTuple):
    """A request, and what is known of its users."""

    request: RecommendRequest
    histories: Sequence[Sequence[str]]
    """Recent item ids of each of its users."""
    profiles: Profiles | None = None
    """Side information of those who have none."""


@dataclass(frozen=True, eq=False)
class _Task:
    """One user of one request."""

    request: RecommendRequest
    user_id: str
    query: Query
    rung: Rung
    reason: str | None
    strength: float
    candidates: Candidates


class Recommender:
    """Answers the API's questions from one bundle.

    Args:
        scorer: the bundle.
        model_version: what the answers call it.
        texts: of the bundle's items, where they are at hand.
        index: finds the best items of the debiased ranking without looking at all; None: all are looked at.
        exactness: what was measured of `scorer`, `index` and `lists`.
        lists: rankings that are ready; None: there are none.
        attributes: what the bundle's items can be filtered by; None: nothing.
        newcomers: answers users of whom a text alone is known; None: the bundle cannot.
    """

    def __init__(
        self,
        scorer: Scorer,
        model_version: str,
        texts: Texts | None = None,
        index: ItemIndex | None = None,
        exactness: Exactness = Exactness(),  # noqa: B008  # frozen
        lists: RankedLists | None = None,
        attributes: Attributes | None = None,
        newcomers: Newcomers | None = None,
    ) -> None:
        self.exactness = exactness
        self._index, self._lists = index, lists
        self.scorer = scorer
        self.model_version = model_version
        self._attributes = attributes or Attributes(scorer.num_items, {})
        self.filters = Filters(self._attributes)
        self._feature_set = scorer.bundle.get("feature_fingerprint")
        self._ladder = Ladder.of(scorer, texts, newcomers)

    def take(self, lists: RankedLists | None, exactness: Exactness) -> None:
        """Answers by these lists from now on."""
        self._lists, self.exactness = lists, exactness

    def recommend(
        self, request: RecommendRequest, histories: Sequence[Sequence[str]], profiles: Profiles | None = None
    ) -> RecommendResponse:
        """Rankings for `request.users`, see `Question`.

        Raises:
            FilterError: `request.filters` names what the items do not have.
        """
        return self.recommend_all([Question(request, histories, profiles)])[0]

    def recommend_all(self, asked: Sequence[Question]) -> list[RecommendResponse]:
        """Answers to several requests: see `recommend`; scores of all that want the same strength come from one product."""
        tasks = [task for question in asked for task in self._tasks(*question)]
        at_once = max(1, SCORES_AT_ONCE // self.scorer.num_items)
        blocks = (tasks[start : start + at_once] for start in range(0, len(tasks), at_once))
        results = iter([result for block in blocks for result in self._recommend(block)])
        return [
            RecommendResponse(
                model_version=self.model_version,
                debias=self._strength(request.debias),
                results=list(islice(results, len(request.users))),
            )
            for request, *_ in asked
        ]

    def products(self, question: Question) -> int:
        """How many numbers are multiplied to answer, or could be while other work is done."""
        request, per_user = question.request, self.scorer.products_per_user
        strengths = [self._strength(request.debias)]
        if request.compare:
            per_user, strengths = 2 * per_user + COMPARED_PRODUCTS * self.scorer.num_items, [*strengths, 0.0]
        total = len(request.users) * per_user
        for user_id, history in zip(request.users, question.histories, strict=True):
            user, further = self.scorer.user(user_id), len(request.recent.get(user_id, []))
            if user == UNKNOWN:  # of others the stored history shapes no score
                further += len(history)
            total += sum(self.scorer.history_products(user, further, strength) for strength in strengths)
        return total

    def refused(self, question: Question) -> int:
        """Users whose side information is of another feature set than the bundle: it may be of another encoder."""
        profiles = question.profiles
        if profiles is None or profiles.feature_set == self._feature_set:
            return 0
        return sum(user_id in profiles.embeddings for user_id in question.request.users)

    def _tasks(
        self, request: RecommendRequest, histories: Sequence[Sequence[str]], profiles: Profiles | None = None
    ) -> Iterator["_Task"]:
        allow = None if request.allow is None else self.scorer.item_vocabulary.rows(request.allow)
        denied, matching = self.scorer.item_vocabulary.rows(request.deny), self.filters.matching(request.filters)
        filtered = self.scorer.candidates(allow=allow, deny=denied, matching=matching)
        texts = profiles.embeddings if profiles is not None and profiles.feature_set == self._feature_set else {}
        for user_id, history in zip(request.users, histories, strict=True):
            user, recent = self.scorer.user(user_id), request.recent.get(user_id, [])
            text = texts.get(user_id)
            query = Query(user, self._known([*history, *recent]), self._known(recent), text)
            candidates = filtered
            if request.exclude_seen:
                candidates = candidates.without(query.history)
                candidates = candidates if user == UNKNOWN else candidates.without(self.scorer.seen(user))
            yield _Task(request, user_id, query, *self._ladder.rung(query), self._strength(request.debias), candidates)

    def _recommend(self, tasks: Sequence["_Task"]) -> Iterator[UserRecommendations]:
        quick = [self._quick(task) for task in tasks]
        slow = [task for task, ranking in zip(tasks, quick, strict=True) if ranking is None]
        answers = iter(self._exact(slow))
        for task, ranking in zip(tasks, quick, strict=True):
            items, factual = next(answers) if ranking is None else (self._ranked(ranking), None)
            yield UserRecommendations(
                user_id=task.user_id,
                model_version=self.model_version,
                debias=task.strength,
                cold=task.query.user == UNKNOWN,
                method=task.rung.method,
                reason=task.reason,
                items=items,
                factual=factual,
            )

    def _quick(self, task: "_Task") -> Ranking | None:
        """What the lists or the index answer, where there are any and they hold what is asked for."""
        request, user = task.request, task.query.user
        plain = task.strength == self.scorer.debias_strength and not request.compare and request.allow is None
        if not plain or task.rung.method != "personalised" or task.query.recent.size:
            return None
        ranking = None
        if self._lists is not None and request.exclude_seen:
            ranking = self._lists.ranking(user, request.k, task.candidates)
        if ranking is None and self._index is not None:
            ranking = self._index.ranking(user, request.k, task.candidates)
        return ranking

    def _exact(self, tasks: Sequence["_Task"]) -> Iterator[tuple[list[RankedItem], list[RankedItem] | None]]:
        """The debiased and, where it is asked for, the factual ranking of each task."""
        # where there is nothing to debias both rankings are the same
        compared = [task for task in tasks if task.request.compare and task.rung.debiases]
        found = self._scores([(task, task.strength) for task in tasks] + [(task, 0.0) for task in compared])
        without = iter(found[len(tasks) :])
        for task, debiased in zip(tasks, found, strict=False):
            if task in compared:
                yield self._compare(debiased, next(without), task.request.k, task.candidates)
            else:
                items = self._ranked(top_k(debiased, task.request.k, task.candidates))
                yield items, items if task.request.compare else None

    def _scores(self, wanted: Sequence[tuple["_Task", float]]) -> list[Floats]:
        """Scores of all items for each task and strength."""
        found: dict[int, Floats] = {}
        together: dict[float, list[int]] = defaultdict(list)
        for place, (task, strength) in enumerate(wanted):
            if task.rung.method == "personalised":
                together[strength].append(place)
            else:
                found[place] = task.rung.scores(task.query, strength)
        for strength, places in together.items():
            queries = [wanted[place][0].query for place in places]
            users, recent = np.array([query.user for query in queries]), [query.recent for query in queries]
            found.update(zip(places, self.scorer.score_users(users, strength, recent), strict=True))
        return [found[place] for place in range(len(wanted))]

    def _compare(
        self, debiased: Floats, factual: Floats, k: int, candidates: Candidates
    ) -> tuple[list[RankedItem], list[RankedItem]]:
        """The debiased and the factual ranking, every item with its rank in both."""
        rankings = [top_k(scores, k, candidates) for scores in (debiased, factual)]
        rows = np.concatenate([ranking.rows for ranking in rankings])
        ranks = [rank_of(scores, rows, candidates).tolist() for scores in (factual, debiased)]  # one sort each
        items = [
            item.model_copy(update={"factual_rank": before, "debiased_rank": after, "rank_change": before - after})
            for item, before, after in zip(chain.from_iterable(map(self._ranked, rankings)), *ranks, strict=True)
        ]
        return items[: len(rankings[0].rows)], items[len(rankings[0].rows) :]

    def _ranked(self, ranking: Ranking) -> list[RankedItem]:
        ids, titles = self.scorer.item_vocabulary.ids, self.scorer.titles
        return _RANKED_ITEMS.validate_python(
            [
                {"rank": place, "item_id": ids[row], "title": titles[row], "score": score}
                for place, (row, score) in enumerate(zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True), start=1)
            ]
        )

    def score(self, request: ScoreRequest) -> ScoreResponse:
        """Scores of `request.item_ids`; null for an unknown item, and for all items of an unknown user."""
        user, recent = self.scorer.user(request.user_id), self._known(request.recent)
        rows = self.scorer.item_vocabulary.rows(request.item_ids)
        strength = self._strength(request.debias)
        effects = None if user == UNKNOWN else self.scorer.effects(user, np.where(rows == UNKNOWN, 0, rows), strength, recent)
        scores = []
        for place, (item_id, row) in enumerate(zip(request.item_ids, rows.tolist(), strict=True)):
            known = row != UNKNOWN
            scored = effects if known else None
            scores.append(
                ItemScore(
                    item_id=item_id,
                    title=self.scorer.titles[row] if known else None,
                    score=float(scored.debiased[place]) if scored else None,
                    factual=float(scored.total[place]) if scored else None,
                    direct=float(scored.direct[place]) if scored else None,
                    popularity=int(self.scorer.popularity[row]) if known else None,
                )
            )
        return ScoreResponse(
            model_version=self.model_version,
            user_id=request.user_id,
            cold=user == UNKNOWN,
            reason=UNKNOWN_USER if user == UNKNOWN else None,
            debias=strength,
            scores=scores,
            unknown_items=[item_id for item_id, row in zip(request.item_ids, rows.tolist(), strict=True) if row == UNKNOWN],
        )

    def explain(self, request: ExplainRequest, history: Sequence[str]) -> ExplainResponse:
        """The parts of one score, and the user's items that are nearest to the explained one."""
        user = self.scorer.user(request.user_id)
        item = self.scorer.item_vocabulary.row(request.item_id)
        strength = self._strength(request.debias)
        recent = self._known(request.recent)
        seen = self._seen(user, self._known([*history, *request.recent]))
        neighbours: list[Neighbour] = []
        if item != UNKNOWN and seen.size:
            neighbours = self._near(self.scorer.similar_items(item, request.num_neighbours, among=seen))
        reason = UNKNOWN_USER if user == UNKNOWN else UNKNOWN_ITEM if item == UNKNOWN else None
        return ExplainResponse(
            model_version=self.model_version,
            user_id=request.user_id,
            item_id=request.item_id,
            cold=user == UNKNOWN,
            reason=reason,
            debias=strength,
            title=None if item == UNKNOWN else self.scorer.titles[item],
            profile=None if item == UNKNOWN else self.scorer.profiles[item],
            already_seen=bool((seen == item).any()) and item != UNKNOWN,
            explanation=None if reason else self._explanation(user, item, strength, recent),
            nearest_liked_items=neighbours,
        )

    def _explanation(self, user: int, item: int, strength: float, recent: npt.NDArray[np.int64]) -> Explanation:
        effects = self.scorer.effects(user, item, strength, recent)
        everything = self.scorer.candidates()
        row = np.array([item])
        factual_rank, debiased_rank = (
            int(rank_of(self.scorer.score_user(user, value, recent), row, everything)[0]) for value in (0.0, strength)
        )
        total, direct = float(effects.total[0]), float(effects.direct[0])
        return Explanation(
            total_effect=total,
            natural_direct_effect=direct,
            total_natural_indirect_effect=float(effects.indirect[0]),
            removed=strength * direct,
            debiased_score=float(effects.debiased[0]),
            propensity=float(self.scorer.propensity[item]),
            factual_rank=factual_rank,
            debiased_rank=debiased_rank,
        )

    def new_items(
        self,
        request: ItemsRequest,
        histories: Sequence[Sequence[str]],
        encoder: str,
        texts: NewItems,
        embeddings: npt.NDArray[np.floating],
    ) -> ItemsResponse:
        """Scores of `request.items` by their texts.

        Args:
            request: the question.
            histories: `histories[n]` are the recent item ids of `request.users[n]`.
            encoder: its name.
            texts: of the bundle's items.
            embeddings: of the new items' texts, (len(request.items), dim).
        """
        rows = texts.rows(embeddings, [item.text for item in request.items])
        users = [self.scorer.user(user_id) for user_id in request.users]
        places = []
        for user_id, user, history in zip(request.users, users, histories, strict=True):
            seen = self._seen(user, self._known([*history, *request.recent.get(user_id, [])]))
            places.append(texts.placed(rows, seen))
        cosines = texts.cosines(rows) if request.num_neighbours else None
        results = []
        for number, item in enumerate(request.items):
            nearest = None if cosines is None else top_k(cosines[number], request.num_neighbours)
            scores = [
                NewItemScore(
                    user_id=user_id,
                    cold=user == UNKNOWN,
                    score=None if place is None else float(place.scores[number]),
                    rank=None if place is None else int(place.ranks[number]),
                    reason=NO_HISTORY if place is None else None,
                )
                for user_id, user, place in zip(request.users, users, places, strict=True)
            ]
            results.append(
                NewItemAnswer(item_id=item.item_id, scores=scores, nearest_items=[] if nearest is None else self._near(nearest))
            )
        return ItemsResponse(model_version=self.model_version, encoder=encoder, results=results)

    def _near(self, ranking: Ranking) -> list[Neighbour]:
        return [
            Neighbour(item_id=self.scorer.item_vocabulary.ids[row], title=self.scorer.titles[row], similarity=cosine)
            for row, cosine in zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True)
        ]

    def popular(self, k: int) -> Static:
        """The k most popular items, for when no model answers."""
        rankings = [top_k(self.scorer.popular(strength), k) for strength in (self.scorer.debias_strength, 0.0)]
        debiased, factual = (Listed(tuple(self._ranked(one)), self._attributes.of(one.rows)) for one in rankings)
        return Static(debiased, factual, self.model_version, self.scorer.debias_strength)

    def describe(self, golden_requests: int) -> ModelInfo:
        """What is being served."""
        bundle = self.scorer.bundle
        return ModelInfo(
            name=self.scorer.name,
            fingerprint=self.scorer.fingerprint,
            num_users=self.scorer.num_users,
            num_items=self.scorer.num_items,
            embedding_dim=int(bundle["embedding_dim"]),
            debias_strength=self.scorer.debias_strength,
            effect=bundle["effect"],
            members=bundle.get("members", {}),
            backbone=bundle.get("backbone"),
            side_encoder=bundle.get("side_encoder"),
            filters=self.filters.described,
            golden_requests=golden_requests,
            **self.exactness.model_dump(),
        )

    def _known(self, item_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows of the items that the bundle knows, ascending and without repeats."""
        if not item_ids:  # most requests bring none, and looking up nothing takes as long as to score a thousand items
            return _NO_ROWS
        rows = np.unique(self.scorer.item_vocabulary.rows(item_ids))
        return rows[rows != UNKNOWN]

    def _seen(self, user: int, history: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Item rows the user interacted with, in training or since."""
        return np.union1d(self.scorer.seen(user), history) if user != UNKNOWN else history

    def _strength(self, debias: float | None) -> float:
        return self.scorer.debias_strength if debias is None else debias

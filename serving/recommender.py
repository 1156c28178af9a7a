"""From a request and a bundle to an answer: ids in, ids and titles out. Pure: no Ray, no HTTP, no feature store.

The caller passes each user's history (recent item ids from the feature store, or none); what counts as seen is that
and the training interactions in the bundle.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from components.cllmr.linear.kernel import NewItems
from components.ids import UNKNOWN
from serving.degrade import NO_HISTORY, UNKNOWN_USER, Ladder, Query, Static
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
from serving.scorer import Floats, Ranking, Scorer, rank_of, top_k
from serving.texts import Texts

UNKNOWN_ITEM = "unknown_item"


class Recommender:
    """Answers the API's questions from one bundle.

    Args:
        scorer: the bundle.
        model_version: what the answers call it.
        texts: of the bundle's items, where they are at hand.
    """

    def __init__(self, scorer: Scorer, model_version: str, texts: Texts | None = None) -> None:
        self.scorer = scorer
        self.model_version = model_version
        self._ladder = Ladder.of(scorer, texts)

    def recommend(self, request: RecommendRequest, histories: Sequence[Sequence[str]]) -> RecommendResponse:
        """Rankings for `request.users`; `histories[n]` are the recent item ids of user n."""
        strength = self._strength(request.debias)
        allow = None if request.allow is None else self.scorer.item_vocabulary.rows(request.allow)
        filtered = self.scorer.candidates(allow=allow, deny=self.scorer.item_vocabulary.rows(request.deny))
        results = [
            self._recommend(user_id, history, request, strength, filtered)
            for user_id, history in zip(request.users, histories, strict=True)
        ]
        return RecommendResponse(model_version=self.model_version, debias=strength, results=results)

    def _recommend(
        self, user_id: str, history: Sequence[str], request: RecommendRequest, strength: float, filtered: npt.NDArray[np.bool_]
    ) -> UserRecommendations:
        user, recent = self.scorer.user_vocabulary.row(user_id), request.recent.get(user_id, [])
        known = [self._known(items) for items in ([*history, *recent], recent)]
        query = Query(user, *known)
        candidates = filtered
        if request.exclude_seen:
            candidates = filtered & self.scorer.candidates(exclude=self._seen(user, query.history))
        rung, reason = self._ladder.rung(query)
        debiased = rung.scores(query, strength)
        items = self._ranked(top_k(debiased, request.k, candidates))
        factual: list[RankedItem] | None = None
        if request.compare and rung.method in ("side_information", "popularity"):
            factual = items  # there is nothing to debias
        elif request.compare:
            items, factual = self._compare(debiased, rung.scores(query, 0.0), request.k, candidates)
        return UserRecommendations(
            user_id=user_id,
            model_version=self.model_version,
            cold=user == UNKNOWN,
            method=rung.method,
            reason=reason,
            items=items,
            factual=factual,
        )

    def _compare(
        self, debiased: Floats, factual: Floats, k: int, candidates: npt.NDArray[np.bool_]
    ) -> tuple[list[RankedItem], list[RankedItem]]:
        """The debiased and the factual ranking, every item with its rank in both."""
        rankings = []
        for scores in (debiased, factual):
            ranking = top_k(scores, k, candidates)
            ranks = [rank_of(other, ranking.rows, candidates).tolist() for other in (factual, debiased)]
            items = zip(self._ranked(ranking), *ranks, strict=True)
            rankings.append(
                [
                    item.model_copy(update={"factual_rank": before, "debiased_rank": after, "rank_change": before - after})
                    for item, before, after in items
                ]
            )
        return rankings[0], rankings[1]

    def _ranked(self, ranking: Ranking) -> list[RankedItem]:
        ids, titles = self.scorer.item_vocabulary.ids, self.scorer.titles
        return [
            RankedItem(rank=place, item_id=ids[row], title=titles[row], score=score)
            for place, (row, score) in enumerate(zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True), start=1)
        ]

    def score(self, request: ScoreRequest) -> ScoreResponse:
        """Scores of `request.item_ids`; null for an unknown item, and for all items of an unknown user."""
        user = self.scorer.user_vocabulary.row(request.user_id)
        rows = self.scorer.item_vocabulary.rows(request.item_ids)
        strength = self._strength(request.debias)
        effects = None if user == UNKNOWN else self.scorer.effects(user, np.where(rows == UNKNOWN, 0, rows), strength)
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
        user = self.scorer.user_vocabulary.row(request.user_id)
        item = self.scorer.item_vocabulary.row(request.item_id)
        strength = self._strength(request.debias)
        seen = self._seen(user, self._known(history))
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
            explanation=None if reason else self._explanation(user, item, strength),
            nearest_liked_items=neighbours,
        )

    def _explanation(self, user: int, item: int, strength: float) -> Explanation:
        effects = self.scorer.effects(user, item, strength)
        everything = self.scorer.candidates()
        row = np.array([item])
        factual_rank, debiased_rank = (
            int(rank_of(self.scorer.score_all(np.array([user]), value)[0], row, everything)[0]) for value in (0.0, strength)
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
        rows = texts.rows(embeddings)
        users = [self.scorer.user_vocabulary.row(user_id) for user_id in request.users]
        places = []
        for user_id, user, history in zip(request.users, users, histories, strict=True):
            seen = self._seen(user, self._known([*history, *request.recent.get(user_id, [])]))
            places.append(texts.placed(rows, seen))
        cosines = texts.cosines(rows) if request.num_neighbours else None
        everything = self.scorer.candidates()
        results = []
        for number, item in enumerate(request.items):
            nearest = None if cosines is None else top_k(cosines[number], request.num_neighbours, everything)
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
        ranking = top_k(self.scorer.popularity.astype(np.float32), k, self.scorer.candidates())
        return Static(tuple(self._ranked(ranking)), self.model_version)

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
            golden_requests=golden_requests,
        )

    def _known(self, item_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows of the items that the bundle knows, ascending and without repeats."""
        rows = np.unique(self.scorer.item_vocabulary.rows(item_ids))
        return rows[rows != UNKNOWN]

    def _seen(self, user: int, history: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Item rows the user interacted with, in training or since."""
        return np.union1d(self.scorer.seen(user), history) if user != UNKNOWN else history

    def _strength(self, debias: float | None) -> float:
        return self.scorer.debias_strength if debias is None else debias

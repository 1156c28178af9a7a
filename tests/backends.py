"""What answers the HTTP API in tests: the recommender in their own process, without Ray and Feast."""

from dataclasses import replace
from typing import Any

import numpy as np

from components.cllmr.linear.kernel import NewItems
from serving.features import FeatureSource, Histories, NoFeatures, Profiles
from serving.recommender import Recommender
from serving.schemas import (
    EventsRequest,
    EventsResponse,
    ExplainRequest,
    ExplainResponse,
    ItemsRequest,
    ItemsResponse,
    ModelResponse,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)


class LocalBackend:
    """The recommender in this process, and a switch to make it fail."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender
        self.model_version = recommender.model_version
        self.features: FeatureSource = NoFeatures()
        self.failure: Exception | None = None
        self.told: dict[str, list[str]] = {}

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def recommend(
        self, request: RecommendRequest, histories: list[list[str]], profiles: Profiles | None = None
    ) -> RecommendResponse:
        self._check()
        return self.recommender.recommend(request, histories, profiles)

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        self._check()
        return self.recommender.score(request)

    async def explain(self, request: ExplainRequest, history: list[str]) -> ExplainResponse:
        self._check()
        return self.recommender.explain(request, history)

    async def model(self) -> ModelResponse:
        self._check()
        return ModelResponse(
            model_version=self.recommender.model_version,
            deployed_version="6",
            model=self.recommender.describe(golden_requests=3),
            features=self.features.state(),
        )

    async def histories(self, user_ids: list[str]) -> Histories:
        found = await self.features.histories(user_ids)
        events = [self.told.get(user_id, []) for user_id in user_ids]
        ages = [age or ("fresh" if since else None) for age, since in zip(found.ages, events, strict=True)]
        return replace(found, events=events, ages=ages)

    async def items(self, request: ItemsRequest, histories: list[list[str]]) -> ItemsResponse:
        self._check()
        texts = NewItems.of(np.eye(4, 3, dtype=np.float32), power=2.0)
        return self.recommender.new_items(request, histories, "MiniLM", texts, np.ones((len(request.items), 3)))

    async def events(self, request: EventsRequest) -> EventsResponse:
        self._check()
        for event in request.events:
            self.told.setdefault(event.user_id, []).append(event.item_id)
        statuses: list[Any] = ["stored"] * len(request.events)
        return EventsResponse(
            model_version=self.recommender.model_version, stored=len(statuses), statuses=statuses, unknown_items=[]
        )

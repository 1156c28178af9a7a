"""What answers the HTTP API's questions, and how it says that it cannot: known to the API and to its backends, without HTTP."""

from typing import Protocol

from serving.features import Histories, Profiles
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


class Unavailable(Exception):
    """The backend cannot answer now; a client may try again.

    Args:
        code: what it is: "overloaded", "scorer_unavailable".
        message: one line for the caller.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Impossible(Exception):
    """What is asked for cannot be done by this endpoint, now or later.

    Args:
        code: what is missing: "no_feature_store".
        message: one line for the caller.
        hint: what to do about it.
    """

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


class Backend(Protocol):
    """What answers the API's questions; every method but `histories` may raise Unavailable."""

    model_version: str
    """Of the latest answer: what errors and pages carry, which no model gave."""

    async def histories(self, user_ids: list[str]) -> Histories:
        """Recent items of some users, and what they did since, as far as the feature store answers in time."""
        ...

    async def recommend(
        self, request: RecommendRequest, histories: list[list[str]], profiles: Profiles | None = None
    ) -> RecommendResponse:
        """See Recommender."""
        ...

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Recommender."""
        ...

    async def explain(self, request: ExplainRequest, history: list[str]) -> ExplainResponse:
        """See Recommender."""
        ...

    async def events(self, request: EventsRequest) -> EventsResponse:
        """Writes events to the online history; raises Impossible where there is no feature store."""
        ...

    async def items(self, request: ItemsRequest, histories: list[list[str]]) -> ItemsResponse:
        """See Recommender.new_items; raises Impossible where the model has no texts, or their encoder is not installed."""
        ...

    async def model(self) -> ModelResponse:
        """The bundle, and the state of the feature store."""
        ...

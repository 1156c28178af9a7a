"""What a gateway answers when no scorer does: what was popular when one last did."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ray.serve.context import _get_serve_request_context, _set_request_context
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serving.attributes import Attributes
from serving.backend import Answered, RayBackend
from serving.breaker import Breaker
from serving.contract import Unavailable
from serving.degrade import Listed, Static
from serving.features import BREAKER_FAILURES, BREAKER_SECONDS, NoFeatures
from serving.metrics import GatewayMetrics
from serving.ranking import Floats
from serving.recommender import Recommender
from serving.schemas import ItemsRequest, NewItem, RecommendRequest, ScoreRequest
from serving.scorer import Scorer
from tests.bundles import write_bundle


class Method:
    """A method of a handle."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.failure: Exception | None = None
        self.hangs = False
        self.asked = 0
        self.asked_for = ""
        """The request of Serve's that is told to have asked last: with it this one is cancelled."""
        self.takes = 0.0
        self.took: float | None = None
        self.by = ["7"]
        """Who answers, in turn; the first one is the champion."""

    async def remote(self, *arguments: Any) -> Any:
        self.asked += 1
        self.asked_for = _get_serve_request_context()._internal_request_id
        if self.hangs:
            await asyncio.Event().wait()
        await asyncio.sleep(self.takes)
        if self.failure is not None:
            raise self.failure
        return Answered(self.answer(*arguments), self.by[self.asked % len(self.by)], None, self.by[0], self.took)


class Handle:
    """A scorer's handle."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommend = Method(lambda *asked: recommender.recommend(*asked).model_dump_json())
        self.popular = Method(recommender.popular)
        self.score = Method(recommender.score)
        self.text_encoder = Method(lambda: "tiny")
        self.new_items = Method(lambda *asked: None)


@pytest.fixture
def handle(tmp_path_factory: pytest.TempPathFactory) -> Handle:
    directory = write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")
    return Handle(Recommender(Scorer.load(directory), "7"))


class Encoder:
    """A handle to a text encoder."""

    @property
    def encode(self) -> "Encoder":
        return self

    async def remote(self, encoder: str, texts: list[str]) -> Floats:
        return np.zeros((len(texts), 2), dtype=np.float32)


def backend(handle: Any, waited: Callable[[float], None] = lambda seconds: None) -> RayBackend:
    return RayBackend(handle, NoFeatures(), "7", None, Encoder(), GatewayMetrics(), waited)  # type: ignore[arg-type]


REQUEST = RecommendRequest(users=["ann", "new"], k=3)
GONE = DeploymentUnavailableError("no replica")


def test_when_no_scorer_answers_what_was_popular_is_and_says_so(handle: Handle) -> None:
    async def ask() -> None:
        asked = backend(handle)
        before = await asked.recommend(REQUEST, [[], []])
        assert {result.method for result in before.results} == {"personalised", "popularity"}
        await asyncio.sleep(0.01)  # what is popular is asked for beside the answer
        handle.recommend.failure = GONE
        ann, new = (await asked.recommend(REQUEST, [["i2"], []])).results
        assert (ann.method, ann.reason, [item.item_id for item in ann.items]) == (
            "static",
            "scorer_unavailable",
            ["i0", "i1", "i3"],
        )
        assert [item.item_id for item in new.items] == ["i0", "i2", "i1"]
        handle.recommend.failure = None
        assert (await asked.recommend(REQUEST, [[], []])) == before
        assert handle.popular.asked == 1

    asyncio.run(ask())


def test_how_long_questions_wait_for_each_other_at_the_scorer_is_told(handle: Handle) -> None:
    async def ask() -> list[float]:
        told: list[float] = []
        asked = backend(handle, told.append)
        handle.recommend.takes = 0.1
        for handle.recommend.took in (0.0, 0.2, None):
            await asked.recommend(REQUEST, [[], []])
        return told

    waited, none = asyncio.run(ask())
    assert (waited >= 0.1, none) == (True, 0.0)


def test_what_is_asked_for_everybody_is_not_cancelled_with_the_request_that_came_first(handle: Handle) -> None:
    async def ask() -> None:
        _set_request_context(_internal_request_id="first")
        await backend(handle).recommend(REQUEST, [[], []])
        await asyncio.sleep(0.01)
        assert (handle.recommend.asked_for, handle.popular.asked_for) == ("first", "")

    asyncio.run(ask())


def test_while_a_challenger_is_tried_the_champion_is_asked_once_for_what_is_popular(handle: Handle) -> None:
    async def ask() -> None:
        asked, told = backend(handle), []
        handle.recommend.by = ["7", "8"]
        for _ in range(6):
            await asked.recommend(REQUEST, [[], []])
            told.append(asked.model_version)
            await asyncio.sleep(0.01)
        assert (told, handle.popular.asked) == (["8", "7"] * 3, 1)

    asyncio.run(ask())


def test_an_overload_is_told_and_so_is_a_scorer_that_has_never_answered(handle: Handle) -> None:
    async def ask() -> None:
        asked = backend(handle)
        handle.recommend.failure, nothing = GONE, Listed((), Attributes(0, {}))
        with pytest.raises(Unavailable, match="no scorer replica answers"):
            await asked.recommend(REQUEST, [[], []])
        asked._static = Static(nothing, nothing, "7", 0.0)
        handle.recommend.failure = BackPressureError(num_queued_requests=4, max_queued_requests=4)
        with pytest.raises(Unavailable, match="too many requests are waiting"):
            await asked.recommend(REQUEST, [[], []])

    asyncio.run(ask())


def test_scorers_that_let_everybody_wait_are_left_alone_and_tried_again_by_one_request(
    handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.backend.SCORER_DEADLINE_SECONDS", 0.01)
    now = 0.0

    async def ask() -> None:
        nonlocal now
        asked = backend(handle)
        asked._breaker = Breaker(BREAKER_FAILURES, BREAKER_SECONDS, clock=lambda: now)
        before = await asked.recommend(REQUEST, [[], []])
        await asyncio.sleep(0.01)
        handle.recommend.hangs = handle.score.hangs = True
        for _ in range(BREAKER_FAILURES + 3):
            answer = await asked.recommend(REQUEST, [[], []])
            assert {(result.method, result.reason) for result in answer.results} == {("static", "scorer_timeout")}
        with pytest.raises(Unavailable, match=r"no scorer has answered within 0\.01 s of late"):
            await asked.score(ScoreRequest(user_id="ann", item_ids=["i0"]))
        assert (handle.recommend.asked, handle.score.asked) == (1 + BREAKER_FAILURES, 0)
        handle.recommend.hangs = handle.score.hangs = False
        now += BREAKER_SECONDS
        assert await asked.recommend(REQUEST, [[], []]) == before
        assert (await asked.score(ScoreRequest(user_id="ann", item_ids=["i0"]))).scores

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("failure", "code"),
    [(BackPressureError(num_queued_requests=4, max_queued_requests=4), "overloaded"), (GONE, "scorer_unavailable")],
)
def test_scorers_that_refuse_at_once_are_asked_all_the_same(handle: Handle, failure: Exception, code: str) -> None:
    """They hold nobody up; and who is told of an overload comes back, where a timeout would have had a poorer answer."""

    async def ask() -> None:
        asked = backend(handle)
        handle.score.failure = failure
        for _ in range(BREAKER_FAILURES + 1):
            with pytest.raises(Unavailable) as told:
                await asked.score(ScoreRequest(user_id="ann", item_ids=["i0"]))
            assert told.value.code == code
        handle.score.failure = None
        assert (await asked.score(ScoreRequest(user_id="ann", item_ids=["i0"]))).scores

    asyncio.run(ask())


def test_what_is_popular_is_asked_for_again_of_every_model_that_takes_over(handle: Handle) -> None:
    async def ask() -> None:
        asked = backend(handle)
        for version in ("7", "8", "9"):
            handle.recommend.by = handle.popular.by = [version]
            await asked.recommend(REQUEST, [[], []])
            await asyncio.sleep(0.01)
        assert handle.popular.asked == 3

    asyncio.run(ask())


def test_scorers_that_let_new_items_wait_are_not_left_alone(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.backend.SCORER_DEADLINE_SECONDS", 0.01)

    async def ask() -> None:
        asked = backend(handle)
        before = await asked.recommend(REQUEST, [[], []])
        handle.new_items.hangs = True
        new = ItemsRequest(items=[NewItem(item_id="new", text="a text")])
        waited = await asyncio.gather(*(asked.items(new, []) for _ in range(BREAKER_FAILURES)), return_exceptions=True)
        assert [getattr(error, "code", error) for error in waited] == ["scorer_timeout"] * BREAKER_FAILURES
        assert await asked.recommend(REQUEST, [[], []]) == before

    asyncio.run(ask())

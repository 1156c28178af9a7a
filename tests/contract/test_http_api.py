"""The API's contract without a server: every request is answered as the schema says or refused with a 4xx that helps."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from components.errors import ServingError
from serving import api, envelope
from serving.admission import Admission
from serving.api import create_app
from serving.attributes import Attributes
from serving.auth import Tokens
from serving.callers import Callers
from serving.client import Client
from serving.contract import Impossible, Unavailable
from serving.features import Histories
from serving.identity import Identities
from serving.limits import Limiter
from serving.recommender import Recommender
from serving.refusals import MAX_BODY_BYTES, MAX_DEPTH, depth_of
from serving.room import Room
from serving.schemas import (
    ErrorBody,
    FeaturesState,
    ModelResponse,
    RecommendResponse,
)
from serving.scorer import Scorer
from tests.backends import LocalBackend
from tests.bundles import write_bundle, write_item_columns, write_random_bundle

ROUTES = ("/v1/recommend", "/v1/score", "/v1/explain", "/v1/events")


def test_items_are_filtered_by_their_attributes_and_a_wrong_filter_is_named(http: TestClient) -> None:
    def ask(**filters: Any) -> httpx.Response:
        return http.post("/v1/recommend", json={"users": ["bob"], "exclude_seen": False, "filters": filters})

    def found(**filters: Any) -> list[str]:
        return [item["item_id"] for item in ask(**filters).json()["results"][0]["items"]]

    assert found(genres=["Drama", "Horror"]) == ["i2", "i0"]
    assert found(genres=["Drama", "Horror"], release_year={"min": 1950}) == ["i0"]
    assert found(release_year={"max": 1950}) == ["i2", "i3"]
    error = refused(ask(genre=["Drama"]), 422, "invalid_filter")
    assert (error.message, error.hint) == (
        "filters: items cannot be filtered by 'genre'.",
        "Did you mean 'genres'? Allowed: genres, release_year.",
    )
    assert "'ужасы'" in refused(ask(genres=["ужасы"]), 422, "invalid_filter").message
    refused(ask(genres=[]), 422, "invalid_request")
    refused(ask(release_year={}), 422, "invalid_request")
    listed = http.get("/v1/model").json()["model"]["filters"]
    assert listed["genres"]["values"] == ["Comedy", "Drama", "Horror", "Sci-Fi"]
    assert (listed["release_year"]["min"], listed["release_year"]["max"]) == (1941, 1985)


class Silent:
    """A feature store that is down."""

    async def histories(self, user_ids: Any) -> Histories:
        return Histories([[] for _ in user_ids], "features_timeout")

    def state(self) -> FeaturesState:
        return FeaturesState(state="unavailable", reason="ConnectionError: refused")


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    directory = write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")
    genres = ["Horror, Sci-Fi", "Comedy", "Drama", "Comedy"]
    write_item_columns(directory, genres=genres, release_year=["1979", "1985", "1942", "1941"])
    scorer = Scorer.load(directory)
    return Recommender(scorer, model_version="7", attributes=Attributes.read(directory, scorer.num_items))


@pytest.fixture
def backend(recommender: Recommender) -> LocalBackend:
    return LocalBackend(recommender)


@pytest.fixture
def app(backend: LocalBackend) -> FastAPI:
    return create_app(backend)


@pytest.fixture
def http(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def refused(response: httpx.Response, status: int, code: str) -> ErrorBody:
    """The error of a refusal that is complete: code, message, hint and the request id of the header."""
    assert response.status_code == status, response.text
    error = ErrorBody.model_validate_json(response.content)
    assert error.code == code
    assert error.message
    assert error.hint
    assert error.request_id == response.headers["x-request-id"]
    return error


# -- answers ----------------------------------------------------------------------------------------------------------


def test_every_answer_names_the_model_and_the_request(http: TestClient) -> None:
    for response in (
        http.post("/v1/recommend", json={"users": ["ann"]}),
        http.post("/v1/score", json={"user_id": "ann", "item_ids": ["i0"]}),
        http.post("/v1/explain", json={"user_id": "ann", "item_id": "i0"}),
        http.get("/v1/model"),
        http.get("/nowhere"),
    ):
        assert response.headers["x-model-version"] == "7"
        assert len(response.headers["x-request-id"]) == 32
        assert "x-degraded" not in response.headers


def test_an_answer_names_the_model_that_gave_it_and_an_error_the_one_that_answered_last(
    http: TestClient, backend: LocalBackend, recommender: Recommender
) -> None:
    backend.model_version = "9"  # another request was answered by another model meanwhile
    answer = http.post("/v1/recommend", json={"users": ["ann"]})
    assert (answer.headers.get_list("x-model-version"), answer.json()["model_version"]) == (["7"], "7")
    assert http.post("/v1/recommend", json={}).headers.get_list("x-model-version") == ["9"]
    backend.recommender = Recommender(recommender.scorer, "größer")
    assert http.get("/v1/model").headers["x-model-version"] == r"gr\xf6\xdfer"


def test_a_callers_request_id_is_used_when_it_is_a_plain_token(http: TestClient) -> None:
    given_id = http.post("/v1/recommend", json={}, headers={"X-Request-Id": "order-66"})
    assert given_id.json()["request_id"] == "order-66"
    odd = http.post("/v1/recommend", json={}, headers={"X-Request-Id": "no spaces, please"})
    assert len(odd.json()["request_id"]) == 32


def test_blanks_around_an_id_do_not_count_as_in_the_data(http: TestClient, backend: LocalBackend) -> None:
    def answer(route: str, **body: Any) -> Any:
        return http.post(f"/v1/{route}", json=body).json()

    lists = {"allow": ["i0 ", "i2", " i3"], "deny": ["i3  "]}
    (asked,) = answer("recommend", users=["ann  "], recent={" ann": ["i0 "]}, **lists)["results"]
    assert (asked["user_id"], asked["cold"], [item["item_id"] for item in asked["items"]]) == ("ann", False, ["i2"])
    scored = answer("score", user_id=" ann", item_ids=["i0 ", "no one"])
    assert (scored["cold"], scored["unknown_items"]) == (False, ["no one"])
    assert answer("explain", user_id="ann\t", item_id=" i0")["explanation"] is not None
    answer("events", events=[{"user_id": "new ", "item_id": "i0 ", "timestamp": 1}])
    assert backend.told == {"new": ["i0"]}


def test_many_users_are_answered_in_the_order_asked(http: TestClient) -> None:
    response = http.post("/v1/recommend", json={"users": ["bob", "zoe", "ann", "bob"], "k": 1})
    assert response.status_code == 200
    assert [result["user_id"] for result in response.json()["results"]] == ["bob", "zoe", "ann", "bob"]
    assert [result["cold"] for result in response.json()["results"]] == [False, True, False, False]


def test_debias_zero_is_the_factual_ranking(http: TestClient) -> None:
    compared = http.post("/v1/recommend", json={"users": ["ann"], "compare": True, "debias": 1}).json()["results"][0]
    factual = http.post("/v1/recommend", json={"users": ["ann"], "debias": 0}).json()["results"][0]
    order = [(item["item_id"], item["score"]) for item in factual["items"]]
    assert [(item["item_id"], item["score"]) for item in compared["factual"]] == order
    assert [item["item_id"] for item in compared["items"]] != [item for item, _ in order]


def test_the_model_route_describes_the_bundle(http: TestClient) -> None:
    answer = http.get("/v1/model").json()
    assert (answer["model_version"], answer["deployed_version"]) == ("7", "6")
    assert answer["model"]["name"] == "tiny"
    assert (answer["model"]["num_users"], answer["model"]["num_items"], answer["model"]["golden_requests"]) == (3, 4, 3)
    assert answer["features"] == {"state": "not_configured", "reason": None}


def test_a_missing_feature_store_degrades_answers_and_says_so(http: TestClient, backend: LocalBackend) -> None:
    backend.features = Silent()
    response = http.post("/v1/recommend", json={"users": ["bob"]})
    assert response.status_code == 200
    assert response.headers["x-degraded"] == "features_timeout"
    assert [item["item_id"] for item in response.json()["results"][0]["items"]] == ["i0", "i3"]
    assert http.post("/v1/explain", json={"user_id": "ann", "item_id": "i0"}).headers["x-degraded"] == "features_timeout"
    assert http.get("/readyz").json() == {"status": "ok", "reason": "features_unavailable"}
    assert http.get("/v1/model").json()["features"]["reason"] == "ConnectionError: refused"


class Knows:
    """A feature store that gives these histories."""

    def __init__(self, found: Histories) -> None:
        self.found = found

    async def histories(self, user_ids: Any) -> Histories:
        return self.found

    def state(self) -> FeaturesState:
        return FeaturesState(state="ready")


@pytest.mark.parametrize(
    ("found", "told", "header"),
    [
        (Histories([["i1"], []]), ["fresh", None], None),
        (Histories([["i1"], ["i2"]], ages=["stale", "fresh"]), ["stale", "fresh"], None),
        (Histories([["i1"], []], "features_timeout"), ["last_good", None], "features_timeout"),
        (Histories([[], []]), [None, None], None),
    ],
    ids=["fresh", "stale", "last good", "nothing"],
)
def test_every_users_result_says_how_current_his_history_is(
    http: TestClient, backend: LocalBackend, found: Histories, told: list[str | None], header: str | None
) -> None:
    backend.features = Knows(found)
    ranked = http.post("/v1/recommend", json={"users": ["ann", "zoe"]})
    assert [result["history"] for result in ranked.json()["results"]] == told
    assert ranked.headers.get("x-degraded") == header
    items = [{"item_id": name, "text": "A film."} for name in ("new", "newer")]
    scored = http.post("/v1/items", json={"users": ["ann", "zoe"], "items": items}).json()["results"]
    assert [[score["history"] for score in result["scores"]] for result in scored] == [told, told]
    backend.features = Knows(Histories(found.item_ids[:1], found.degraded, ages=found.ages[:1]))
    assert http.post("/v1/explain", json={"user_id": "ann", "item_id": "i0"}).json()["history"] == told[0]
    assert http.post("/v1/score", json={"user_id": "ann", "item_ids": ["i0"]}).json()["history"] == told[0]


def test_what_a_user_did_since_counts_for_a_score_and_its_explanation_as_for_the_ranking(tmp_path: Path) -> None:
    scorer = Scorer.load(write_random_bundle(tmp_path / "bundle"))
    backend = LocalBackend(Recommender(scorer, "7"))
    with TestClient(create_app(backend)) as http:
        before = http.post("/v1/recommend", json={"users": ["u1"], "k": 1, "compare": True}).json()["results"][0]["items"][0]
        backend.told = {"u1": ["i9"]}
        asked = {"users": ["u1"], "k": 1, "compare": True, "exclude_seen": False, "recent": {"u1": ["i30"]}}
        best = http.post("/v1/recommend", json=asked).json()["results"][0]["items"][0]
        assert best["score"] != before["score"]
        about = {"user_id": "u1", "recent": ["i30"]}
        (scored,) = http.post("/v1/score", json={**about, "item_ids": [best["item_id"]]}).json()["scores"]
        explained = http.post("/v1/explain", json={**about, "item_id": best["item_id"]}).json()["explanation"]
    assert scored["score"] == pytest.approx(best["score"], abs=1e-5)
    assert explained["debiased_score"] == pytest.approx(best["score"], abs=1e-5)
    assert (explained["factual_rank"], explained["debiased_rank"]) == (best["factual_rank"], 1)


def test_the_documentation_says_what_the_age_of_a_history_means(app: FastAPI) -> None:
    schemas = app.openapi()["components"]["schemas"]
    for name in ("UserRecommendations", "ScoreResponse", "ExplainResponse", "NewItemScore"):
        described = schemas[name]["properties"]["history"]
        assert described["anyOf"][0]["enum"] == ["fresh", "stale", "last_good"]
        assert "older than its view allows" in described["description"]


def test_health_is_about_the_process_and_readiness_about_the_model(http: TestClient, backend: LocalBackend) -> None:
    backend.failure = Unavailable("scorer_unavailable", "no scorer replica answers.")
    assert http.get("/healthz").json() == {"status": "ok", "reason": None}
    refused(http.get("/readyz"), 503, "scorer_unavailable")


def test_whoever_asks_for_readiness_the_model_is_asked_once_in_a_while(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    answer, of_whom = backend.model, ContextVar("of_whom", default="nobody")

    async def slowly() -> ModelResponse:
        asked.append(time.monotonic())
        assert of_whom.get() == "nobody", "Serve would cancel it with the request that came first"
        await asyncio.sleep(0.1)
        return await answer()

    monkeypatch.setattr(backend, "model", slowly)
    monkeypatch.setattr(api, "READY_SECONDS", 2.0)

    async def strangers() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(backend))
        of_whom.set("the first one")
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as http:
            impatient = asyncio.create_task(http.get("/readyz"))
            await asyncio.sleep(0.05)
            impatient.cancel()
            answers = await asyncio.gather(*(http.get("/readyz") for _ in range(20)))
            backend.failure = Unavailable("scorer_unavailable", "no scorer replica answers.")
            answers.append(await http.get("/readyz"))
            await asyncio.sleep(2)
            return [*answers, *await asyncio.gather(*(http.get("/readyz") for _ in range(20)))]

    answers = asyncio.run(strangers())
    assert [response.status_code for response in answers] == [200] * 21 + [503] * 20
    assert len({refused(response, 503, "scorer_unavailable").request_id for response in answers[21:]}) == 20
    assert len(asked) == 2


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_the_endpoint_cannot_do_is_a_conflict_with_the_way_out(http: TestClient, backend: LocalBackend) -> None:
    backend.failure = Impossible("no_texts", "the model was trained without texts.", "Train again.")
    error = refused(http.post("/v1/items", json={"items": [{"item_id": "new", "text": "A film."}]}), 409, "no_texts")
    assert (error.message, error.hint) == ("the model was trained without texts.", "Train again.")


@pytest.mark.parametrize("text", ["", " \n\t", "x" * 10_001], ids=["empty", "blank", "long"])
def test_a_new_item_needs_a_text_that_can_be_read(http: TestClient, text: str) -> None:
    error = refused(http.post("/v1/items", json={"items": [{"item_id": "new", "text": text}]}), 422, "invalid_request")
    assert error.message.startswith("items.0.text: ")


def test_an_overload_is_a_503_with_retry_after(http: TestClient, backend: LocalBackend) -> None:
    backend.failure = Unavailable("overloaded", "too many requests are waiting.")
    event = {"user_id": "a", "item_id": "b", "timestamp": 1}
    bodies = ({"users": ["a"]}, {"user_id": "a", "item_ids": ["b"]}, {"user_id": "a", "item_id": "b"}, {"events": [event]})
    for route, body in zip(ROUTES, bodies, strict=True):
        response = http.post(route, json=body)
        refused(response, 503, "overloaded")
        assert response.headers["retry-after"] == "1"


def test_more_requests_than_are_worked_on_at_a_time_are_refused_at_once_and_health_is_not(backend: LocalBackend) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()
    answer = backend.recommend

    async def slow(*asked: Any) -> RecommendResponse:
        began.set()
        await go_on.wait()
        return await answer(*asked)

    async def ask() -> None:
        backend.recommend = slow  # type: ignore[method-assign]
        transport = httpx.ASGITransport(create_app(backend, admission=Admission(Room(1))))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.create_task(client.post("/v1/recommend", json={"users": ["ann"]}))
            await began.wait()
            second = await client.post("/v1/recommend", json={"users": ["ann"]})
            assert refused(second, 503, "overloaded").message == "more than 1 at a time were asked."
            assert second.headers["retry-after"] == "1"
            assert (await client.get("/healthz")).status_code == 200
            go_on.set()
            assert (await first).status_code == 200
            assert (await client.post("/v1/recommend", json={"users": ["ann"]})).status_code == 200

    asyncio.run(ask())


def test_a_failure_of_ours_is_a_500_without_details(http: TestClient, backend: LocalBackend) -> None:
    backend.failure = RuntimeError("secret path /etc/shadow")
    response = http.post("/v1/recommend", json={"users": ["ann"]})
    error = refused(response, 500, "internal_error")
    assert "secret" not in error.model_dump_json()


@pytest.mark.parametrize(
    ("route", "body", "told"),
    [
        ("/v1/recommend", {}, "users: Field required"),
        ("/v1/recommend", {"users": []}, "users: List should have at least 1 item"),
        ("/v1/recommend", {"users": ["u"] * 101}, "users: List should have at most 100 items"),
        ("/v1/recommend", {"users": "ann"}, "users: Input should be a valid list"),
        ("/v1/recommend", {"users": [1]}, "users.0: Input should be a valid string"),
        ("/v1/recommend", {"users": [""]}, "users.0: String should have at least 1 character"),
        ("/v1/recommend", {"users": [" "]}, "users.0: an id of blanks alone is none"),
        ("/v1/recommend", {"users": ["u" * 257]}, "users.0: String should have at most 256 characters"),
        ("/v1/recommend", {"users": ["ann"], "recent": {"bob": ["i0"]}}, "recent: it names 1 users that are not in users"),
        (
            "/v1/recommend",
            {"users": ["ann"], "recent": {" ann": ["i0"], "ann": ["i1"]}},
            "recent: a user is there twice, with other blanks around the id",
        ),
        ("/v1/recommend", {"users": ["ann"], "recent": {"ann": ["i"] * 201}}, "recent.ann: List should have at most 200 items"),
        ("/v1/recommend", {"users": ["ann"], "k": 0}, "k: Input should be greater than or equal to 1"),
        ("/v1/recommend", {"users": ["ann"], "k": 201}, "k: Input should be less than or equal to 200"),
        ("/v1/recommend", {"users": ["ann"], "k": 2.5}, "k: Input should be a valid integer"),
        ("/v1/recommend", {"users": ["ann"], "k": "5"}, "k: Input should be a valid integer"),
        ("/v1/recommend", {"users": ["ann"], "debias": 1.01}, "debias: Input should be less than or equal to 1"),
        ("/v1/recommend", {"users": ["ann"], "debias": -0.01}, "debias: Input should be greater than or equal to 0"),
        ("/v1/recommend", {"users": ["ann"], "exclude_seen": "yes"}, "exclude_seen: Input should be a valid boolean"),
        ("/v1/recommend", {"users": ["ann"], "topk": 5}, "topk: Extra inputs are not permitted"),
        ("/v1/recommend", {"users": ["ann"], "deny": ["i"] * 10_001}, "deny: List should have at most 10000 items"),
        (
            "/v1/recommend",
            {"users": ["ann"], "filters": {"year": 1990}},
            'filters.year: a filter is a list of texts, such as ["',
        ),
        (
            "/v1/recommend",
            {"users": ["ann"], "filters": {"year": [1990]}},
            "filters.year.values.0: Input should be a valid string",
        ),
        (
            "/v1/recommend",
            {"users": ["ann"], "filters": {"year": {"min": "a"}}},
            "filters.year.range.min: Input should be a valid",
        ),
        ("/v1/recommend", {"users": ["ann"], "filters": {"жанр": "ужасы"}}, "filters.жанр: a filter is a list of texts"),
        ("/v1/score", {"user_id": "ann", "item_ids": []}, "item_ids: List should have at least 1 item"),
        ("/v1/score", {"user_id": "ann", "item_ids": ["i"] * 1_001}, "item_ids: List should have at most 1000 items"),
        ("/v1/explain", {"user_id": "ann", "item_id": None}, "item_id: Input should be a valid string"),
        ("/v1/explain", {"user_id": "ann", "item_id": "i0", "num_neighbours": 21}, "num_neighbours: Input should be less than"),
    ],
)
def test_an_invalid_request_is_refused_naming_the_field_and_what_is_allowed(
    http: TestClient, route: str, body: dict[str, Any], told: str
) -> None:
    assert refused(http.post(route, json=body), 422, "invalid_request").message.startswith(told)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"[]",
        b"null",
        b'"users"',
        b"\xff\xfe\x00",
        b'{"users": ["\\ud800"]}',
        b'{"\\ud800": 1, "users": ["a"]}',
        b'{"users": ["a"], "debias": NaN}',
        b'{"users": ["a"], "debias": Infinity}',
        b'{"users": ["a"], "debias": 1e999}',
        b'{"users": ["a"], "k": ' + b"9" * 5_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    ],
    ids=lambda body: repr(body[:20]),
)
@pytest.mark.parametrize("route", ROUTES)
def test_a_malformed_body_is_refused(http: TestClient, route: str, body: bytes) -> None:
    response = http.post(route, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    refused(response, response.status_code, "invalid_request" if response.status_code == 422 else "bad_request")


def test_a_body_that_is_too_deep_is_told_how_deep_it_is(http: TestClient) -> None:
    body = b'{"users": ["[[\\"[["], "recent": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    error = refused(http.post("/v1/recommend", content=body, headers={"Content-Type": "application/json"}), 400, "bad_request")
    assert error.message == f"the body is nested 20001 levels deep; at most {MAX_DEPTH} are allowed."
    for schema in http.get("/openapi.json").json()["components"]["schemas"].values():
        assert all(depth_of(json.dumps(example).encode()) <= MAX_DEPTH for example in schema.get("examples", []))
    assert depth_of(b'"[[[' + b'\\"' * 500_000) == 0  # not closed, and read in one go


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "%%%"])
def test_a_body_that_is_not_declared_as_json_is_refused(http: TestClient, content_type: str) -> None:
    response = http.post("/v1/recommend", content=b'{"users": ["ann"]}', headers={"Content-Type": content_type})
    refused(response, 422, "invalid_request")


def test_pages_of_other_hosts_are_allowed_nothing(http: TestClient) -> None:
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for response in (
        http.options("/v1/recommend", headers=origin),
        http.post("/v1/recommend", json={"users": ["ann"]}, headers=origin),
    ):
        assert not [name for name in response.headers if name.startswith("access-control-")]


def test_a_huge_body_is_refused_by_its_announced_size(http: TestClient) -> None:
    refused(http.post("/v1/recommend", content=b" " * (MAX_BODY_BYTES + 1)), 413, "body_too_large")


def test_a_huge_body_is_refused_while_it_streams_in(app: FastAPI) -> None:
    async def send() -> tuple[httpx.Response, int]:
        sent = 0

        async def chunks() -> Any:
            nonlocal sent
            for _ in range(1_000):
                sent += 1 << 16
                yield b" " * (1 << 16)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://endpoint") as client:
            return await client.post("/v1/recommend", content=chunks()), sent

    response, sent = asyncio.run(send())
    refused(response, 413, "body_too_large")
    assert sent <= MAX_BODY_BYTES + (1 << 17)


def test_a_body_that_trickles_in_is_given_up_and_makes_room_for_others(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envelope, "BODY_SECONDS", 2)
    admission = Admission(Room(1))

    async def ask() -> None:
        begun = asyncio.Event()

        async def trickle() -> AsyncIterator[bytes]:
            while True:
                yield b" "
                begun.set()
                await asyncio.sleep(0.05)

        transport = httpx.ASGITransport(create_app(backend, admission=admission))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            slow = asyncio.create_task(client.post("/v1/recommend", content=trickle()))
            await begun.wait()
            refused(await client.post("/v1/recommend", json={"users": ["ann"]}), 503, "overloaded")
            response = await slow  # whole it would never be
            refused(response, 408, "body_too_slow")
            assert response.headers["connection"] == "close"  # or the rest would go on coming in
            assert (await client.post("/v1/recommend", json={"users": ["ann"]})).status_code == 200

    asyncio.run(ask())
    assert admission.working == 0


def test_an_unknown_path_and_a_wrong_method_are_refused_in_the_same_shape(http: TestClient) -> None:
    refused(http.get("/v1/nothing"), 404, "not_found")
    response = http.get("/v1/recommend")
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


IDS = st.sampled_from(["ann", "bob", "zoe", "i0", "i3", "nope", "", "\x00", "💥"]) | st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | IDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["users", "k", "exclude_seen", "debias", "compare", "allow", "deny", "user_id", "item_ids", "item_id", "num_neighbours"]
)
NEARLY_VALID = st.fixed_dictionaries(
    {},
    optional={
        "users": st.lists(IDS, max_size=3) | JSON,
        "user_id": IDS | JSON,
        "item_id": IDS | JSON,
        "item_ids": st.lists(IDS, max_size=3) | JSON,
        "k": st.integers(-2, 300) | JSON,
        "debias": st.floats(-0.5, 1.5) | JSON,
        "compare": st.booleans() | JSON,
        "allow": st.lists(IDS, max_size=3) | JSON,
        "deny": st.lists(IDS, max_size=3),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(route=st.sampled_from(ROUTES), body=NEARLY_VALID | st.dictionaries(FIELDS, JSON, max_size=5) | JSON)
def test_whatever_json_is_sent_is_answered_or_refused_and_never_a_server_error(http: TestClient, route: str, body: Any) -> None:
    response = http.post(route, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 422), response.text
    if response.status_code != 200:
        refused(response, response.status_code, "invalid_request" if response.status_code == 422 else "bad_request")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(route=st.sampled_from(ROUTES), body=st.binary(max_size=200))
def test_whatever_bytes_are_sent_are_refused(http: TestClient, route: str, body: bytes) -> None:
    response = http.post(route, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text


# -- documentation ----------------------------------------------------------------------------------------------------


def test_every_example_of_the_openapi_document_is_answered(http: TestClient) -> None:
    document = http.get("/openapi.json").json()
    asked = 0
    for path, methods in document["paths"].items():
        if "post" in methods:
            reference = methods["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            for example in document["components"]["schemas"][reference.rpartition("/")[2]]["examples"]:
                response = http.post(path, json=example)
                assert response.status_code == 200, (path, example, response.text)
                asked += 1
    assert asked == 8


def test_the_documentation_page_needs_nothing_from_another_host(http: TestClient) -> None:
    page = http.get("/docs").text
    assert "docs/assets/swagger-ui-bundle.js" in page
    assert "https://" not in page
    assert http.get("/docs/assets/swagger-ui-bundle.js").status_code == 200
    assert http.get("/docs/assets/swagger-ui.css").status_code == 200


def test_logs_name_routes_and_request_ids_but_no_users(http: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    from components.progress import configure_logging

    configure_logging()
    response = http.post("/v1/recommend", json={"users": ["bob", "someone-private"]})
    http.post("/v1/recommend", json={"users": ["someone-private"], "debias": "someone-private"})
    captured = capsys.readouterr()
    logged = captured.err + captured.out
    assert response.headers["x-request-id"] in logged
    assert "/v1/recommend" in logged
    assert "someone-private" not in logged


def test_an_error_of_ours_is_logged_with_its_cause(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from components.progress import configure_logging

    async def a_step_that_fails(*asked: object) -> None:
        raise RuntimeError("the cause")

    monkeypatch.setattr(backend, "score", a_step_that_fails)
    configure_logging()
    with TestClient(create_app(backend, known()), raise_server_exceptions=False) as client:
        error = refused(client.post("/v1/score", json={"user_id": "bob", "item_ids": ["i0"]}), 500, "internal_error")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["event"] == "request failed"]
    assert line["request_id"] == error.request_id
    assert "a_step_that_fails" in line["exception"]
    assert "RuntimeError: the cause" in line["exception"]


# -- tokens -----------------------------------------------------------------------------------------------------------

READER, TELLER, ADMIN = "r" * 20, "e" * 20, "a" * 20


def known(tokens: Tokens | None = None, identities: Identities | None = None, most: int | None = None) -> Admission:
    return Admission(None if most is None else Room(most), callers=Callers(tokens or Tokens({}), identities or Identities({})))


@pytest.fixture
def closed(backend: LocalBackend) -> Iterator[TestClient]:
    tokens = Tokens({READER: frozenset({"score"}), TELLER: frozenset({"events"}), ADMIN: frozenset({"admin"})})
    with TestClient(create_app(backend, known(tokens)), raise_server_exceptions=False) as client:
        yield client


def shown(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_token_allows_what_its_scope_says(closed: TestClient) -> None:
    ask = {"users": ["ann"]}
    assert closed.post("/v1/recommend", json=ask, headers=shown(READER)).status_code == 200
    assert closed.get("/v1/model", headers=shown(ADMIN)).status_code == 200
    refused(closed.post("/v1/recommend", json=ask, headers=shown(ADMIN)), 403, "forbidden")
    refused(closed.get("/v1/model", headers=shown(READER)), 403, "forbidden")
    tell = {"events": [{"user_id": "ann", "item_id": "i1", "timestamp": 1}]}
    for token in (TELLER, ADMIN):
        assert closed.post("/v1/events", json=tell, headers=shown(token)).status_code == 200
    told = refused(closed.post("/v1/events", json=tell, headers=shown(READER)), 403, "forbidden")
    assert told.message == "this needs the scope 'events' or 'admin'."
    refused(closed.post("/v1/recommend", json=ask, headers=shown(TELLER)), 403, "forbidden")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": READER},
        {"Authorization": f"Basic {READER}"},
        shown(READER[:-1]),
        {"Authorization": "Bearer"},
    ],
)
@pytest.mark.parametrize("path", [*ROUTES, "/v1/nowhere"])
def test_who_shows_no_known_token_is_refused_before_the_body_is_looked_at(
    closed: TestClient, path: str, headers: dict[str, str]
) -> None:
    response = closed.post(path, content=b"no json", headers=headers)
    refused(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/ui"])
def test_the_root_leads_to_the_page(http: TestClient, path: str) -> None:
    response = http.get(path, follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (307, "ui/")  # relative: also below a proxy's path
    page = http.get(path)
    assert page.url.path == "/ui/"
    assert "text/html" in page.headers["content-type"]


def test_a_slash_too_many_is_an_unknown_path_and_leads_nowhere(http: TestClient) -> None:
    """Where a proxy ends TLS, a redirect would take the question and its token to http."""
    refused(http.post("/v1/recommend/", json={"users": ["ann"]}, follow_redirects=False), 404, "not_found")
    refused(http.get("/readyz/", follow_redirects=False), 404, "not_found")


def test_two_tokens_in_one_request_are_none(closed: TestClient) -> None:
    response = closed.post(
        "/v1/recommend", json={}, headers=[("Authorization", f"Bearer {token}") for token in (READER, ADMIN)]
    )
    refused(response, 401, "unauthorized")


def test_health_and_documentation_need_no_token(closed: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json", "/ui/", "/"):
        assert closed.get(path).status_code == 200
    assert "HTTPBearer" in closed.get("/openapi.json").json()["components"]["securitySchemes"]


def test_a_path_that_is_written_in_another_way_is_no_way_around(closed: TestClient) -> None:
    for path in (
        "/v1//recommend",
        "//v1/recommend",
        "/v1/recommend/",
        "/%76%31/recommend",
        "/V1/recommend",
        "/v1/../v1/recommend",
    ):
        assert closed.post(path, json={"users": ["ann"]}).status_code in (401, 404, 405), path


def test_the_client_shows_its_token(closed: TestClient) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        asked = closed.post(request.url.path, content=request.content, headers=dict(request.headers))
        return httpx.Response(asked.status_code, content=asked.content)

    with Client("http://endpoint", token=READER, transport=httpx.MockTransport(answer)) as client:
        assert client.recommend(["ann"], 1).model_version == "7"
    with (
        Client("http://endpoint", transport=httpx.MockTransport(answer)) as client,
        pytest.raises(ServingError, match="needs a token"),
    ):
        client.recommend(["ann"], 1)


# -- identities -------------------------------------------------------------------------------------------------------


def certified(identity: str) -> dict[str, str]:
    return {"X-Forwarded-Client-Cert": f"Hash=0a1b;URI={identity}"}


def test_an_identity_of_the_proxy_allows_what_its_scope_says_and_may_stand_beside_tokens(backend: LocalBackend) -> None:
    shop, watch = "spiffe://shop", "spiffe://watch"
    identities = Identities({shop: frozenset({"score"}), watch: frozenset({"admin"})})
    ask, limiter = {"users": ["ann"]}, Limiter("2/hour")
    with TestClient(create_app(backend, known(identities=identities), limiter)) as http:
        assert http.post("/v1/recommend", json=ask, headers=certified(shop)).status_code == 200
        assert http.get("/v1/model", headers=certified(watch)).status_code == 200
        refused(http.get("/v1/model", headers=certified(shop)), 403, "forbidden")
        for headers in ({}, certified("spiffe://other"), shown(READER)):
            response = http.post("/v1/recommend", json=ask, headers=headers)
            assert refused(response, 401, "unauthorized").hint == "Ask through the proxy, with a client certificate."
            assert "www-authenticate" not in response.headers
        assert http.get("/healthz").status_code == 200
        assert http.post("/v1/recommend", json=ask, headers=certified(shop)).status_code == 200
        refused(http.post("/v1/recommend", json=ask, headers=certified(shop)), 429, "too_many_requests")
        assert http.get("/v1/model", headers=certified(watch)).status_code == 200  # a caller of its own
    with TestClient(create_app(backend, known(Tokens({READER: frozenset({"score"})}), identities))) as http:
        for headers in (shown(READER), certified(shop)):
            assert http.post("/v1/recommend", json=ask, headers=headers).status_code == 200
        response = http.post("/v1/recommend", json=ask)
        refused(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"


# -- rates --------------------------------------------------------------------------------------------------------------


def test_who_asks_too_much_is_told_when_to_come_back_and_others_are_answered(backend: LocalBackend) -> None:
    tokens = Tokens({READER: frozenset({"score"}), ADMIN: frozenset({"score"})})
    ask = {"users": ["ann"]}
    with TestClient(create_app(backend, known(tokens), Limiter("3/minute"))) as http:
        assert [http.post("/v1/recommend", json=ask, headers=shown(READER)).status_code for _ in range(3)] == [200] * 3
        response = http.post("/v1/recommend", json=ask, headers=shown(READER))
        error = refused(response, 429, "too_many_requests")
        assert error.message == "more than 3/minute were asked."
        assert 50 <= int(response.headers["retry-after"]) <= 60
        assert http.post("/v1/recommend", json=ask, headers=shown(ADMIN)).status_code == 200
        assert [http.get("/healthz").status_code for _ in range(5)] == [200] * 5


def test_a_stranger_counts_against_nobody(backend: LocalBackend) -> None:
    ask, limiter = {"users": ["ann"]}, Limiter("1/hour")
    with TestClient(create_app(backend, known(Tokens({READER: frozenset({"score"})}), most=1), limiter)) as http:
        for headers in ({}, shown(ADMIN), shown(READER[:-1])) * 3:
            refused(http.post("/v1/recommend", json=ask, headers=headers), 401, "unauthorized")
        assert not limiter._window.storage.events  # type: ignore[attr-defined]
        assert http.post("/v1/recommend", json=ask, headers=shown(READER)).status_code == 200
        refused(http.post("/v1/recommend", json=ask, headers=shown(READER)), 429, "too_many_requests")
        refused(http.post("/v1/recommend", json=ask), 401, "unauthorized")


def test_without_tokens_an_address_is_a_caller_whatever_token_it_shows(backend: LocalBackend) -> None:
    with TestClient(create_app(backend, limiter=Limiter("2/hour"))) as http:
        answers = [http.post("/v1/recommend", json={"users": ["ann"]}, headers=shown(f"{n}" * 20)) for n in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]


def test_a_window_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    limiter = Limiter("2/second")
    assert [limiter.wait("a") for _ in range(2)] == [0.0, 0.0]
    assert 0 < limiter.wait("a") <= 1
    now += 1.01
    assert limiter.wait("a") == 0.0


def test_a_clock_that_is_set_back_refuses_nobody_for_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    limiter = Limiter("2/second")
    assert [limiter.wait("a") for _ in range(2)] == [0.0, 0.0]
    now -= 600
    assert [limiter.wait("a") for _ in range(2)] == [0.0, 0.0]
    assert 0 < limiter.wait("a") <= 1
    now += 1.01
    assert limiter.wait("a") == 0.0

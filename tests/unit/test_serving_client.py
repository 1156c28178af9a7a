"""The client: what it asks, when it asks again, and what it says when it cannot be answered."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from components.errors import ServingError
from serving.client import Client
from serving.run import wait_until_ready
from serving.schemas import Event, Filter, NewItem, Range

SCORES: dict[str, Any] = {
    "model_version": "7",
    "user_id": "ann",
    "cold": False,
    "reason": None,
    "debias": 0.5,
    "scores": [{"item_id": "i0", "title": "Alien", "score": 1.5, "factual": 2.0, "direct": 1.0, "popularity": 3}],
    "unknown_items": [],
}
ERROR = {"code": "overloaded", "message": "too many requests are waiting.", "hint": "Try again in 1 s.", "request_id": "abc"}


def client(handler: Callable[[httpx.Request], httpx.Response], retries: int = 2) -> Client:
    return Client("http://endpoint:8000/", retries=retries, backoff=0.001, transport=httpx.MockTransport(handler))


def test_a_question_is_sent_as_the_schema_says_and_the_answer_is_typed() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=SCORES)

    with client(answer) as asked:
        scores = asked.score("ann", ["i0"], debias=0.5, recent=["i3"])
    assert (scores.scores[0].score, scores.model_version) == (1.5, "7")
    assert (str(seen[0].url), seen[0].method) == ("http://endpoint:8000/v1/score", "POST")
    assert json.loads(seen[0].content) == {"user_id": "ann", "item_ids": ["i0"], "recent": ["i3"], "debias": 0.5}


def test_what_is_as_it_would_be_anyway_is_not_sent_for_an_earlier_endpoint_need_not_know_it() -> None:
    seen: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(503, json=ERROR)

    with client(answer, retries=0) as asked:
        given: list[dict[str, Filter]] = [{}, {"year": Range(min=1990.0)}]
        for filters in given:
            with pytest.raises(ServingError):
                asked.recommend(["ann"], k=5, filters=filters)
    assert seen == [{"users": ["ann"], "k": 5}, {"users": ["ann"], "k": 5, "filters": {"year": {"min": 1990.0}}}]


def test_everything_that_a_question_can_say_is_sent() -> None:
    seen: dict[str, Any] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        seen[request.url.path] = json.loads(request.content)
        return httpx.Response(503, json=ERROR)

    about_all: dict[str, Any] = {"users": ["ann"], "recent": {"ann": ["i3"]}}
    about_one: dict[str, Any] = {"debias": 0.5, "recent": ["i3"]}
    recommend = {"k": 5, "exclude_seen": False, "debias": 0.0, "compare": True, "allow": ["i1", "i2"], "deny": ["i2"]}
    new = {"item_id": "new", "text": "a text"}
    with client(answer, retries=0) as asked:
        for ask in (
            lambda: asked.recommend(**about_all, **recommend),
            lambda: asked.score("ann", ["i0"], **about_one),
            lambda: asked.explain("ann", "i0", **about_one, num_neighbours=2),
            lambda: asked.new_items([NewItem(**new)], **about_all, num_neighbours=3),
        ):
            with pytest.raises(ServingError):
                ask()
    assert seen == {
        "/v1/recommend": {**about_all, **recommend},
        "/v1/score": {"user_id": "ann", "item_ids": ["i0"], **about_one},
        "/v1/explain": {"user_id": "ann", "item_id": "i0", **about_one, "num_neighbours": 2},
        "/v1/items": {"items": [new], **about_all, "num_neighbours": 3},
    }


def test_a_try_takes_no_longer_than_it_is_given() -> None:
    seen: list[dict[str, float]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.extensions["timeout"])
        return httpx.Response(200, json=SCORES)

    for given, seconds in (({}, 10.0), ({"timeout": 1.5}, 1.5)):
        with Client("http://endpoint:8000", transport=httpx.MockTransport(answer), **given) as asked:
            asked.score("ann", ["i0"])
        assert set(seen.pop().values()) == {seconds}


def test_an_event_is_sent_with_its_time_so_that_it_is_the_same_when_it_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(503, json=ERROR)

    monkeypatch.setattr("time.time", lambda: 1_000_000_000.5)  # "now" is the default, however long ago it was
    with client(answer, retries=1) as asked, pytest.raises(ServingError):
        asked.tell([Event(user_id="ann", item_id="i0")])
    assert seen == [{"events": [{"user_id": "ann", "item_id": "i0", "timestamp": 1_000_000_000}]}] * 2


def test_a_dropped_connection_and_an_overload_are_asked_again() -> None:
    answers = [httpx.RemoteProtocolError("dropped"), httpx.Response(503, json=ERROR), httpx.Response(200, json=SCORES)]

    def answer(request: httpx.Request) -> httpx.Response:
        following = answers.pop(0)
        if isinstance(following, Exception):
            raise following
        return following

    assert client(answer).score("ann", ["i0"]).user_id == "ann"
    assert answers == []


@pytest.mark.parametrize(("told", "least"), [("1", (1.0, 1.0)), ("0", (0.2, 0.4)), ("²", (0.2, 0.4)), ("", (0.2, 0.4))])
def test_callers_who_were_refused_together_do_not_come_back_together(
    told: str, least: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[float] = []
    monkeypatch.setattr("time.sleep", paused.append)
    headers = [(b"Retry-After", told.encode())]
    for _ in range(40):
        refused = httpx.MockTransport(lambda request: httpx.Response(503, json=ERROR, headers=headers))
        with pytest.raises(ServingError), Client("http://endpoint:8000", retries=2, transport=refused) as asked:
            asked.model()
    for pauses, pause in ((paused[::2], least[0]), (paused[1::2], least[1])):
        assert len(pauses) == 40
        assert pause <= min(pauses) < 1.25 * pause < 1.75 * pause < max(pauses) <= 2 * pause


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (httpx.ConnectError("refused"), r"nothing listens at http://endpoint:8000\. Start the endpoint: make serve"),
        (httpx.ReadTimeout("slow"), "http://endpoint:8000 does not answer in time"),
        (httpx.RemoteProtocolError("half an answer"), "cannot be asked: RemoteProtocolError"),
    ],
)
def test_an_endpoint_that_cannot_be_reached_is_named_after_the_last_try(error: Exception, told: str) -> None:
    tries: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        tries.append(1)
        raise error

    with pytest.raises(ServingError, match=told):
        client(answer, retries=1).model()
    assert len(tries) == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://[::1", "http://\x00"])
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(ServingError, match=r"is no address: .*Give one such as http://127\.0\.0\.1:8000"):
        Client(url)


def test_what_is_no_token_is_told_and_not_shown() -> None:
    with pytest.raises(ServingError, match="the token has characters that no token has") as told:
        Client("http://endpoint:8000", token="tökenlike")
    assert "kenlike" not in str(told.value)


def test_an_answer_that_a_proxy_garbled_is_told() -> None:
    garbled = httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"no gzip"))
    with pytest.raises(ServingError, match="cannot be asked: DecodingError"):
        client(lambda request: garbled).model()


def test_a_refusal_is_passed_on_with_the_request_id() -> None:
    with pytest.raises(ServingError, match=r"the endpoint refuses: too many requests .* \(request abc\)"):
        client(lambda request: httpx.Response(503, json=ERROR)).model()


def test_a_field_that_the_endpoint_does_not_know_is_said_to_be_of_another_version() -> None:
    error = {**ERROR, "code": "invalid_request", "message": "filters: Extra inputs are not permitted.", "hint": "See /docs."}
    told = r"refuses: filters: Extra .* use the client of the same version as the endpoint\. \(request abc\)"
    with pytest.raises(ServingError, match=told):
        client(lambda request: httpx.Response(422, json=error)).recommend(["ann"], filters={"genres": ["Drama"]})


def test_a_refused_request_is_not_asked_again() -> None:
    tries: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        tries.append(1)
        return httpx.Response(422, json={**ERROR, "code": "invalid_request"})

    with pytest.raises(ServingError):
        client(answer).model()
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("response", "told"),
    [
        (httpx.Response(404, text="<html>"), "answers status 404 and is no endpoint of ours"),
        (httpx.Response(200, json={"hello": "world"}), "answers something else than this client understands"),
    ],
)
def test_something_else_that_listens_there_is_recognised(response: httpx.Response, told: str) -> None:
    with pytest.raises(ServingError, match=told):
        client(lambda request: response).model()


@pytest.mark.parametrize("status", [408, 502, 503, 504])
def test_what_a_proxy_answers_for_the_endpoint_is_asked_again_and_told(status: int) -> None:
    answers = [httpx.Response(status, text="<html>no server is available</html>"), httpx.Response(200, json=SCORES)]
    assert client(lambda request: answers.pop(0), retries=1).score("ann", ["i0"]).user_id == "ann"
    away = httpx.Response(status, text="<html>no server is available</html>")
    with pytest.raises(ServingError, match=rf"answers status {status}: a proxy in front says .* Look at the endpoint"):
        client(lambda request: away).model()


def test_a_wrong_argument_is_refused_before_anything_is_sent() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise AssertionError("nothing must be sent")

    with pytest.raises(ValidationError, match="debias"):
        client(answer).recommend(["ann"], debias=2.0)


@contextmanager
def listening(seen: list[tuple[str, str | None]]) -> Iterator[int]:
    """A server that answers everything, and remembers what it was asked and with which token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *message: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_an_endpoint_on_this_machine_is_asked_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    by_proxy: list[tuple[str, str | None]] = []
    direct: list[tuple[str, str | None]] = []
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with listening(by_proxy) as proxy, listening(direct) as endpoint:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy}")
        wait_until_ready(f"http://127.0.0.1:{endpoint}", 5)
        for host in (f"127.0.0.1:{endpoint}", f"localhost:{endpoint}", "recommender.example"):
            with Client(f"http://{host}", token="secret") as asking, pytest.raises(ServingError, match="something else"):
                asking.model()
    assert direct == [("/readyz", None), *[("/v1/model", "Bearer secret")] * 2]
    assert by_proxy == [("http://recommender.example/v1/model", "Bearer secret")]


def test_a_port_where_nothing_listens_is_said_so() -> None:
    with pytest.raises(ServingError, match=r"nothing listens at http://127.0.0.1:9\."):
        Client("http://127.0.0.1:9", retries=0).model()

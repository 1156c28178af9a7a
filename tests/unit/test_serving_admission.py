"""Who is let in: so many at a time, counted once, and nobody is kept from health."""

import asyncio
import json
import time
from typing import Any

import pytest
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import admission
from serving.admission import Admission, Door, middlewares
from serving.auth import Tokens
from serving.callers import Callers
from serving.identity import Identities
from serving.room import FEWEST, Room


class Rooms:
    """An application whose requests stay until they are let go."""

    def __init__(self) -> None:
        self.inside: list[Scope] = []
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.inside.append(scope)
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def nothing() -> Message:
    return {"type": "http.request", "body": b""}


async def ask(app: ASGIApp, path: str = "/v1/recommend", **scope: Any) -> tuple[int, dict[str, str], bytes]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "path": path, "headers": [], **scope}, nothing, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, sent[1]["body"]


def test_what_is_more_is_refused_and_of_two_doors_the_outer_one_counts() -> None:
    async def run() -> None:
        rooms, asked = Rooms(), Admission(Room(2), lambda: "7")
        app = Door(Door(rooms, lambda: asked), lambda: asked, is_first=True)
        let_in = [asyncio.create_task(ask(app)) for _ in range(2)]
        await asyncio.sleep(0)
        assert (len(rooms.inside), asked.working) == (2, 2)
        status, headers, body = await ask(app, headers=[(b"x-request-id", b"mine-1")])
        assert (status, headers["retry-after"], headers["x-request-id"], headers["x-model-version"]) == (
            503,
            "1",
            "mine-1",
            "7",
        )
        assert json.loads(body) == {
            "code": "overloaded",
            "message": "more than 2 at a time were asked.",
            "hint": "Try again in 1 s.",
            "request_id": "mine-1",
        }
        assert len(body) == int(headers["content-length"])
        _, headers, body = await ask(app, headers=[(b"x-request-id", b'"}<script>')])
        assert headers["x-request-id"] == json.loads(body)["request_id"] != '"}<script>'
        rooms.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(*let_in)] == [200, 200]
        assert asked.working == 0
        assert (await ask(app))[0] == 200

    asyncio.run(run())


def test_health_and_the_page_are_let_in_whatever_is_going_on() -> None:
    async def run() -> None:
        rooms = Rooms()
        rooms.go_on.set()
        full = Admission(Room(0))
        app = Door(rooms, lambda: full)
        for path in ("/", "/healthz", "/readyz", "/docs", "/ui/", "/ui/page.js", "/-/healthz"):
            assert (await ask(app, path))[0] == 200, path
        assert (await ask(app, "/below/readyz", root_path="/below"))[0] == 200
        for path in ("/v1/model", "/readyz/more", "/uix", "/below/readyz"):
            assert (await ask(app, path))[0] == 503, path

    asyncio.run(run())


def test_health_and_the_page_take_no_room() -> None:
    async def run() -> None:
        rooms, asked = Rooms(), Admission(Room(1))
        app = Door(rooms, lambda: asked)
        slow = [asyncio.create_task(ask(app, path)) for path in ("/readyz", "/ui/", "/")]
        await asyncio.sleep(0)
        assert (len(rooms.inside), asked.working) == (3, 0)
        let_in = asyncio.create_task(ask(app))
        await asyncio.sleep(0)
        assert asked.working == 1
        rooms.go_on.set()
        assert {status for status, _, _ in await asyncio.gather(*slow, let_in)} == {200}

    asyncio.run(run())


def test_who_is_asked_more_than_it_can_answer_takes_on_fewer() -> None:
    async def run() -> Room:
        room = Room(8)
        asked = Admission(room)

        async def busy(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.sleep(0)
            time.sleep(0.02)  # work of the event loop itself
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        app, until = Door(busy, lambda: asked), time.monotonic() + 30.0
        while room.now > FEWEST and time.monotonic() < until:
            answers = await asyncio.gather(*(ask(app) for _ in range(32)))
            assert {status for status, _, _ in answers} == {200, 503}
        assert [status for status, _, _ in await asyncio.gather(*(ask(app) for _ in range(32)))].count(200) == FEWEST
        return room

    assert asyncio.run(run()).now == FEWEST


KNOWN = "k" * 20


def shown(token: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {token}".encode())]


@pytest.mark.parametrize("is_full", [False, True])
def test_a_stranger_is_told_so_at_every_load_and_takes_no_room(is_full: bool) -> None:
    async def run() -> None:
        rooms = Rooms()
        asked = Admission(Room(1), lambda: "7", callers=Callers(Tokens({KNOWN: frozenset({"score"})})))
        app = Door(rooms, lambda: asked)
        let_in = [asyncio.create_task(ask(app, headers=shown(KNOWN)))] if is_full else []
        await asyncio.sleep(0)
        for headers in ([], shown(KNOWN[:-1]), [*shown(KNOWN), *shown(KNOWN)]):
            status, answered, body = await ask(app, headers=headers)
            assert (status, answered["www-authenticate"], answered["x-model-version"]) == (401, "Bearer", "7")
            assert "retry-after" not in answered
            assert json.loads(body) == {
                "code": "unauthorized",
                "message": "this needs a token that is known here.",
                "hint": "Send it as: Authorization: Bearer TOKEN",
                "request_id": answered["x-request-id"],
            }
        assert (len(rooms.inside), asked.working) == (len(let_in), len(let_in))
        if is_full:
            assert (await ask(app, headers=shown(KNOWN)))[0] == 503  # who is known is told that it is full
        rooms.go_on.set()
        await asyncio.gather(*let_in)

    asyncio.run(run())


def test_who_needs_an_identity_is_told_how_to_get_one_and_who_has_one_is_let_in() -> None:
    async def run() -> None:
        rooms = Rooms()
        rooms.go_on.set()
        asked = Admission(Room(1), callers=Callers(identities=Identities({"spiffe://shop": frozenset({"score"})})))
        app = Door(rooms, lambda: asked)
        status, headers, body = await ask(app)
        assert (status, json.loads(body)["hint"]) == (401, "Ask through the proxy, with a client certificate.")
        assert "www-authenticate" not in headers
        assert (await ask(app, headers=[(b"x-forwarded-client-cert", b"Hash=0a;URI=spiffe://shop")]))[0] == 200
        assert rooms.inside[0][admission.SCOPES] == {"score"}

    asyncio.run(run())


def test_inside_of_ray_serve_a_refusal_leaves_the_requests_id_to_it() -> None:
    async def run() -> None:
        app = Door(Rooms(), lambda: full)
        _, headers, body = await ask(app, headers=[(b"x-request-id", b"of-serve")])
        assert "x-request-id" not in headers
        assert json.loads(body)["request_id"] == "of-serve"

    full = Admission(Room(0))
    asyncio.run(run())


def test_a_request_that_fails_or_is_given_up_makes_room() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a bug")

    async def run() -> None:
        asked = Admission(Room(1))
        with pytest.raises(RuntimeError, match="a bug"):
            await ask(Door(fails, lambda: asked))
        given_up = asyncio.create_task(ask(Door(Rooms(), lambda: asked)))
        await asyncio.sleep(0)
        assert asked.working == 1
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert asked.working == 0

    asyncio.run(run())


def test_refusals_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_TELL_SECONDS", 1.0)
    told: list[int] = []

    async def run() -> None:
        app = Door(Rooms(), lambda: full)
        for _ in range(3):
            await ask(app)
        assert told == []
        await asyncio.sleep(1.1)
        await ask(app)
        await asyncio.sleep(1.1)

    full = Admission(Room(0), told=told.append)
    asyncio.run(run())
    assert told == [3, 1]


def test_strangers_are_told_together_too_and_are_no_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_TELL_SECONDS", 0.05)
    told: list[int] = []

    async def run() -> None:
        for _ in range(3):
            await ask(Door(Rooms(), lambda: closed))
        await asyncio.sleep(0.1)

    closed = Admission(Room(0), told=told.append, callers=Callers(Tokens({KNOWN: frozenset({"score"})})))
    with structlog.testing.capture_logs() as logs:
        asyncio.run(run())
    assert told == []
    assert [(line["event"], line["code"], line["number"]) for line in logs] == [("requests refused", "unauthorized", 3)]


def test_ray_serve_puts_the_door_of_the_gateway_around_everything_and_lets_all_in_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.serve._private.http_util import _apply_middlewares

    monkeypatch.setattr(admission, "_of_this_process", None)

    async def run() -> None:
        rooms = Rooms()
        rooms.go_on.set()
        app = _apply_middlewares(rooms, middlewares())
        assert (await ask(app))[0] == 200
        admission.keep(Admission(Room(0)))
        status, headers, _ = await ask(app)
        assert status == 503
        assert "-" not in headers["x-request-id"]  # Ray Serve's own have dashes: it has not seen this one
        admission.keep(Admission(Room(1)))
        assert (await ask(app))[0] == 200
        not_looked_out_for = (b"x-request-disconnect-disabled", b"?1")
        assert [not_looked_out_for in scope["headers"] for scope in rooms.inside] == [False, True]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("told", "passed_on"),
    [
        ([(b"x-request-id", b"mine-1")], [b"mine-1"]),
        ([(b"x-request-id", b"\xff")], []),
        ([(b"x-request-id", b"<script>")], []),
        ([(b"x-request-id", b"")], []),
        ([(b"x-request-id", b"mine-1"), (b"x-request-id", b"mine-2")], []),
        ([(b"serve_multiplexed_model_id", b"\xff"), (b"x-session-id", b"\xff")], []),
        ([(b"x-request-timeout-seconds", b"0.001"), (b"x-request-disconnect-disabled", b"?1")], []),
    ],
)
def test_clients_tell_ray_serve_nothing_but_an_id_that_may_be_in_answers(
    monkeypatch: pytest.MonkeyPatch, told: list[tuple[bytes, bytes]], passed_on: list[bytes]
) -> None:
    monkeypatch.setattr(admission, "_of_this_process", None)

    async def run() -> None:
        rooms = Rooms()
        rooms.go_on.set()
        app: ASGIApp = rooms
        for middleware in middlewares():
            app = middleware.cls(app, *middleware.args, **middleware.kwargs)
        await ask(app, headers=[(b"host", b"here"), *told])
        assert rooms.inside[0]["headers"] == [(b"host", b"here"), *((b"x-request-id", name) for name in passed_on)]

    asyncio.run(run())

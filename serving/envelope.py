"""What is around every request to the HTTP API: its id, headers, scope, rate and log line, and the cap on its body."""

import asyncio
import hashlib
import math
import time

import structlog
from fastapi import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.admission import SCOPES, has_request_id, is_open, path_of, request_id
from serving.auth import TokenScope
from serving.callers import Callers
from serving.contract import Backend
from serving.limits import Limiter
from serving.refusals import BODY_SECONDS, MAX_BODY_BYTES, as_ascii, error_response

log = structlog.get_logger()


class Envelope:
    """Around every request: its id, the headers, the cap on the body, the last resort for errors, one log line."""

    def __init__(self, app: ASGIApp, backend: Backend, callers: Callers, limiter: Limiter | None) -> None:
        self._app = app
        self._backend = backend
        self._callers, self._limiter = callers, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        name = request_id(scope)
        scope.setdefault("state", {})["request_id"] = name
        # Serve gives every request an id and answers it itself
        id_header = [] if has_request_id(scope) else [(b"x-request-id", name.encode())]

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), *id_header]
                if not any(name == b"x-model-version" for name, _ in headers):
                    headers.append((b"x-model-version", as_ascii(self._backend.model_version).encode()))
                message = {**message, "headers": headers}
            await send(message)

        try:
            refusal = _forbidden(scope, self._callers) or _delay(scope, self._callers, self._limiter)
            await (refusal or self._app)(scope, _capped(scope, receive), send_with_headers)
        except Exception:
            log.exception("request failed", request_id=name)
            if status:
                raise  # the answer has begun; the server can only cut the connection
            hint = "Report it with the request id."
            answer = error_response(500, "internal_error", "the server failed.", hint, name)
            await answer(scope, receive, send_with_headers)
        finally:
            log.info(
                "request",
                method=scope["method"],
                route=getattr(scope.get("route"), "path", None),
                status=status,
                milliseconds=round(1000 * (time.perf_counter() - started), 1),
                request_id=name,
            )


_SCOPES: dict[str, tuple[TokenScope, ...]] = {"/v1/model": ("admin",), "/v1/events": ("events", "admin")}
"""Scopes one of which a path needs; all others need "score"."""


def _forbidden(scope: Scope, callers: Callers) -> Response | None:
    """The answer to a request that its token or identity does not allow, None when it does."""
    path = path_of(scope)
    if not callers.must_be_known or is_open(path):
        return None
    needed = _SCOPES.get(path, ("score",))
    if not scope[SCOPES].isdisjoint(needed):
        return None
    scopes = " or ".join(f"'{scope}'" for scope in needed)
    hint = "Use a token or an identity that has it."
    return error_response(403, "forbidden", f"this needs the scope {scopes}.", hint, scope["state"]["request_id"])


def _delay(scope: Scope, callers: Callers, limiter: Limiter | None) -> Response | None:
    """The answer to a caller that has asked too much, None when it has not."""
    if limiter is None or is_open(path_of(scope)):
        return None
    if (wait := limiter.wait(hashlib.sha256(callers.name(scope).encode("utf-8", "surrogateescape")).hexdigest())) <= 0:
        return None
    seconds = math.ceil(wait)
    message, hint = f"more than {limiter.rate} were asked.", f"Try again in {seconds} s, or ask for more users at once."
    response = error_response(429, "too_many_requests", message, hint, scope["state"]["request_id"])
    response.headers["Retry-After"] = str(seconds)
    return response


def _capped(scope: Scope, receive: Receive) -> Receive:
    """`receive` that raises 413 when the announced or the received body is too large, 408 when it takes too long to come."""
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    announced_bytes = int(announced) if announced.isdigit() else 0
    received, is_whole = 0, False
    parts: list[bytes] = scope["state"].setdefault("body", [])
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def capped() -> Message:
        nonlocal received, is_whole
        if announced_bytes > MAX_BODY_BYTES:
            raise HTTPException(413)
        try:
            async with asyncio.timeout_at(None if is_whole else deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, headers={"Connection": "close"}) from None
        received += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)
        if received > MAX_BODY_BYTES:
            raise HTTPException(413)
        parts.append(message.get("body", b""))
        return message

    return capped

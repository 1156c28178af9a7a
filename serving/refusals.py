"""The errors of the HTTP API as every client sees them: one for each way in which a request is refused or fails."""

import re

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.admission import RETRY_AFTER_SECONDS
from serving.attributes import FilterError
from serving.contract import Impossible, Unavailable
from serving.schemas import ErrorBody

MAX_BODY_BYTES = 1 << 20
MAX_DEPTH = 3
"""Levels of the deepest request there is; what is deeper has a field that is not known, and is refused for it."""
BODY_SECONDS = 10.0
"""Within which a body must be there: while it comes in, its request is one of those that are worked on."""

_SEE_DOCS = "See /docs for the fields and their limits."


def add_handlers(app: FastAPI) -> None:
    """Has the application tell what its routes raise."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Unavailable, _unavailable)
    app.add_exception_handler(Impossible, _impossible)
    app.add_exception_handler(FilterError, _invalid_filter)


def error_response(status: int, code: str, message: str, hint: str, request_id: str) -> JSONResponse:
    """An error as every client sees it."""
    body = ErrorBody(code=code, message=message, hint=hint, request_id=request_id)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


def as_ascii(text: str) -> str:
    """Fit for a header, in which other characters cannot be sent as they are."""
    return text.encode("ascii", "backslashreplace").decode()


def _sendable(text: str) -> str:
    """Fit for a body: a name in it may hold anything, and lone surrogates alone cannot be sent as they are."""
    return text.encode("utf-8", "backslashreplace").decode()


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "body")[:200]
    if problem["type"] == "json_invalid":
        message, hint = "the body is not JSON.", "Send a JSON object with Content-Type: application/json."
    else:
        said = problem["msg"].removeprefix("Value error, ")  # pydantic's, of a check of ours
        message, hint = f"{place + ': ' if place else ''}{said}.", _SEE_DOCS
    return error_response(422, "invalid_request", _sendable(message), hint, _id(request))


_HTTP_ERRORS = {
    404: ("not_found", "there is no such path.", "See /docs for the paths there are."),
    413: (
        "body_too_large",
        f"the body is larger than {MAX_BODY_BYTES} bytes.",
        "Send a smaller one: split the users or items over several requests.",
    ),
    408: (
        "body_too_slow",
        f"the body was not there within {BODY_SECONDS:g} s.",
        "Send it at once: a request that is not whole keeps others out.",
    ),
    405: ("method_not_allowed", "this path does not take this method.", "See /docs for the methods of each path."),
}


_NESTING = {ord(b): step for b, step in zip("[{]}", (1, 1, -1, -1), strict=True)}
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


def depth_of(body: bytes) -> int:
    """How deep a text in JSON, or what is there of it, is nested; brackets in strings are none."""
    text = np.frombuffer(_STRINGS.sub(b"", body), dtype=np.uint8)
    steps = np.zeros(256, dtype=np.int64)
    steps[list(_NESTING)] = list(_NESTING.values())
    return int(steps[text].cumsum().max(initial=0))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and isinstance(error.__cause__, RecursionError):
        depth = depth_of(b"".join(request.scope["state"]["body"]))
        message = f"the body is nested {depth} levels deep; at most {MAX_DEPTH} are allowed."
        return error_response(400, "bad_request", message, _SEE_DOCS, _id(request))
    default = ("bad_request", "the request cannot be read.", "Send a JSON object with Content-Type: application/json.")
    code, message, hint = _HTTP_ERRORS.get(error.status_code, default)
    response = error_response(error.status_code, code, message, hint, _id(request))
    response.headers.update(error.headers or {})
    return response


async def _unavailable(request: Request, error: Exception) -> Response:
    assert isinstance(error, Unavailable)
    return _try_again(error.code, error.message, _id(request))


def _try_again(code: str, message: str, request_id: str) -> Response:
    return error_response(503, code, message, f"Try again in {RETRY_AFTER_SECONDS} s.", request_id)


async def _impossible(request: Request, error: Exception) -> Response:
    assert isinstance(error, Impossible)
    return error_response(409, error.code, error.message, error.hint, _id(request))


def _id(request: Request) -> str:
    return str(request.scope["state"]["request_id"])


async def _invalid_filter(request: Request, error: Exception) -> Response:
    assert isinstance(error, FilterError)
    return error_response(422, error.code, _sendable(error.message), _sendable(error.hint), _id(request))

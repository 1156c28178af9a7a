"""Asks a server that speaks OpenAI's protocol: ``vllm serve``, a hosted API, or anything else with /chat/completions."""

import asyncio
import logging
import random
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any

import httpx
from pydantic import SecretStr
from pydantic_core import from_json
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from components.errors import LLMError
from components.sideinfo.backends import MAX_ANSWER_CHARS, Answer, Decoding, Request

MAX_WAIT = 60.0  # seconds between two attempts, whatever the server asks for

_MAX_BODY_BYTES = 8 * MAX_ANSWER_CHARS
_FIRST_WAIT = 0.5
_FINISH_REASONS = ("stop", "length", "content_filter", "refusal", "oversized")
_BUSY = {408, 409, 425, 429}
_REFUSALS = 8  # alike and not one answer, also with fewer in flight: no row will pass
_CODE = re.compile(r"[a-z_]{1,40}")
_OF_ALL = {
    401: "the key is not accepted. Put the key into the environment variable that sideinfo.api_key_env names.",
    403: "the key may not use it. Check the key and its model permissions.",
    404: "no such address or model. Check sideinfo.base_url (it usually ends in /v1) and sideinfo.model.",
}


class _Again(Exception):
    """An attempt that may go better next time."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass
class OpenAIBackend:
    """A server with bounded concurrency; see Backend."""

    base_url: str
    api_key: SecretStr | None
    concurrency: int
    """Requests in flight."""
    timeout: float
    """Seconds of one attempt, from sending to the last byte."""
    attempts: int
    """Of one request, in all."""
    patience: float
    """Seconds during which nothing but failures came, after which the server is taken to be dead and is asked no more."""
    _failing_since: float | None = field(default=None, init=False)
    _failed_at: float = field(default=0.0, init=False)
    _failures: int = field(default=0, init=False)
    _answered: bool = field(default=False, init=False)
    _refusals: Counter[int] = field(default_factory=Counter, init=False)
    _paused_until: float = field(default=0.0, init=False)

    def answers(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Answer]:
        """See Backend."""
        for name in ("httpx", "httpcore"):  # a line per request at INFO, which would drown everything else
            logging.getLogger(name).setLevel(logging.WARNING)
        with asyncio.Runner() as runner:
            stream = self._stream(requests, decoding)
            try:
                while (answer := runner.run(_next(stream))) is not None:
                    yield answer
            finally:
                runner.run(_close(stream))

    @property
    def is_dead(self) -> bool:
        """Whether the server has been given up."""
        return (
            self._failing_since is not None
            and self._failures >= min(self.concurrency, self.attempts)
            and self._failed_at - self._failing_since >= self.patience  # not until now: it may have asked for a longer wait
        )

    async def _stream(self, requests: Iterable[Request], decoding: Decoding) -> AsyncGenerator[Answer, None]:
        """Never more than `concurrency` requests are read ahead."""
        waiting, running = iter(requests), set[asyncio.Task[Answer]]()
        async with httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self.api_key.get_secret_value()}"} if self.api_key else {},
            limits=httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            timeout=self.timeout,
        ) as client:
            try:
                while True:
                    chosen = islice(waiting, self.concurrency - len(running))
                    running |= {asyncio.create_task(self._ask(client, request, decoding)) for request in chosen}
                    if not running:
                        return
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(done, key=lambda task: task.exception() is not None):  # what came is handed on first
                        yield task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _ask(self, client: httpx.AsyncClient, request: Request, decoding: Decoding) -> Answer:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.attempts),
            wait=_wait,
            retry=retry_if_exception(lambda error: isinstance(error, _Again) and not self.is_dead),
            reraise=True,
        )
        attempt = 0
        try:
            async for try_ in retrying:
                with try_:
                    if self.is_dead:
                        return Answer(request.key, "", "", 0, 0, error="not asked: the server was given up")
                    attempt += 1
                    await asyncio.sleep(max(0.0, self._paused_until - time.monotonic()))
                    return await self._attempt(client, request, decoding)
        except _Again as error:
            return Answer(request.key, "", "", 0, 0, error=f"no answer in {attempt} attempts, the last: {error}")
        raise AssertionError("tenacity either returns or raises")

    async def _attempt(self, client: httpx.AsyncClient, request: Request, decoding: Decoding) -> Answer:
        url, asked = f"{self.base_url.rstrip('/')}/chat/completions", request_body(request, decoding)
        try:
            async with asyncio.timeout(self.timeout), client.stream("POST", url, json=asked) as response:
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > _MAX_BODY_BYTES:
                        break
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            late = isinstance(error, TimeoutError | httpx.TimeoutException)
            raise self._failed("time is up" if late else type(error).__name__) from None
        if response.status_code != httpx.codes.OK:
            return self._refused(request, response, bytes(content))
        oversized = len(content) > _MAX_BODY_BYTES
        answer = Answer(request.key, "", "oversized", 0, 0) if oversized else parse(request.key, bytes(content))
        if answer is None:
            raise self._failed("an answer that is not the protocol's")
        self._came()
        return answer

    def _refused(self, request: Request, response: httpx.Response, content: bytes) -> Answer:
        """What a status other than 200 means: all requests fail, this one does, or it is worth another attempt."""
        status, code = response.status_code, error_code(content)
        told = f"HTTP {status} ({code})" if code else f"HTTP {status}"
        if status in _OF_ALL:
            raise LLMError(f"the LLM server '{self.base_url}' answers {told}: {_OF_ALL[status]}")
        if status in _BUSY or status >= httpx.codes.INTERNAL_SERVER_ERROR:
            error = self._failed(told)
            error.wait = retry_after(response.headers.get("retry-after"))
            if status in _BUSY and error.wait is not None:  # for all: the others would only be told the same
                self._paused_until = max(self._paused_until, time.monotonic() + error.wait)
            if status not in _BUSY or self._answered or not self.is_dead:
                raise error
        else:
            self._refusals[status] += 1
            if self._answered or self._refusals[status] < max(_REFUSALS, self.concurrency):
                return Answer(request.key, "", "", 0, 0, error=f"refused by the server: {told}")
        raise LLMError(
            f"the LLM server '{self.base_url}' has answered no request and refuses them with {told}.",
            "Check the quota and limits of the key (sideinfo.api_key_env), set sideinfo.guided=false if the server takes no "
            "JSON schema, or see the server's log for what it does not accept.",
        )

    def _failed(self, reason: str) -> _Again:
        self._failures += 1
        self._failed_at = time.monotonic()
        if self._failing_since is None:
            self._failing_since = self._failed_at
        return _Again(reason)

    def _came(self) -> None:
        """An answer, and nothing less: the server is alive."""
        self._failures, self._failing_since, self._answered = 0, None, True


async def _next(stream: AsyncGenerator[Answer, None]) -> Answer | None:
    return await anext(stream, None)


async def _close(stream: AsyncGenerator[Answer, None]) -> None:
    await stream.aclose()


def parse(key: str, content: bytes) -> Answer | None:
    """An answer out of a response's body, None when it is not what the protocol says."""
    try:
        body = from_json(content)
        choice = body["choices"][0]
        message = choice["message"]
        usage = body.get("usage") or {}
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        text = message.get("content") or ""
        finish_reason = "refusal" if message.get("refusal") else choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if not isinstance(text, str):
        return None
    if len(text) > MAX_ANSWER_CHARS:
        text, finish_reason = text[:MAX_ANSWER_CHARS], "oversized"
    tokens_in, tokens_out = (count if isinstance(count, int) and count >= 0 else 0 for count in tokens)
    if finish_reason not in _FINISH_REASONS:  # the server's own words go no further
        finish_reason = "unknown finish reason"
    return Answer(key, text, finish_reason, tokens_in, tokens_out)


def error_code(content: bytes) -> str:
    """What a server calls its refusal, such as "insufficient_quota", else ""; its other words may repeat what was asked."""
    try:
        error = from_json(content)["error"]
        names = (error.get("code"), error.get("type"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    return next((name for name in names if isinstance(name, str) and _CODE.fullmatch(name)), "")


def retry_after(value: str | None) -> float | None:
    """Seconds to wait that a Retry-After header asks for, at most `MAX_WAIT`; None without one that can be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(MAX_WAIT, max(0.0, seconds)) if seconds == seconds else None


def _wait(state: RetryCallState) -> float:
    """What the server asked for, else twice as long each time; with jitter, so that requests do not come back together."""
    assert state.outcome is not None
    error = state.outcome.exception()
    asked: float | None = getattr(error, "wait", None)
    if asked is not None:
        return asked + random.uniform(0.0, _FIRST_WAIT)
    growing: float = _FIRST_WAIT * 2 ** (state.attempt_number - 1)
    return random.uniform(0.5, 1.0) * min(MAX_WAIT, growing)


def request_body(request: Request, decoding: Decoding) -> dict[str, Any]:
    """What is sent for a request."""
    asked: dict[str, Any] = {
        "model": decoding.model,
        "messages": [{"role": "system", "content": request.system}, {"role": "user", "content": request.data}],
        "max_tokens": decoding.max_tokens,
        "temperature": decoding.temperature,
        "seed": decoding.seed,
    }
    if decoding.frequency_penalty:  # some servers do not know it
        asked["frequency_penalty"] = decoding.frequency_penalty
    if decoding.schema is not None:
        # not strict: hosted servers then refuse length limits, and what comes is validated in any case
        schema = {"name": "profile", "schema": decoding.schema, "strict": False}
        asked["response_format"] = {"type": "json_schema", "json_schema": schema}
    return asked

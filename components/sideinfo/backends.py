"""The interface of everything that answers requests: a batch of requests in, a stream of answers out."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from components.errors import LLMError
from components.sideinfo.prompts import Prompt

MAX_ANSWER_CHARS = 65_536
"""Of one answer; a longer one is cut off, whatever the server says."""

NOT_IN_CACHE = "not in the cache"
"""Error of a request that nobody was asked."""

_KEY_LENGTH = 32  # hex digits


@dataclass(frozen=True)
class Decoding:
    """How the LLM is asked; with the prompt and the data it decides the answer."""

    model: str
    max_tokens: int
    temperature: float
    seed: int
    schema: dict[str, Any] | None
    """JSON schema that guides decoding; None: the server is asked for text."""
    frequency_penalty: float = 0.0
    """How much less likely a token gets each time it is written."""


@dataclass(frozen=True)
class Request:
    """One conversation."""

    key: str
    """Names the answer in the cache."""
    system: str
    """The same text for every request of a batch, sent first."""
    data: str


@dataclass(frozen=True)
class Answer:
    """What came back, as it came: whether it can be used is checked each time it is read."""

    key: str
    text: str
    finish_reason: str
    """"stop" when the LLM came to an end by itself."""
    tokens_in: int
    tokens_out: int
    error: str = ""
    """Why there is no answer; such a request is asked again when the stage is built again: because it failed, for other inputs
    or settings, or by --from sideinfo. No text of the row, and of the server's no more than its error's code."""


@dataclass(frozen=True)
class Space:
    """All answers that a model can give to one prompt in one way of decoding; the data are what is left to tell them apart."""

    prompt: Prompt
    decoding: Decoding
    engine: dict[str, Any] = field(default_factory=dict)
    """How the model is run, as far as that may change an answer: see SideinfoConfig.engine."""

    @property
    def name(self) -> str:
        """A hash of all three."""
        described: dict[str, Any] = {"prompt": self.prompt.hash, "decoding": vars(self.decoding)}
        if self.engine:
            described["engine"] = self.engine
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:_KEY_LENGTH]

    def request(self, data: str) -> Request:
        """The request for a row's data; equal data are one request."""
        key = hashlib.sha256(f"{self.name}\0{data}".encode()).hexdigest()[:_KEY_LENGTH]
        return Request(key, self.prompt.system, data)


class Backend(Protocol):
    """Something that answers."""

    def answers(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Answer]:
        """One answer for every request, in any order, each as soon as it is there.

        `requests` is read as answers are taken, so that neither side need be held in memory. A request that fails is an
        answer with `error`; only what makes every request fail (a wrong key, an unknown model) is raised, as LLMError.
        """
        ...


@dataclass(frozen=True)
class Replay:
    """Answers nothing: what the cache does not hold is missing."""

    missing: Literal["fail", "quarantine"]

    def answers(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Answer]:
        """See Backend; raises LLMError on the first request unless rows without an answer are to be quarantined."""
        for request in requests:
            if self.missing == "fail":
                raise LLMError(
                    f"backend 'replay': the cache has no answer of model '{decoding.model}' for a row (request {request.key}).",
                    "Use the settings and data with which the answers were made, ask for the rest (sideinfo.backend=openai), "
                    "or go on without it: sideinfo.replay_missing=quarantine.",
                )
            yield Answer(request.key, "", "", 0, 0, error=NOT_IN_CACHE)

"""Questions that come at about the same time are answered together, and one that fails fails alone."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from typing import Generic, NamedTuple, TypeVar

import structlog

from serving.recommender import Question

MAX_BATCH = 32  # requests that are worked on together at most

_T = TypeVar("_T")

log = structlog.get_logger()


class Answer(NamedTuple, Generic[_T]):
    """What a question was answered."""

    answer: _T
    took: float
    """Seconds, with the questions that it was answered together with, and without those before."""


class _Asked(NamedTuple, Generic[_T]):
    question: Question
    answer: "asyncio.Future[Answer[_T]]"
    context: Context


class Together(Generic[_T]):
    """Answers questions in batches: what has come while one was worked on is the next, with whoever comes as long as every turn
    of the event loop brings somebody. Who is alone does not wait for company.

    That is what `serve.batch` is for, which takes 0.2 ms for a batch of one, as much as its ranking among 10,000 items.

    Args:
        answer: to several questions at once.
    """

    def __init__(self, answer: Callable[[list[Question]], Awaitable[list[_T]]]) -> None:
        self._answer = answer
        self._waiting: list[_Asked[_T]] = []
        self._working: asyncio.Task[None] | None = None

    async def ask(self, question: Question) -> Answer[_T]:
        """The answer to one question; raises what it fails with, and not what others do."""
        asked = _Asked(question, asyncio.get_running_loop().create_future(), copy_context())
        self._waiting.append(asked)
        if self._working is None:
            self._begin()
        return await asked.answer

    def _begin(self) -> None:
        """In the context, and so in the trace, of who has waited longest."""
        self._working = asyncio.create_task(self._work(), context=self._waiting[0].context) if self._waiting else None

    async def _work(self) -> None:
        come = 0
        while come < len(self._waiting) < MAX_BATCH:
            come = len(self._waiting)
            await asyncio.sleep(0)
        batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        batch = [asked for asked in batch if not asked.answer.done()]  # the others have given up
        began = time.monotonic()
        try:
            answers = await each_for_itself(self._answer, [asked.question for asked in batch]) if batch else []
            took = time.monotonic() - began
            for asked, answer in zip(batch, answers, strict=True):
                if asked.answer.done():
                    continue
                if isinstance(answer, Exception):
                    asked.answer.set_exception(answer)
                else:
                    asked.answer.set_result(Answer(answer, took))
        finally:
            self._begin()


async def each_for_itself(
    answer: Callable[[list[Question]], Awaitable[list[_T]]], asked: list[Question]
) -> list[_T | Exception]:
    """Answers to several requests at once; where that fails, to each alone, so that only the ones that fail have none.

    An error is a result here, so that it reaches the one whose question it is.
    """
    try:
        return list(await answer(asked))
    except Exception as error:  # of whichever request
        if len(asked) == 1:
            return [error]
        log.warning("a batch failed, each of its requests is tried alone", requests=len(asked), error=type(error).__name__)
    return [found for question in asked for found in await each_for_itself(answer, [question])]

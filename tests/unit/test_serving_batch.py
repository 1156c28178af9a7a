"""Requests that are answered together: one that fails fails alone."""

import asyncio
from pathlib import Path

import pytest

from serving.recommender import Question, Recommender
from serving.schemas import RecommendRequest, RecommendResponse
from serving.scorer import Scorer
from serving.together import MAX_BATCH, Answer, Together, each_for_itself
from tests.bundles import write_bundle

GOOD: list[Question] = [Question(RecommendRequest(users=[user], k=3), [["i2"]]) for user in ("ann", "bob", "new")]
BAD = Question(RecommendRequest(users=["cat"], k=3), [])  # a user without a history, not even an empty one


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    directory: Path = write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")
    return Recommender(Scorer.load(directory), "7")


@pytest.mark.parametrize("places", [[], [0], [3], [1, 2], [0, 1, 2, 3]], ids=str)
def test_only_what_fails_has_no_answer(recommender: Recommender, places: list[int]) -> None:
    asked, batches = list(GOOD), []
    for place in places:
        asked.insert(place, BAD)

    async def answer(questions: list[Question]) -> list[RecommendResponse]:
        batches.append(len(questions))
        return recommender.recommend_all(questions)

    found = asyncio.run(each_for_itself(answer, asked))
    expected = [None if question is BAD else recommender.recommend(*question) for question in asked]
    assert [None if isinstance(one, ValueError) else one for one in found] == expected
    assert batches == [len(asked), *([1] * len(asked) if places else [])]  # once together, and alone only after a failure


def test_who_asks_meanwhile_is_the_next_batch_and_errors_reach_their_own(recommender: Recommender) -> None:
    batches = []

    async def ask_all() -> list[Answer[RecommendResponse] | BaseException]:
        begun, meanwhile = asyncio.Event(), asyncio.Event()

        async def answer(questions: list[Question]) -> list[RecommendResponse]:
            batches.append(len(questions))
            begun.set()
            await meanwhile.wait()  # a long ranking: the others come meanwhile
            return recommender.recommend_all(questions)

        together = Together(answer)
        first = asyncio.create_task(together.ask(GOOD[0]))
        await begun.wait()
        others = [asyncio.create_task(together.ask(GOOD[number % len(GOOD)])) for number in range(MAX_BATCH + 2)]
        await asyncio.sleep(0)
        others[1].cancel()  # has given up: nothing is ranked for it
        await asyncio.sleep(0.5)
        meanwhile.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        return [*found, *await asyncio.gather(together.ask(BAD), together.ask(GOOD[0]), return_exceptions=True)]

    found = asyncio.run(ask_all())
    expected = recommender.recommend(*GOOD[0])
    assert batches == [1, MAX_BATCH - 1, 2, 2, 1, 1]
    answers = [one for one in found if isinstance(one, Answer)]
    assert len(answers) == len(found) - 2
    assert answers[0].answer == answers[1].answer == answers[-1].answer == expected
    assert answers[1].took < 0.5 <= answers[0].took  # it waited for the first, which it did not take
    assert isinstance(found[2], asyncio.CancelledError)
    assert isinstance(found[-2], ValueError)

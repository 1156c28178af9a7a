"""Requests that are answered together: one that fails fails alone."""

import asyncio
from pathlib import Path

import pytest

from serving.deployments import Question, each_for_itself
from serving.recommender import Recommender
from serving.schemas import RecommendRequest, RecommendResponse
from serving.scorer import Scorer
from tests.bundles import write_bundle

GOOD: list[Question] = [(RecommendRequest(users=[user], k=3), [["i2"]]) for user in ("ann", "bob", "new")]
BAD: Question = (RecommendRequest(users=["cat"], k=3), [])  # a user without a history, not even an empty one


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

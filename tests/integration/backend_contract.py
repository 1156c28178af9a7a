"""What every backend that has a real engine behind it must do; inherit, and give `make`."""

import json
from dataclasses import replace

import jsonschema
import pytest

from components.sideinfo.backends import Answer, Backend, Decoding, Request, Space
from components.sideinfo.prompts import Prompt
from components.sideinfo.schema import json_schema
from tests.vllm_server import NAME

DECODING = Decoding(NAME, 400, 0.0, 0, json_schema(["Comedy", "Drama"], 8))
SPACE = Space(Prompt("item", 1, "Say who would enjoy it."), DECODING)
ROWS = 24
TOO_LONG = SPACE.request("long " * 2000)


def rows(space: Space = SPACE) -> list[Request]:
    return [space.request(f"<data>\nTitle: Film {row}\n</data>") for row in range(ROWS)]


class BackendContract:
    """Engines start slowly, so that one batch of requests is shared by most tests."""

    @pytest.fixture(scope="class")
    def backend(self) -> Backend:
        """The backend."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def answered(self, backend: Backend) -> dict[str, Answer]:
        """Answers to all rows, to one of them again under another key, and to one that no engine takes."""
        asked = [*rows(), replace(rows()[0], key="again"), TOO_LONG]
        answers = list(backend.answers(iter(asked), DECODING))
        assert sorted(answer.key for answer in answers) == sorted(request.key for request in asked)
        return {answer.key: answer for answer in answers}

    def test_every_request_is_answered_once_with_its_tokens(self, answered: dict[str, Answer]) -> None:
        for request in rows():
            answer = answered[request.key]
            assert (answer.error, answer.finish_reason) == ("", "stop")
            assert answer.tokens_in > len(request.data)  # of letters
            assert 0 < answer.tokens_out < DECODING.max_tokens

    def test_decoding_is_guided_by_the_schema(self, answered: dict[str, Answer]) -> None:
        for request in rows():
            jsonschema.validate(json.loads(answered[request.key].text), DECODING.schema)

    def test_what_is_written_is_of_the_row_and_of_nothing_else(self, answered: dict[str, Answer]) -> None:
        assert answered["again"].text == answered[rows()[0].key].text
        assert len({answered[request.key].text for request in rows()}) > 1

    def test_a_request_that_no_engine_takes_is_an_error_of_its_own(self, answered: dict[str, Answer]) -> None:
        answer = answered[TOO_LONG.key]
        assert answer.error.startswith("refused by the ")
        assert "long long" not in answer.error
        assert (answer.text, answer.tokens_in, answer.tokens_out) == ("", 0, 0)

    def test_of_nothing_nothing_is_asked(self, backend: Backend) -> None:
        assert list(backend.answers([], DECODING)) == []

"""Backend 'vllm' for real: Ray Data and vLLM's engine on the CPU. Run by test_vllm.py in the environment that has vLLM.

``CLLMR_TINY_MODEL`` names the directory of the model.
"""

import os
from pathlib import Path

import pytest

from components.errors import LLMError
from components.sideinfo.backends import Backend, Space
from components.sideinfo.cache import AnswerCache
from components.sideinfo.vllm import VLLMBackend
from tests.integration.backend_contract import DECODING, SPACE, BackendContract, rows
from tests.vllm_server import ENGINE

MODEL = os.environ["CLLMR_TINY_MODEL"]


class TestVLLM(BackendContract):
    @pytest.fixture(scope="class")
    def backend(self) -> Backend:
        return VLLMBackend(MODEL, engines=(1, 1), gpus_per_engine=0, batch_size=4, options=ENGINE)

    def test_a_run_that_ends_half_way_keeps_what_came(self, backend: Backend, tmp_path: Path) -> None:
        cache = AnswerCache(str(tmp_path), writable=True)
        short = Space(SPACE.prompt, DECODING.__class__(DECODING.model, 4, 0.0, 0, None))
        asked = rows(short)
        answers = backend.answers(asked, short.decoding)
        with cache.recorder(short) as keep:
            for _ in range(5):
                keep(next(answers))
            answers.close()  # type: ignore[attr-defined]  # a generator
        keys = {request.key for request in asked}
        known = {answer.key: answer for answer in cache.find(short, keys.intersection)}
        assert len(known) == 5
        assert {(answer.finish_reason, answer.tokens_out) for answer in known.values()} == {("length", 4)}


def test_engines_that_do_not_start_are_told_in_one_line(tmp_path: Path) -> None:
    backend = VLLMBackend(str(tmp_path), engines=(1, 1), gpus_per_engine=0, batch_size=4, options=ENGINE)
    with pytest.raises(LLMError, match=r"the vLLM engines of '.*' ended: .*sideinfo\.weights") as told:
        list(backend.answers(rows(), DECODING))
    assert "\n" not in told.value.message

"""Every backend passes the inherited suite, and none is left out."""

import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest

from components.errors import ConfigError, LLMError
from components.ids import TRAIN
from components.ingest.dataset import Dataset
from components.sideinfo import vllm
from components.sideinfo.backends import Answer, Request
from components.sideinfo.config import SideinfoConfig
from components.sideinfo.profiles import ProfileWriter
from components.sideinfo.stage import make_writer
from components.sideinfo.vllm import VLLMBackend
from tests.contract.writer_contract import WriterContract
from tests.llm_server import Asked, LLMServer, llm_server, profile_of
from tests.sideinfo_parents import SMALL, write_ingest


class TestMetadata(WriterContract):
    backend = "metadata"

    def make(self, root: Path, **settings: Any) -> ProfileWriter:
        return make_writer(SideinfoConfig(backend="metadata", **settings), str(root))


class TestOpenAI(WriterContract):
    backend = "openai"

    @pytest.fixture(autouse=True)
    def _serve(self) -> Iterator[None]:
        with llm_server() as self.server:
            yield

    def make(self, root: Path, **settings: Any) -> ProfileWriter:
        config = SideinfoConfig(backend="openai", model="tiny", base_url=self.server.base_url, **settings)
        return make_writer(config, str(root))

    def test_what_is_known_already_is_not_asked(self) -> None:
        first = self.write()
        asked = len(self.server.asked)
        assert self.write() == first
        assert len(self.server.asked) == asked == 4 + 3


class Written:
    """Stands in for Ray's data set; the real one is in tests/integration/test_vllm.py."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = list(requests)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for request in reversed(self._requests):  # in no order that could be relied on
            text = json.dumps(profile_of(Asked(request.system, request.data, {}, {})))
            yield {"key": request.key, "generated_text": text, "num_input_tokens": 100, "num_generated_tokens": 20}


class TestVLLM(WriterContract):
    backend = "vllm"

    @pytest.fixture(autouse=True)
    def _written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm, "find_spec", lambda name: name)
        monkeypatch.setattr(VLLMBackend, "_join", lambda backend: None)
        monkeypatch.setattr(VLLMBackend, "_processed", lambda backend, requests, decoding: Written(requests))

    def make(self, root: Path, **settings: Any) -> ProfileWriter:
        return make_writer(SideinfoConfig(backend="vllm", model="tiny", **settings), str(root))

    def test_answers_are_kept_by_those_of_the_engines_options_that_may_change_them(self) -> None:
        def asked(backend: str = "vllm", **options: Any) -> int:
            config = SideinfoConfig(backend=backend, model="tiny", engine_options=options)  # type: ignore[arg-type]
            writer = make_writer(config, str(self.root))
            list(writer.write_items(self.training(SMALL)))
            assert writer.account is not None
            return writer.account.asked

        assert asked() == 4
        assert asked(gpu_memory_utilization=0.8, max_num_seqs=8) == 0
        assert asked(quantization="awq", max_num_seqs=8) == 4
        assert asked(quantization="awq") == asked("replay", quantization="awq") == 0


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_backend_says_where_it_is_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vLLM is not installed here.*image 'llm'.*make llm.*sideinfo.backend=openai"):
        make_writer(SideinfoConfig(backend="vllm", model="tiny"), str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"'sideinfo.model' = None: backend 'vllm' needs it"),
        ({"model": "m", "engines": [3, 2]}, r"'sideinfo.engines' = \[3, 2\]: .*write \[least, most\]"),
        ({"model": "m", "engines": [0, 2]}, r"'sideinfo.engines.*greater than 0"),
        ({"model": "m", "gpus_per_engine": -1}, r"'sideinfo.gpus_per_engine' = -1"),
        (
            {"model": "m", "engine_options": {"tensor_parallel_size": 2}},
            r"tensor_parallel_size: set .*gpus_per_engine",
        ),
        ({"model": "m", "answers": "sample"}, r"'sideinfo.answers' = 'sample': they are only read"),
    ],
)
def test_settings_of_the_engines_that_cannot_be_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SideinfoConfig.parse({"backend": "vllm", **settings}, "sideinfo")


def test_whole_numbers_for_the_engine_come_through_kfp_as_such() -> None:
    options = {"max_model_len": 4096.0, "gpu_memory_utilization": 0.8, "enforce_eager": True, "a": {"b": [1.0, 0.5]}}
    found = SideinfoConfig.parse(
        {"backend": "vllm", "model": "m", "engines": [1.0, 2.0], "engine_options": options}, "sideinfo"
    )
    assert found.engines == (1, 2)
    assert str(found.engine_options) == (
        "{'max_model_len': 4096, 'gpu_memory_utilization': 0.8, 'enforce_eager': True, 'a': {'b': [1, 0.5]}}"
    )


def test_rows_that_the_engine_refused_or_cut_off_are_told_apart_and_say_nothing_of_the_text() -> None:
    refused = {"key": "a", "__inference_error__": "ValueError: the prompt 'my secret' is too long", "generated_text": ""}
    assert vllm.answer(refused, 20) == Answer("a", "", "", 0, 0, error="refused by the engine: ValueError")
    row = {"key": "b", "generated_text": "text", "num_input_tokens": 9, "num_generated_tokens": 20}
    assert vllm.answer(row, 20) == Answer("b", "text", "length", 9, 20)
    assert vllm.answer(row, 21) == Answer("b", "text", "stop", 9, 20)
    assert vllm.answer(row | {"generated_text": "x" * 100_000}, 21).finish_reason == "oversized"


class TestReplay(WriterContract):
    """What another run has been answered is replayed; `write` therefore asks first."""

    backend = "replay"

    @pytest.fixture(autouse=True)
    def _serve(self) -> Iterator[None]:
        with llm_server() as self.server:
            yield

    def make(self, root: Path, **settings: Any) -> ProfileWriter:
        return Recorded(root, self.server, settings)


class Recorded:
    """Has every question answered by a server first, and then replays."""

    def __init__(self, root: Path, server: LLMServer, settings: dict[str, Any]) -> None:
        asking = SideinfoConfig(backend="openai", model="tiny", base_url=server.base_url, **settings)
        self._first = make_writer(asking, str(root))
        self._replay = make_writer(SideinfoConfig(backend="replay", model="tiny", **settings), str(root))
        self._server = server

    @property
    def account(self) -> Any:
        return self._replay.account

    @property
    def guarded(self) -> Any:
        return self._replay.guarded

    def __getattr__(self, name: str) -> Any:
        def replayed(*arguments: Any) -> Any:
            expected = _read(getattr(self._first, name)(*arguments))
            asked = len(self._server.asked)
            found = _read(getattr(self._replay, name)(*arguments))
            assert found == expected
            assert len(self._server.asked) == asked
            return found

        return replayed


def _read(given: Any) -> Any:
    """Texts and columns as lists, which are equal when they hold the same."""
    if isinstance(given, dict):
        return {name: list(values) for name, values in given.items()}
    return list(given)


def test_replay_says_what_to_do_about_a_missing_row_or_sets_it_aside(tmp_path: Path) -> None:
    training = Dataset.load(write_ingest(tmp_path, SMALL).path()).only(TRAIN)
    config = SideinfoConfig(backend="replay", model="tiny")
    with pytest.raises(LLMError, match=r"backend 'replay': the cache has no answer of model 'tiny'.*replay_missing=quarantine"):
        make_writer(config, str(tmp_path)).write_items(training)
    writer = make_writer(config.model_copy(update={"replay_missing": "quarantine", "min_coverage": 0.0}), str(tmp_path))
    assert list(writer.write_items(training)) == [None] * 5
    assert writer.account is not None
    assert (writer.account.asked, writer.account.unanswered) == (0, 4)
    assert {row.reason for row in writer.account.quarantine} == {"not in the cache"}
    assert [row.raw_id for row in writer.account.quarantine] == ["10", "20", "30", "40"]
    assert not (tmp_path / "answers").exists()


def test_answers_can_lie_below_another_root_which_a_replay_only_reads(tmp_path: Path) -> None:
    training = Dataset.load(write_ingest(tmp_path, SMALL).path()).only(TRAIN)
    with llm_server() as server:
        asking = SideinfoConfig(backend="openai", model="tiny", base_url=server.base_url, answers=str(tmp_path / "shared"))
        first = list(make_writer(asking, str(tmp_path / "one")).write_items(training))
    assert not (tmp_path / "one").exists()
    before = sorted(tmp_path.rglob("*"))
    replaying = SideinfoConfig(backend="replay", model="tiny", answers=str(tmp_path / "shared"))
    assert list(make_writer(replaying, str(tmp_path / "two")).write_items(training)) == first
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_of_equal_data_are_asked_once(tmp_path: Path) -> None:
    from dataclasses import replace

    same = replace(SMALL, name="same", items={"title": ["Alien", "Alien", "Casablanca", "Alien", "50"]})
    training = Dataset.load(write_ingest(tmp_path, same).path()).only(TRAIN)
    with llm_server() as server:
        config = SideinfoConfig(backend="openai", model="tiny", base_url=server.base_url)
        items = make_writer(config, str(tmp_path)).write_items(training)
    assert len(server.asked) == 2
    assert items[0] == items[1] == items[3] != items[2]


def test_no_backend_is_left_out() -> None:
    tested = {suite.backend for suite in WriterContract.__subclasses__()}
    assert tested == set(get_args(SideinfoConfig.model_fields["backend"].annotation))

"""Every backend passes the inherited suite, and none is left out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from components.errors import LLMError
from components.ids import TRAIN
from components.ingest.dataset import Dataset
from components.sideinfo.config import SideinfoConfig
from components.sideinfo.profiles import ProfileWriter
from components.sideinfo.stage import make_writer
from tests.contract.writer_contract import WriterContract
from tests.llm_server import LLMServer, llm_server
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
            expected = getattr(self._first, name)(*arguments)
            asked = len(self._server.asked)
            found = getattr(self._replay, name)(*arguments)
            assert found == expected
            assert len(self._server.asked) == asked
            return found

        return replayed


def test_replay_says_what_to_do_about_a_missing_row_or_sets_it_aside(tmp_path: Path) -> None:
    training = Dataset.load(write_ingest(tmp_path, SMALL).path()).only(TRAIN)
    config = SideinfoConfig(backend="replay", model="tiny")
    with pytest.raises(LLMError, match=r"backend 'replay': the cache has no answer of model 'tiny'.*replay_missing=quarantine"):
        make_writer(config, str(tmp_path)).write_items(training)
    writer = make_writer(config.model_copy(update={"replay_missing": "quarantine", "min_coverage": 0.0}), str(tmp_path))
    assert writer.write_items(training) == [None] * 5
    assert writer.account is not None
    assert {row.reason for row in writer.account.quarantine} == {"not in the cache"}
    assert [row.raw_id for row in writer.account.quarantine] == ["10", "20", "30", "40"]
    assert not (tmp_path / "answers").exists()


def test_answers_can_lie_below_another_root_which_a_replay_only_reads(tmp_path: Path) -> None:
    training = Dataset.load(write_ingest(tmp_path, SMALL).path()).only(TRAIN)
    with llm_server() as server:
        asking = SideinfoConfig(backend="openai", model="tiny", base_url=server.base_url, answers=str(tmp_path / "shared"))
        first = make_writer(asking, str(tmp_path / "one")).write_items(training)
    assert not (tmp_path / "one").exists()
    before = sorted(tmp_path.rglob("*"))
    replaying = SideinfoConfig(backend="replay", model="tiny", answers=str(tmp_path / "shared"))
    assert make_writer(replaying, str(tmp_path / "two")).write_items(training) == first
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

"""Answers that were paid for: found again by any run, also after a kill, and never mixed up."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from components.progress import EVENTS_VARIABLE
from components.sideinfo import cache as caches
from components.sideinfo.backends import Answer, Decoding, Space
from components.sideinfo.cache import AnswerCache
from components.sideinfo.prompts import Prompt

SPACE = Space(Prompt("item", 1, "Describe it."), Decoding("m", 100, 0.0, 0, None))


def answers(count: int, start: int = 0) -> list[Answer]:
    return [Answer(f"key{number}", f"text {number} \u00e9\n", "stop", number, 2) for number in range(start, start + count)]


def record(root: Path | str, listed: list[Answer], space: Space = SPACE) -> None:
    with AnswerCache(str(root), writable=True).recorder(space) as keep:
        for answer in listed:
            keep(answer)


def found(root: Path | str, count: int = 10, space: Space = SPACE, writable: bool = True) -> dict[str, Answer]:
    keys = {f"key{number}" for number in range(count)}
    return {answer.key: answer for answer in AnswerCache(str(root), writable).find(space, keys.intersection)}


@pytest.mark.parametrize("scheme", ["", "file://"])  # a path, and a URI, which is read as a remote store is
def test_what_one_run_kept_another_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("CLLMR_CACHE", str(tmp_path / "local"))
    root = f"{scheme}{tmp_path}"
    assert found(root) == {}
    record(root, answers(2))
    record(root, answers(2, start=2))
    assert found(root, 3) == {answer.key: answer for answer in answers(3)}
    assert found(root, writable=False).keys() == {"key0", "key1", "key2", "key3"}
    assert not list(tmp_path.rglob("*.jsonl"))
    assert len(list((tmp_path / "answers" / SPACE.name).glob("*.parquet"))) == 2


def test_a_digest_changes_with_every_shard_and_with_nothing_else(tmp_path: Path) -> None:
    def digest(root: Path) -> str:
        return AnswerCache(str(root), writable=False).digest()

    nothing = digest(tmp_path / "answers of nobody")
    record(tmp_path, answers(2))
    (tmp_path / "answers" / "half.json.part").write_text("")
    first = digest(tmp_path)
    assert first != nothing
    shutil.copytree(tmp_path / "answers", tmp_path / "moved" / "answers")
    assert digest(tmp_path / "moved") == first
    record(tmp_path, answers(1, start=2))
    assert digest(tmp_path) != first


def test_a_run_leaves_no_journal(tmp_path: Path) -> None:
    record(tmp_path, answers(2))
    assert not list((tmp_path / "answers" / ".work-journals").iterdir())


def test_the_marker_says_who_was_asked_what(tmp_path: Path) -> None:
    record(tmp_path, answers(2))
    (marker,) = (tmp_path / "answers" / SPACE.name).glob("*.json")
    told = json.loads(marker.read_text(encoding="utf-8"))
    assert (told["answers"], told["prompt"], told["prompt_version"], told["decoding"]["model"]) == (2, "item", 1, "m")
    assert told["created_at"].startswith("20")


def test_anything_that_changes_an_answer_is_another_space_and_another_key() -> None:
    spaces = [
        SPACE,
        replace(SPACE, prompt=replace(SPACE.prompt, system="Describe it well.")),
        *(
            replace(SPACE, decoding=replace(SPACE.decoding, **change))
            for change in (
                {"model": "n"},
                {"max_tokens": 99},
                {"temperature": 0.1},
                {"seed": 1},
                {"schema": {"type": "object"}},
            )
        ),
        replace(SPACE, engine={"dtype": "float16"}),
    ]
    assert len({space.name for space in spaces}) == len(spaces)
    keys = {space.request(data).key for space in spaces for data in ("a", "b")}
    assert len(keys) == 2 * len(spaces)
    assert SPACE.request("a") == replace(SPACE).request("a")


def test_a_model_is_asked_anew_where_it_has_answered_the_same_prompt_in_another_space_only(tmp_path: Path) -> None:
    def is_anew(space: Space) -> bool:
        return AnswerCache(str(tmp_path), writable=True).is_asked_anew(space)

    other_tags = replace(SPACE, prompt=replace(SPACE.prompt, system="Describe it with other tags."))
    assert not is_anew(SPACE)
    record(tmp_path, answers(2))
    assert is_anew(other_tags)
    assert not is_anew(SPACE)
    assert not is_anew(replace(other_tags, prompt=replace(other_tags.prompt, name="user")))
    assert not is_anew(replace(other_tags, decoding=replace(SPACE.decoding, model="n")))
    (marker,) = (tmp_path / "answers" / SPACE.name).glob("*.json")
    marker.write_text("{", encoding="utf-8")
    assert not is_anew(other_tags)


def test_shards_are_committed_while_answers_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "SHARD_ANSWERS", 2)
    with AnswerCache(str(tmp_path), writable=True).recorder(SPACE) as keep:
        for answer in answers(5):
            keep(answer)
        assert found(tmp_path).keys() == {"key0", "key1", "key2", "key3"}  # the last one is in the journal of a live run
    assert len(found(tmp_path)) == 5


def test_answers_that_came_before_an_exception_are_kept(tmp_path: Path) -> None:
    def breaks_down() -> None:
        with AnswerCache(str(tmp_path), writable=True).recorder(SPACE) as keep:
            keep(answers(1)[0])
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        breaks_down()
    assert len(found(tmp_path)) == 1


_KILLED = """
import os, signal, sys
from tests.unit.test_sideinfo_cache import SPACE, AnswerCache, answers
with AnswerCache(sys.argv[1], writable=True).recorder(SPACE) as keep:
    for answer in answers(3):
        keep(answer)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_no_answer(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)], env=os.environ | {"PYTHONPATH": os.getcwd()}, check=False
    )
    assert process.returncode == -signal.SIGKILL
    (journal,) = (tmp_path / "answers" / ".work-journals").iterdir()
    journal.write_text(journal.read_text(encoding="utf-8")[:-9], encoding="utf-8")  # the last write was cut off as well
    assert found(tmp_path, writable=False) == {}
    assert found(tmp_path) == {answer.key: answer for answer in answers(2)}
    assert not journal.exists()
    assert len(found(tmp_path, writable=False)) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "no data", "no marker", "marker"])
def test_a_damaged_shard_is_named_and_its_answers_count_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    record(tmp_path, answers(2))
    record(tmp_path, answers(2, start=2))
    monkeypatch.setenv(EVENTS_VARIABLE, str(tmp_path / "events"))
    data = min((tmp_path / "answers" / SPACE.name).glob("*.parquet"))
    whole, marker = data.read_bytes(), data.with_suffix(".json")
    match damage:
        case "flip":
            data.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
        case "truncate":
            data.write_bytes(whole[:-10])
        case "no data":
            data.unlink()
        case "no marker":
            marker.unlink()
        case "marker":
            marker.write_text("{", encoding="utf-8")
    assert len(found(tmp_path)) == 2
    if damage != "no marker":  # a shard without one is a write that was not finished: nothing to tell
        (event,) = [json.loads(line) for line in (tmp_path / "events").read_text(encoding="utf-8").splitlines()]
        assert event["event"] == "shard refused"
        assert data.stem in event["shard"]

"""What is as long as the data is not held in memory: it grows by far less than the texts that pass through."""

import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from components.ids import ITEM, REVIEW, TRAIN, USER
from components.ingest.dataset import Dataset
from components.sideinfo import cache, evidence
from components.sideinfo.backends import Answer, Backend, Decoding, Replay, Request
from components.sideinfo.config import SideinfoConfig
from components.sideinfo.llm import LLMWriter
from components.sideinfo.metadata import MetadataWriter
from components.sideinfo.profiles import SIDES, ProfileWriter
from components.sideinfo.tokens import EstimatedTokens
from tests.llm_server import WORDS, Asked, profile_of
from tests.sideinfo_parents import Small, write_ingest

FEW, MANY = 100, 400
HELD = 50
"""Descriptions and answers that are held at most, so that FEW rows already reach that."""
TEXT = 50  # words of an item's plot, about 350 characters
MOST = 500
"""Bytes that memory may grow by for one item and one user more: 2,100 to 3,500 with lists of their texts, 25 to 415 without."""


class Echo:
    """Answers at once."""

    def answers(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Answer]:
        for request in requests:
            text = json.dumps(profile_of(Asked(request.system, request.data, {}, {})))
            yield Answer(request.key, text, "stop", 100, 20)


def training(root: Path, rows: int) -> Dataset:
    """As many items as users, each user with three items."""
    rng = np.random.default_rng(0)
    items = {
        "title": [f"Film {row}" for row in range(rows)],
        "plot": [f"Part {row} of {' '.join(rng.choice(WORDS, TEXT))}." for row in range(rows)],
    }
    clicks = tuple((user, (user + step) % rows, "train") for user in range(rows) for step in (0, 7, 13))
    return Dataset.load(write_ingest(root, Small("films", clicks, items, num_users=rows)).path()).only(TRAIN)


def llm(backend: Backend, root: Path) -> LLMWriter:
    config = SideinfoConfig(backend="replay", model="tiny", tags=(), min_coverage=0.0)
    answers = cache.AnswerCache(str(root), writable=isinstance(backend, Echo))
    return LLMWriter(config, backend, answers, EstimatedTokens(), Decoding("tiny", 100, 0.0, 0, None))


def metadata(root: Path, rows: int) -> ProfileWriter:
    return MetadataWriter(max_words=100, max_user_items=8, seed=0)


def asked(root: Path, rows: int) -> ProfileWriter:
    return llm(Echo(), root)


def cached(root: Path, rows: int) -> ProfileWriter:
    write(llm(Echo(), root), training(root, rows))
    return llm(Replay("fail"), root)


def quarantined(root: Path, rows: int) -> ProfileWriter:
    return llm(Replay("quarantine"), root)


def write(writer: ProfileWriter, data: Dataset) -> int:
    """What the stage does; profiles that were written."""
    items = writer.write_items(data)
    users = writer.write_users(data, items)
    writer.write_references(data)
    for side in SIDES:
        for column in writer.columns(data, side).values():
            assert sum(1 for _ in column) == len(items)
    return items.known() + users.known()


def peak(root: Path, rows: int, make: Callable[[Path, int], ProfileWriter]) -> tuple[int, int]:
    """Bytes at most, beside the data, and profiles that were written."""
    writer, data = make(root, rows), training(root, rows)
    tracemalloc.start()
    try:
        written = write(writer, data)
        return tracemalloc.get_traced_memory()[1], written
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("make", "written"), [(metadata, 2 * MANY), (asked, 2 * MANY), (cached, 2 * MANY), (quarantined, 0)])
def test_memory_grows_by_a_fraction_of_the_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, int], ProfileWriter], written: int
) -> None:
    monkeypatch.setattr(evidence, "_DESCRIPTIONS", HELD)
    monkeypatch.setattr(cache, "SHARD_ANSWERS", HELD)
    write(make(tmp_path / "first", 20), training(tmp_path / "first", 20))  # what is loaded and compiled once
    few, _ = peak(tmp_path / "few", FEW, make)
    many, found = peak(tmp_path / "many", MANY, make)
    assert found == written
    assert (many - few) / (MANY - FEW) < MOST


def test_the_reviews_of_a_row_are_found_without_a_copy_of_what_all_rows_have(tmp_path: Path) -> None:
    rows = np.arange(100_000, dtype=np.int32)
    pairs = pd.DataFrame({USER: rows % 50_000, ITEM: rows[::-1], REVIEW: [f"read by {row % 50_000}" for row in rows]})
    reviews = evidence.Reviews(replace(training(tmp_path, 20), interactions=pairs), USER)
    tracemalloc.start()
    try:
        found = reviews.of(7)
        assert tracemalloc.get_traced_memory()[1] < rows.nbytes / 10
    finally:
        tracemalloc.stop()
    assert found == {49_992: "read by 7", 99_992: "read by 7"}

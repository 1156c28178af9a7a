"""The prompts: versioned files, filled once per data set, so that every row's request begins with the same text.

A server with a prefix cache then reads that beginning once. A changed file, vocabulary, language or length is another hash,
and so other answers in the cache; change a file's wording only with a new version in its name.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

Name = Literal["item", "user", "repair"]

VERSION = 1
DIRECTORY = Path(__file__).parent / "prompts"
HASH_LENGTH = 16  # hex digits

_TASKS = {
    "item": "what kind of users would enjoy this item",
    "user": "what kind of items this user will like",
}


@dataclass(frozen=True)
class Prompt:
    """What every request of one kind begins with."""

    name: Name
    version: int
    system: str

    @property
    def hash(self) -> str:
        """Of the whole text as it is sent."""
        return _hash(self.system)


def load(name: Name, language: str, max_words: int, tags: Sequence[str], side: Literal["item", "user"] | None = None) -> Prompt:
    """The prompt of that name for a data set.

    Args:
        name: of the file.
        language: the profile is written in.
        max_words: of the profile.
        tags: the data set's closed vocabulary, neutralised.
        side: what `repair` mends.
    """
    values = {"language": language, "max_words": str(max_words), "tags": json.dumps(list(tags), ensure_ascii=False)}
    if side:
        values["task"] = _TASKS[side]
    return Prompt(name, VERSION, Template(_read(name)).substitute(values).strip())


def files_hash() -> str:
    """Of all prompt files: part of the stage's fingerprint."""
    return _hash("\0".join(_read(name) for name in ("item", "user", "repair")))


def _read(name: str) -> str:
    return (DIRECTORY / f"{name}.v{VERSION}.txt").read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]

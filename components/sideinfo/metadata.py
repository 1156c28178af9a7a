"""Profiles without an LLM: what the data say, put into sentences, and nothing else.

There is no reader who could follow an instruction, but what is embedded moves the item all the same: texts go through the
guard.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar
from zlib import crc32

import numpy as np

from components.ids import ITEM, ITEM_ID, TITLE, USER, USER_ID
from components.ingest.dataset import Dataset
from components.sideinfo.guard import REMOVED, neutralise
from components.sideinfo.profiles import Profiles, Reference, Side

T = TypeVar("T")

_LIST = re.compile(r"\s*[|;,]\s*")
_WORD = re.compile(r"[^\W\d_]{3,}")
_MAX_VALUE_WORDS = 4  # "Science Fiction" is a value, a sentence is not
_MAX_DISTINCT = 0.75  # share of different ones among values; phrases of a free text hardly repeat
_TOP_VALUES = 5
_TOP_WORDS = 8
_MIN_FOR_QUARTILES = 4
_MAX_CHARS = 4000  # of a value, as an LLM would be shown of it


@dataclass(frozen=True)
class Attribute:
    """One text column of the items, read as what it holds."""

    name: str
    kind: Literal["number", "values", "words"]
    by_item: list[list[str]]
    """Of each item: its number as written, its values, or its different words; empty where it has none."""
    rarity: dict[str, float]
    """kind "words": log(num_items / items with that word), so that words of every text do not count."""


@dataclass
class MetadataWriter:
    """Repeats what the tables say; a ProfileWriter that asks no LLM and adds nothing."""

    max_words: int
    """Of a profile; what is beyond is cut."""
    max_user_items: int
    """Titles named in a user's profile."""
    seed: int
    """Of the sample of titles, for a user with more items."""
    guarded: Counter[str] = field(default_factory=Counter)
    """See ProfileWriter."""
    _neutral: tuple[Dataset, Dataset] | None = field(default=None, repr=False)

    @property
    def account(self) -> None:
        """None: nobody was asked."""
        return None

    def write_items(self, training: Dataset) -> Profiles:
        """Title and text columns of each item: "Toy Story. Release year: 1995. Genres: Animation, Comedy."

        None for an item with neither a title of its own nor text. (num_items,)
        """
        training = self._neutralised(training)
        columns = training.item_text_columns
        rows = zip(titles_of(training), *(training.items[name] for name in columns), strict=True)
        return [_join([title, *map(labelled, columns, values)], self.max_words) for title, *values in rows]

    def write_users(self, training: Dataset, item_profiles: Sequence[str | None]) -> Profiles:
        """Own text columns of each user, a summary of the text columns of the user's items, and some of their titles.

        None for a user with neither text nor items that have any. (num_users,)
        """
        training = self._neutralised(training)
        columns = training.user_text_columns
        titles = titles_of(training)
        attributes = [attribute(name, training.items[name].tolist()) for name in training.item_text_columns]
        chosen = training.interactions.sort_values([USER, ITEM]).groupby(USER)[ITEM].agg(list).to_dict()
        rows = zip(training.users[USER], training.users[USER_ID], *(training.users[name] for name in columns), strict=True)
        profiles: Profiles = []
        for user, user_id, *values in rows:
            items = chosen.get(user, [])
            own = map(labelled, columns, values)
            tastes = (summary(found, items) for found in attributes)
            named = [titles[item] for item in items if titles[item]]
            examples = _examples(named, self.max_user_items, self.seed, user_id)
            profiles.append(_join([*own, *tastes, examples], self.max_words))
        return profiles

    def write_references(self, training: Dataset) -> list[Reference]:
        """None: without evidence there is nothing to repeat."""
        return []

    def columns(self, training: Dataset, side: Side) -> dict[str, list[Any]]:
        """None."""
        return {}

    def _neutralised(self, training: Dataset) -> Dataset:
        """The data with all texts neutralised: once, for items and users are written of the same."""
        if self._neutral is None or self._neutral[0] is not training:
            self._neutral = training, neutralised(training, self.guarded)
        return self._neutral[1]


def neutralised(training: Dataset, guarded: Counter[str]) -> Dataset:
    """The data set with every title and text neutralised, and nothing in the place of what was taken out.

    Args:
        training: the data.
        guarded: counts how many values something was taken out of, by what it was.
    """

    def neutral(value: str) -> str:
        text, removed = neutralise(value, _MAX_CHARS)
        guarded.update(removed)
        return " ".join(text.replace(REMOVED, " ").split())

    titles = zip(titles_of(training), training.items[TITLE], strict=True)
    items = training.items.assign(**{TITLE: [neutral(own) if own else title for own, title in titles]})
    for name in training.item_text_columns:
        items[name] = [neutral(value) for value in training.items[name]]
    users = training.users.assign(**{name: [*map(neutral, training.users[name])] for name in training.user_text_columns})
    return replace(training, items=items, users=users)


def attribute(name: str, texts: Sequence[str]) -> Attribute:
    """What a column of item texts (num_items,) holds: numbers, values that repeat among items (genres), or free text."""
    told = [text for text in texts if text]
    if told and all(_is_number(text) for text in told):
        return Attribute(name, "number", [[text] if text else [] for text in texts], {})
    values = [distinct(_LIST.split(text)) for text in texts]
    every = [value for listed in values for value in listed]
    short = sum(len(value.split()) for value in every) <= _MAX_VALUE_WORDS * len(every)
    if every and short and len(set(every)) <= _MAX_DISTINCT * len(every):
        return Attribute(name, "values", values, {})
    words = [distinct(_WORD.findall(text.casefold())) for text in texts]
    seen = Counter(word for listed in words for word in listed)
    return Attribute(name, "words", words, {word: math.log(len(texts) / count) for word, count in seen.items()})


def summary(found: Attribute, items: Sequence[int]) -> str:
    """One sentence on what some items have in that column, "" when they have nothing there.

    Args:
        found: the column.
        items: rows of the items.
    """
    listed = [value for item in items for value in found.by_item[item]]
    if found.kind == "number":
        return labelled(found.name, _range(listed))
    counts = Counter(listed)
    if found.kind == "values":
        frequent = sorted(counts, key=lambda value: (-counts[value], value))[:_TOP_VALUES]
        return labelled(f"{found.name}, most frequent first", ", ".join(frequent))
    weights = {word: counts[word] * found.rarity[word] for word in counts if found.rarity[word] > 0}
    # rounded: 2 log 2 and log 4 are equal, and then the word of more items comes first
    telling = sorted(weights, key=lambda word: (-round(weights[word], 9), -counts[word], word))[:_TOP_WORDS]
    return labelled(f"{found.name}, telling words", ", ".join(telling))


def _range(numbers: Sequence[str]) -> str:
    """ "1939 to 1998, half of them 1993 to 1997", as written in the data."""
    ordered = sorted(numbers, key=lambda text: (float(text), text))
    if not ordered or float(ordered[0]) == float(ordered[-1]):
        return ordered[0] if ordered else ""
    span = f"{ordered[0]} to {ordered[-1]}"
    if len(ordered) < _MIN_FOR_QUARTILES:
        return span
    low, high = ordered[(len(ordered) - 1) // 4], ordered[len(ordered) - 1 - (len(ordered) - 1) // 4]
    return f"{span}, half of them {low}" + (f" to {high}" if float(low) != float(high) else "")


def titles_of(dataset: Dataset) -> list[str]:
    """Titles, "" where there is none: ingest then shows the id, which says nothing about the item."""
    pairs = zip(dataset.items[TITLE], dataset.items[ITEM_ID], strict=True)
    return ["" if title == item_id else title for title, item_id in pairs]


def labelled(name: str, text: str) -> str:
    """ "release_year", "1995" as "Release year: 1995"; "" when there is no text."""
    label = name.replace("_", " ").strip()
    return f"{label[:1].upper()}{label[1:]}: {text}" if text else ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def sample(values: Sequence[T], most: int, seed: int, raw_id: str) -> list[T]:
    """At most `most` of `values`, in their order, drawn by seed and id: other users or items do not change the draw."""
    if len(values) <= most:
        return list(values)
    rng = np.random.default_rng([seed, crc32(raw_id.encode())])
    return [values[index] for index in sorted(rng.choice(len(values), most, replace=False))]


def _examples(titles: Sequence[str], most: int, seed: int, user_id: str) -> str:
    """Some of the titles of the user's items, in a sentence."""
    drawn = sample(titles, most, seed, user_id)
    return labelled("Chose" if len(drawn) == len(titles) else "Chose, among others", "; ".join(drawn))


def _join(sentences: Iterable[str], max_words: int) -> str | None:
    """The sentences that say something, at most `max_words` words; None when none does."""
    said = [sentence if sentence.endswith((".", "!", "?")) else f"{sentence}." for sentence in sentences if sentence]
    return " ".join(" ".join(said).split()[:max_words]) or None

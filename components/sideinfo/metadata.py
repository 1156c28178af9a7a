"""Profiles without an LLM: what the data say, put into sentences, and nothing else.

There is no reader who could follow an instruction, but what is embedded moves the item all the same: texts go through the
guard.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, TypeVar, cast
from zlib import crc32

import numpy as np
import pandas as pd

from components.cells import values_of
from components.ids import ITEM_ID, TITLE, USER, USER_ID
from components.ingest.dataset import Dataset
from components.sideinfo.guard import REMOVED, neutralise
from components.sideinfo.ondisk import Texts
from components.sideinfo.profiles import Reference, Side

T = TypeVar("T")

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
    texts: Sequence[str]
    """Of the items; "" where there is none."""

    def of(self, item: int) -> list[str]:
        """Its number as written, its values, or its different words; [] where it has none."""
        return _parts(self.kind, self.texts[item])

    @cached_property
    def rarity(self) -> dict[str, float]:
        """kind "words": log(num_items / items with that word), so that words of every text do not count."""
        seen = Counter(word for text in self.texts for word in _parts(self.kind, text))
        return {word: math.log(len(self.texts) / count) for word, count in seen.items()}


@dataclass(frozen=True)
class Neutral:
    """The data's texts, neutralised once: items and users are written of the same."""

    titles: Sequence[str]
    items: dict[str, Sequence[str]]
    """Text columns of the items."""
    users: dict[str, Sequence[str]]
    """Text columns of the users."""


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
    _neutral: tuple[Dataset, Neutral] | None = field(default=None, repr=False)

    @property
    def account(self) -> None:
        """None: nobody was asked."""
        return None

    def write_items(self, training: Dataset) -> Texts:
        """Title and text columns of each item: "Toy Story. Release year: 1995. Genres: Animation, Comedy."

        None for an item with neither a title of its own nor text. (num_items,)
        """
        neutral = self._neutralised(training)
        rows = zip(neutral.titles, *neutral.items.values(), strict=True)
        return Texts(_join([title, *map(labelled, neutral.items, values)], self.max_words) for title, *values in rows)

    def write_users(self, training: Dataset, item_profiles: Sequence[str | None]) -> Texts:
        """Own text columns of each user, a summary of the text columns of the user's items, and some of their titles.

        None for a user with neither text nor items that have any. (num_users,)
        """
        neutral = self._neutralised(training)
        attributes = [attribute(name, texts) for name, texts in neutral.items.items()]
        chosen = ItemsOfUsers(training)

        def profile(user: int, user_id: str, *values: str) -> str | None:
            items = chosen.of(user)
            own = map(labelled, neutral.users, values)
            tastes = (summary(found, items) for found in attributes)
            named = [title for item in items if (title := neutral.titles[item])]
            examples = _examples(named, self.max_user_items, self.seed, user_id)
            return _join([*own, *tastes, examples], self.max_words)

        return Texts(map(profile, training.users[USER], training.users[USER_ID], *neutral.users.values()))

    def write_references(self, training: Dataset) -> list[Reference]:
        """None: without evidence there is nothing to repeat."""
        return []

    def columns(self, training: Dataset, side: Side) -> dict[str, Iterable[Any]]:
        """None."""
        return {}

    def _neutralised(self, training: Dataset) -> Neutral:
        if self._neutral is None or self._neutral[0] is not training:
            self._neutral = training, neutralised(training, self.guarded)
        return self._neutral[1]


def neutralised(training: Dataset, guarded: Counter[str]) -> Neutral:
    """Every title and text of the data neutralised, and nothing in the place of what was taken out.

    Args:
        training: the data.
        guarded: counts how many values something was taken out of, by what it was.
    """

    def texts(values: Iterable[str]) -> Sequence[str]:
        return cast(Sequence[str], Texts(values))  # "" and never None

    clean = partial(neutral, guarded=guarded)
    titles = zip(map(clean, titles_of(training)), training.items[ITEM_ID], strict=True)
    return Neutral(
        texts("" if title == item_id else title for title, item_id in titles),
        {name: texts(map(clean, training.items[name])) for name in training.item_text_columns},
        {name: texts(map(clean, training.users[name])) for name in training.user_text_columns},
    )


def neutral(value: str, guarded: Counter[str]) -> str:
    """One value without what the guard takes out, which is counted."""
    text, removed = neutralise(value, _MAX_CHARS)
    guarded.update(removed)
    return " ".join(text.replace(REMOVED, " ").split())


def introductions(users: pd.DataFrame, max_words: int, guarded: Counter[str], counted: int) -> Texts:
    """Own text columns of each user and nothing else: "Age: 24. Occupation: technician."; None where there is none.

    This is all that is known of somebody who has done nothing yet, so nobody asks an LLM about it: it is for telling newcomers
    from what others with such a text chose.

    Args:
        users: user_id and text columns, (n, ...).
        max_words: of a text; what is beyond is cut.
        guarded: see `neutralised`.
        counted: how many users, the first ones, it has counted already, when their profiles were written.
    """
    names = [name for name in users.columns if name != USER_ID]
    counts: list[Counter[str]] = [Counter()] * counted + [guarded] * (len(users) - counted)
    values = (map(neutral, users[name], counts) for name in names)
    rows = zip(*values, strict=True) if names else ([] for _ in range(len(users)))
    return Texts(_join(map(labelled, names, row), max_words) for row in rows)


class ItemsOfUsers:
    """The training items of each user, as arrays and not as lists."""

    def __init__(self, training: Dataset) -> None:
        self._matrix = training.matrix()

    def of(self, user: int) -> list[int]:
        """Rows of the items, sorted."""
        start, end = self._matrix.indptr[user : user + 2]
        items: list[int] = self._matrix.indices[start:end].tolist()
        return items


def attribute(name: str, texts: Sequence[str]) -> Attribute:
    """What a column of item texts (num_items,) holds: numbers, values that repeat among items (genres), or free text."""
    told = numbers = values = words = 0
    for text in texts:
        listed = _parts("values", text)
        told += bool(text)
        numbers += _is_number(text)
        values += len(listed)
        words += sum(len(value.split()) for value in listed)
    if told and numbers == told:
        return Attribute(name, "number", texts)
    if values and words <= _MAX_VALUE_WORDS * values:  # else it is free text, whose parts are too many to be counted
        different = {value for text in texts for value in _parts("values", text)}
        if len(different) <= _MAX_DISTINCT * values:
            return Attribute(name, "values", texts)
    return Attribute(name, "words", texts)


def _parts(kind: Literal["number", "values", "words"], text: str) -> list[str]:
    match kind:
        case "number":
            return [text] if text else []
        case "values":
            return values_of(text)
        case "words":
            return distinct(_WORD.findall(text.casefold()))


def summary(found: Attribute, items: Sequence[int]) -> str:
    """One sentence on what some items have in that column, "" when they have nothing there.

    Args:
        found: the column.
        items: rows of the items.
    """
    listed = [value for item in items for value in found.of(item)]
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

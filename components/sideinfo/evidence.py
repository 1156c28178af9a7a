"""What an LLM is shown of an item or a user: neutralised lines, the short ones first, within a budget of tokens.

Only training interactions reach this module: a profile that has seen a held-out item tells it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import pandas as pd

from components.ids import ITEM, ITEM_ID, REVIEW, USER, USER_ID
from components.ingest.dataset import Dataset
from components.sideinfo.guard import delimit, neutralise
from components.sideinfo.metadata import Attribute, ItemsOfUsers, attribute, labelled, sample, titles_of
from components.sideinfo.tokens import Tokens, fit

NOTHING_KNOWN = "(nothing is known)"

_TITLE_CHARS = 300
_FIELD_CHARS = 4000
_REVIEW_CHARS = 1000
_TAG_CHARS = 40
_SHORT = 120  # characters of a column's typical value: facts come before descriptions, whatever their order in the table
_MIN_TAG_ITEMS = 2
_DESCRIPTIONS, _PLAIN_VALUES = 16_384, 4096  # of items, and of values, that are held: the frequent ones, at most 70 MB


@dataclass(frozen=True)
class Limits:
    """How much of a row an LLM is shown."""

    tokens: Tokens
    room: int
    """Tokens of a row's data."""
    max_reviews: int
    """Reviews of an item, a seeded sample; no effect on data without reviews."""
    max_user_items: int
    """Items of a user, a seeded sample of the training items."""
    seed: int


def of_items(training: Dataset, limits: Limits, guarded: Counter[str]) -> Iterator[str | None]:
    """Title, text columns and some reviews of each item, as they go into requests; None where nothing is known.

    Args:
        training: the data.
        limits: of what is shown.
        guarded: counts how many values something was taken out of, by what it was.
    """
    columns = _short_first(training.items, training.item_text_columns)
    reviews = Reviews(training, ITEM)
    rows = zip(training.items[ITEM_ID], titles_of(training), *(training.items[name] for name in columns), strict=True)
    for row, (item_id, title, *values) in enumerate(rows):
        lines = [_line("title", title, _TITLE_CHARS, guarded)]
        lines += [_line(name, value, _FIELD_CHARS, guarded) for name, value in zip(columns, values, strict=True)]
        chosen = sample(list(reviews.of(row).values()), limits.max_reviews, limits.seed, item_id)
        lines += [_line("review", review, _REVIEW_CHARS, guarded) for review in chosen]
        yield _block(lines, limits)


def of_users(
    training: Dataset, item_profiles: Sequence[str | None], limits: Limits, guarded: Counter[str]
) -> Iterator[str | None]:
    """Text columns of each user, and some of the user's items: title, generated profile, the user's review.

    Args:
        training: the data.
        item_profiles: texts that were written for the items, (num_items,).
        limits: of what is shown.
        guarded: see `of_items`; what an item is described by counts once, however many users are shown it.
    """
    columns = _short_first(training.users, training.user_text_columns)
    chosen = ItemsOfUsers(training)
    titles = titles_of(training)
    reviews = Reviews(training, USER)
    counted = bytearray(training.num_items)

    @lru_cache(_DESCRIPTIONS)
    def described(item: int) -> str:
        found = _described(titles[item], item_profiles[item], Counter() if counted[item] else guarded)
        counted[item] = True
        return found

    rows = zip(training.users[USER_ID], *(training.users[name] for name in columns), strict=True)
    for user, (user_id, *values) in enumerate(rows):
        lines = [_line(name, value, _FIELD_CHARS, guarded) for name, value in zip(columns, values, strict=True)]
        told = [item for item in chosen.of(user) if titles[item] or item_profiles[item]]
        shown = sample(told, limits.max_user_items, limits.seed, user_id)
        share = limits.room // max(1, len(shown))
        own_words = reviews.of(user)
        for item in shown:
            own = _line("the user's own words", own_words.get(item, ""), _REVIEW_CHARS, guarded)
            lines.append(" ".join(fit([". ".join(filter(None, (described(item), own)))], limits.tokens, share)))
        yield _block(lines, limits)


def of_group(name: str) -> str:
    """The data of a request that withholds everything but a group's name; "" withholds that as well."""
    return delimit([neutralise(name, _TITLE_CHARS).text or NOTHING_KNOWN])


def vocabulary(training: Dataset, most: int) -> list[str]:
    """Values that repeat among items (genres, categories): the closed vocabulary of tags, sorted; the most frequent ones."""
    columns = _value_columns(training.items, training.item_text_columns)
    counts = Counter(value for found in columns for row in range(training.num_items) for value in found.of(row))
    frequent = sorted((value for value in counts if counts[value] >= _MIN_TAG_ITEMS), key=lambda value: (-counts[value], value))
    return sorted(value for value in frequent[:most] if _is_plain(value))


def item_groups(training: Dataset) -> Iterator[list[str]]:
    """The classes each item belongs to, such as "Genres: Drama"; (num_items,)."""
    return map(_groups(training.items, training.item_text_columns), range(training.num_items))


def user_groups(training: Dataset) -> Iterator[list[str]]:
    """The segments each user belongs to: what the users' own columns say, or the class most items have; (num_users,)."""
    if _value_columns(training.users, training.user_text_columns):
        yield from map(_groups(training.users, training.user_text_columns), range(training.num_users))
        return
    of_item = _groups(training.items, training.item_text_columns)
    chosen = ItemsOfUsers(training)
    for user in range(training.num_users):
        counts = Counter(group for item in chosen.of(user) for group in of_item(item))
        yield sorted(counts, key=lambda group: (-counts[group], group))[:1]


class Reviews:
    """The reviews of each row of one side, where the data have any.

    Args:
        training: the data.
        side: ITEM or USER.
    """

    def __init__(self, training: Dataset, side: str) -> None:
        pairs = training.interactions
        self._texts = pairs[REVIEW].to_numpy() if REVIEW in pairs else np.empty(0, dtype=object)
        told = np.flatnonzero(self._texts != "")
        one, other = (pairs[name].to_numpy(np.int32)[told] for name in ((USER, ITEM) if side == USER else (ITEM, USER)))
        order = np.lexsort((other, one))
        self._places, self._one, self._other = told[order], one[order], other[order]

    def of(self, row: int) -> dict[int, str]:
        """By row of the other side, in its order."""
        rows = np.array([row, row + 1], self._one.dtype)  # of another type they would have the whole column copied for each row
        start, end = np.searchsorted(self._one, rows)
        return dict(zip(self._other[start:end].tolist(), self._texts[self._places[start:end]], strict=True))


def _groups(frame: pd.DataFrame, names: Iterable[str]) -> Callable[[int], list[str]]:
    """Gives what a row says of itself in the columns of values, such as "Genres: Drama"."""
    columns = _value_columns(frame, names)
    is_plain = lru_cache(_PLAIN_VALUES)(_is_plain)
    return lambda row: [labelled(found.name, value) for found in columns for value in found.of(row) if is_plain(value)]


def _value_columns(frame: pd.DataFrame, names: Iterable[str]) -> list[Attribute]:
    """The text columns that hold values which repeat."""
    found = (attribute(name, frame[name].tolist()) for name in names)
    return [column for column in found if column.kind == "values"]


def _short_first(frame: pd.DataFrame, columns: Iterable[str]) -> list[str]:
    return sorted(columns, key=lambda name: frame[name].str.len().mean() > _SHORT)


def _line(name: str, value: str, max_chars: int, guarded: Counter[str]) -> str:
    """ "Genres: Drama", "" when nothing is left of the value."""
    if not value:
        return ""
    text, removed = neutralise(value, max_chars)
    guarded.update(removed)
    return labelled(_plain_name(name), text)


@cache
def _plain_name(name: str) -> str:
    return neutralise(name, _TAG_CHARS).text


def _described(title: str, profile: str | None, guarded: Counter[str]) -> str:
    """ "Chose: Alien. Who enjoys it: ..." """
    chose = _line("chose", title or "(without a title)", _TITLE_CHARS, guarded).rstrip(".")
    who = _line("who enjoys it", profile or "", _FIELD_CHARS, guarded).rstrip(".")
    return ". ".join(filter(None, (chose, who)))


def _block(lines: Iterable[str], limits: Limits) -> str | None:
    kept = fit(filter(None, lines), limits.tokens, limits.room)
    return delimit(kept) if kept else None


def _is_plain(value: str) -> bool:
    """Whether a value is a tag as it stands: short, and not text that the guard would change."""
    return neutralise(value, _TAG_CHARS).text == value

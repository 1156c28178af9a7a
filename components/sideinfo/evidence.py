"""What an LLM is shown of an item or a user: neutralised lines, the short ones first, within a budget of tokens.

Only training interactions reach this module: a profile that has seen a held-out item tells it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pandas as pd

from components.ids import ITEM, ITEM_ID, REVIEW, USER, USER_ID
from components.ingest.dataset import Dataset
from components.sideinfo.guard import delimit, neutralise
from components.sideinfo.metadata import Attribute, attribute, labelled, sample, titles_of
from components.sideinfo.tokens import Tokens, fit

NOTHING_KNOWN = "(nothing is known)"

_TITLE_CHARS = 300
_FIELD_CHARS = 4000
_REVIEW_CHARS = 1000
_TAG_CHARS = 40
_SHORT = 120  # characters of a column's typical value: facts come before descriptions, whatever their order in the table
_MIN_TAG_ITEMS = 2


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


@dataclass
class Evidence:
    """The rows' data as they go into requests."""

    texts: list[str | None]
    """By row; None where nothing is known, so that nothing is asked."""
    guarded: Counter[str] = field(default_factory=Counter)
    """How many values something was taken out of, by what it was."""


def of_items(training: Dataset, limits: Limits) -> Evidence:
    """Title, text columns and some reviews of each item, (num_items,)."""
    found = Evidence([])
    columns = _short_first(training.items, training.item_text_columns)
    reviews = _reviews(training, ITEM)
    rows = zip(training.items[ITEM_ID], titles_of(training), *(training.items[name] for name in columns), strict=True)
    for row, (item_id, title, *values) in enumerate(rows):
        lines = [_line("title", title, _TITLE_CHARS, found)]
        lines += [_line(name, value, _FIELD_CHARS, found) for name, value in zip(columns, values, strict=True)]
        chosen = sample(list(reviews.get(row, {}).values()), limits.max_reviews, limits.seed, item_id)
        lines += [_line("review", review, _REVIEW_CHARS, found) for review in chosen]
        found.texts.append(_block(lines, limits))
    return found


def of_users(training: Dataset, item_profiles: Sequence[str | None], limits: Limits) -> Evidence:
    """Text columns of each user, and some of the user's items: title, generated profile, the user's review, (num_users,)."""
    found = Evidence([])
    columns = _short_first(training.users, training.user_text_columns)
    chosen = _items_by_user(training)
    titles = titles_of(training)
    reviews = _reviews(training, USER)
    described = cache(lambda item: _described(titles[item], item_profiles[item], found))  # once, whoever chose it
    rows = zip(training.users[USER_ID], *(training.users[name] for name in columns), strict=True)
    for user, (user_id, *values) in enumerate(rows):
        lines = [_line(name, value, _FIELD_CHARS, found) for name, value in zip(columns, values, strict=True)]
        told = [item for item in chosen.get(user, []) if titles[item] or item_profiles[item]]
        shown = sample(told, limits.max_user_items, limits.seed, user_id)
        share = limits.room // max(1, len(shown))
        for item in shown:
            own = _line("the user's own words", reviews.get(user, {}).get(item, ""), _REVIEW_CHARS, found)
            lines.append(" ".join(fit([". ".join(filter(None, (described(item), own)))], limits.tokens, share)))
        found.texts.append(_block(lines, limits))
    return found


def of_group(name: str) -> str:
    """The data of a request that withholds everything but a group's name; "" withholds that as well."""
    return delimit([neutralise(name, _TITLE_CHARS).text or NOTHING_KNOWN])


def vocabulary(training: Dataset, most: int) -> list[str]:
    """Values that repeat among items (genres, categories): the closed vocabulary of tags, sorted; the most frequent ones."""
    columns = _value_columns(training.items, training.item_text_columns)
    counts = Counter(value for found in columns for values in found.by_item for value in values)
    frequent = sorted((value for value in counts if counts[value] >= _MIN_TAG_ITEMS), key=lambda value: (-counts[value], value))
    return sorted(value for value in frequent[:most] if _is_plain(value))


def item_groups(training: Dataset) -> list[list[str]]:
    """The classes each item belongs to, such as "Genres: Drama"; (num_items,)."""
    columns = _value_columns(training.items, training.item_text_columns)
    return [
        [labelled(found.name, value) for found in columns for value in found.by_item[item] if _is_plain(value)]
        for item in range(training.num_items)
    ]


def user_groups(training: Dataset, groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """The segments each user belongs to: what the users' own columns say; without any, the class most of the items have.

    Args:
        training: the data.
        groups: of `item_groups`.
    """
    own = _value_columns(training.users, training.user_text_columns)
    if own:
        return [
            [labelled(found.name, value) for found in own for value in found.by_item[user] if _is_plain(value)]
            for user in range(training.num_users)
        ]
    segments: list[list[str]] = []
    chosen = _items_by_user(training)
    for user in range(training.num_users):
        counts = Counter(group for item in chosen.get(user, []) for group in groups[item])
        segments.append(sorted(counts, key=lambda group: (-counts[group], group))[:1])
    return segments


def _value_columns(frame: pd.DataFrame, names: Iterable[str]) -> list[Attribute]:
    """The text columns that hold values which repeat."""
    found = (attribute(name, frame[name].tolist()) for name in names)
    return [column for column in found if column.kind == "values"]


def _items_by_user(training: Dataset) -> dict[Any, list[int]]:
    return training.interactions.sort_values([USER, ITEM]).groupby(USER)[ITEM].agg(list).to_dict()


def _reviews(training: Dataset, side: str) -> dict[int, dict[int, str]]:
    """Reviews by row of one side, then by row of the other; none where the data have none."""
    if REVIEW not in training.interactions:
        return {}
    found: dict[int, dict[int, str]] = {}
    told = training.interactions[training.interactions[REVIEW] != ""].sort_values([USER, ITEM])
    for user, item, review in zip(told[USER], told[ITEM], told[REVIEW], strict=True):
        one, other = (user, item) if side == USER else (item, user)
        found.setdefault(one, {})[other] = review
    return found


def _short_first(frame: pd.DataFrame, columns: Iterable[str]) -> list[str]:
    return sorted(columns, key=lambda name: frame[name].str.len().mean() > _SHORT)


def _line(name: str, value: str, max_chars: int, found: Evidence) -> str:
    """ "Genres: Drama", "" when nothing is left of the value."""
    if not value:
        return ""
    text, removed = neutralise(value, max_chars)
    found.guarded.update(removed)
    return labelled(_plain_name(name), text)


@cache
def _plain_name(name: str) -> str:
    return neutralise(name, _TAG_CHARS).text


def _described(title: str, profile: str | None, found: Evidence) -> str:
    """ "Chose: Alien. Who enjoys it: ..."; only once counted in what was taken out."""
    chose = _line("chose", title or "(without a title)", _TITLE_CHARS, found).rstrip(".")
    who = _line("who enjoys it", profile or "", _FIELD_CHARS, found).rstrip(".")
    return ". ".join(filter(None, (chose, who)))


def _block(lines: Iterable[str], limits: Limits) -> str | None:
    kept = fit(filter(None, lines), limits.tokens, limits.room)
    return delimit(kept) if kept else None


def _is_plain(value: str) -> bool:
    """Whether a value is a tag as it stands: short, and not text that the guard would change."""
    return neutralise(value, _TAG_CHARS).text == value

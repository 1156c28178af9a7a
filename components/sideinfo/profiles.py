"""The interface of everything that writes profile texts."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from components.ingest.dataset import Dataset
from components.sideinfo.ondisk import Quarantine, Texts

Side = Literal["item", "user"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Reference:
    """What is written when the evidence on a single item or user is withheld."""

    side: Side
    group: str
    """The class of items or segment of users that was named, such as "Genres: Drama"; "" when nothing was."""
    profile: str | None
    """None where no answer could be used."""


@dataclass
class Account:
    """What writing took: for the report and the bill."""

    rows: int = 0
    """Items, users and references of which something is known, or that were asked for without evidence."""
    asked: int = 0
    """Requests sent."""
    cached: int = 0
    """Requests whose answer was there already."""
    repaired: int = 0
    """Rows whose first answer was rejected and a later one was not."""
    unanswered: int = 0
    """Requests to which no answer came."""
    tokens_in: int = 0
    """Read by the LLM for what was asked now."""
    tokens_out: int = 0
    """Written by it."""
    seconds: float = 0.0
    """Wall-clock time of asking."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Answers that were not used, by reason."""
    quarantine: Quarantine = field(default_factory=Quarantine)
    sides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the items and of the users: how many are ``known`` (something is), how many of those are ``covered`` by a profile, and
    ``why_not`` the others, in words."""
    exact_tokens: bool = False
    """Whether budgets were kept with the model's own tokenizer."""

    def facts(self, price_in: float, price_out: float) -> dict[str, Any]:
        """The figures, with `price_in` and `price_out` per million tokens."""
        return {
            "rows": self.rows,
            "asked": self.asked,
            "cached": self.cached,
            "repaired": self.repaired,
            "unanswered": self.unanswered,
            "quarantined": len(self.quarantine),
            "sides": self.sides,
            "coverage": round(1 - len(self.quarantine) / self.rows, 6) if self.rows else 1.0,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "tokens_per_second": round(self.tokens_out / self.seconds, 1) if self.seconds else 0.0,
            "seconds_asking": round(self.seconds, 3),
            "cost": round((self.tokens_in * price_in + self.tokens_out * price_out) / 1e6, 4),
            "exact_token_budgets": self.exact_tokens,
        }


class ProfileWriter(Protocol):
    """Writes one text for every item and every user.

    All methods get a data set that holds the training interactions alone: a profile that has seen a held-out item tells it.
    """

    guarded: Counter[str]
    """Values of the data that the guard took something out of, by what it was."""

    @property
    def account(self) -> Account | None:
        """What an LLM was asked so far; None where no LLM writes, and the report says so."""
        ...

    def write_items(self, training: Dataset) -> Texts:
        """Profiles of the items, num_items texts; None where nothing is known."""
        ...

    def write_users(self, training: Dataset, item_profiles: Sequence[str | None]) -> Texts:
        """Profiles of the users, num_users texts; `item_profiles` is what `write_items` gave, read by row."""
        ...

    def write_references(self, training: Dataset) -> list[Reference]:
        """What is written without evidence: of nothing, and of each class of items and segment of users; [] without an LLM."""
        ...

    def columns(self, training: Dataset, side: Side) -> dict[str, Iterable[Any]]:
        """What else is known of the rows written, by name of the column; each in the order of the rows, to be read once."""
        ...

"""The interface of everything that writes profile texts."""

from collections.abc import Sequence
from typing import Protocol

from components.ingest.dataset import Dataset

Profiles = list[str | None]
"""A text per vocabulary row; None where nothing is known."""


class ProfileWriter(Protocol):
    """Writes one text for every item and every user.

    Both methods get a data set that holds the training interactions alone: a profile that has seen a held-out item tells it.
    """

    @property
    def uses_llm(self) -> bool:
        """Whether an LLM writes; the report says so."""
        ...

    def write_items(self, training: Dataset) -> Profiles:
        """Profiles of the items, num_items texts."""
        ...

    def write_users(self, training: Dataset, item_profiles: Sequence[str | None]) -> Profiles:
        """Profiles of the users, num_users texts; `item_profiles` is what `write_items` gave."""
        ...

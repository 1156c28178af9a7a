"""Column names and id vocabularies: fixed once for the whole platform.

Raw ids (``user_id``, ``item_id``) are strings as the user gave them, without blanks around them; ``user`` and ``item`` are
their row numbers, 0-based, used by every matrix. A vocabulary is sorted, so it depends on the set of ids and never on the
order of rows.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

USER_ID = "user_id"
ITEM_ID = "item_id"
USER = "user"
ITEM = "item"
RATING = "rating"
TIMESTAMP = "timestamp"
SPLIT = "split"
TITLE = "title"
REVIEW = "review"

TRAIN = "train"
VALIDATION = "validation"
TEST = "test"
SPLITS = (TRAIN, VALIDATION, TEST)

UNKNOWN = -1

MAX_ID_LENGTH = 256
"""Characters of a raw id at most: the API refuses longer ones, so ingest does as well."""


class Vocabulary:
    """Raw id <-> row number, in both directions.

    Unknown ids map to ``UNKNOWN`` (-1): the caller decides what an unknown id means.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = list(ids)
        self._row = {raw: row for row, raw in enumerate(self.ids)}
        if len(self._row) != len(self.ids):
            raise ValueError(f"ids must be unique: {len(self.ids)} ids, {len(self._row)} distinct")

    @classmethod
    def build(cls, raw_ids: Iterable[str]) -> "Vocabulary":
        """The vocabulary of a set of ids; numeric ids sort by value ('9' before '10'), others as text."""
        unique = set(raw_ids)
        if all(raw.isascii() and raw.isdigit() for raw in unique):
            return cls(sorted(unique, key=lambda raw: (int(raw), raw)))
        return cls(sorted(unique))

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, raw_id: str) -> int:
        """Row number of one id, ``UNKNOWN`` when it is not in the vocabulary."""
        return self._row.get(raw_id, UNKNOWN)

    def rows(self, raw_ids: Iterable[str]) -> npt.NDArray[np.int64]:
        """Row numbers, shape (len(raw_ids),), ``UNKNOWN`` where an id is not in the vocabulary."""
        return np.fromiter((self._row.get(raw, UNKNOWN) for raw in raw_ids), dtype=np.int64)

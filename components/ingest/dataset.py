"""The data set that ingest writes, as every later stage reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from components.artifacts import read_json
from components.errors import ArtifactError, DataError, first_line
from components.ids import ITEM, SPLIT, SPLITS, TEST, TRAIN, USER, USER_ID, VALIDATION

INTERACTIONS_FILE = "interactions.parquet"
USERS_FILE = "users.parquet"
NEWCOMERS_FILE = "newcomers.parquet"
ITEMS_FILE = "items.parquet"
REMOVED_FILE = "removed.parquet"
DATA_CARD_FILE = "data_card.json"


@dataclass(frozen=True)
class Dataset:
    """Users, items and their interactions, by row of the vocabulary."""

    name: str
    users: pd.DataFrame
    """user (int32, = its row), user_id, the users' text columns (str, "" where there is none); (num_users, ...)."""
    items: pd.DataFrame
    """item (int32, = its row), item_id, title, the items' text columns (str, "" where there is none); (num_items, ...)."""
    interactions: pd.DataFrame
    """user_id, item_id, user, item (int32 rows), rating (float32, NaN if none), timestamp (int64 Unix seconds, 0 if none),
    split ("train", "validation", "test"), and review (str, "" if none) where the source has them; sorted by user, item."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads the directory of an ingest artifact; raises ArtifactError when a file is missing or damaged."""
        directory = Path(path)
        try:
            card = read_json(directory / DATA_CARD_FILE)
            users, items, interactions = (
                pq.read_table(directory / name).to_pandas() for name in (USERS_FILE, ITEMS_FILE, INTERACTIONS_FILE)
            )
            return cls(card["name"], users, items, interactions)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            reason = first_line(error)
            raise ArtifactError(f"the data set in '{directory}' cannot be read: {reason}.", "Run ingest again.") from None

    @property
    def num_users(self) -> int:
        """Users in the vocabulary."""
        return len(self.users)

    @property
    def num_items(self) -> int:
        """Items in the vocabulary."""
        return len(self.items)

    @property
    def item_text_columns(self) -> list[str]:
        """Names of the items' text columns, without the title."""
        return list(self.items.columns[3:])

    @property
    def user_text_columns(self) -> list[str]:
        """Names of the users' text columns."""
        return list(self.users.columns[2:])

    def only(self, *splits: str) -> "Dataset":
        """The same users and items with the interactions of some splits alone."""
        assert set(splits) <= set(SPLITS), splits
        chosen = self.interactions[self.interactions[SPLIT].isin(splits)].reset_index(drop=True)
        return Dataset(self.name, self.users, self.items, chosen)

    def check_held_out(self) -> None:
        """Raises DataError where nothing is there to tune on, or nothing to test on: train and evaluate need both."""
        counts = self.interactions[SPLIT].value_counts()
        for split in (VALIDATION, TEST):
            if split not in counts:
                raise DataError(
                    f"data set '{self.name}' has no {split} interactions: {counts.get(TRAIN, 0)} are in the training split.",
                    "Give more interactions, or lower the thresholds and the k-core of ingest.",
                )

    def matrix(self, *splits: str) -> sparse.csr_array:
        """The interactions of some splits (all if none is named): binary float32, (num_users, num_items), indices sorted."""
        chosen = self.only(*(splits or SPLITS)).interactions
        rows: npt.NDArray[np.int32] = chosen[USER].to_numpy(np.int32)
        columns: npt.NDArray[np.int32] = chosen[ITEM].to_numpy(np.int32)
        ones = np.ones(len(chosen), dtype=np.float32)
        matrix = sparse.csr_array((ones, (rows, columns)), shape=(self.num_users, self.num_items))
        matrix.sum_duplicates()  # ingest keeps one interaction per user and item; this also sorts the indices
        matrix.data[:] = 1.0
        return matrix


def load_newcomers(path: str | Path) -> pd.DataFrame:
    """Users of an ingest artifact who have a text and no interaction: user_id and text columns; may be empty."""
    file = Path(path) / NEWCOMERS_FILE
    return pq.read_table(file).to_pandas() if file.exists() else pd.DataFrame({USER_ID: pd.Series(dtype=object)})

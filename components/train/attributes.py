"""What the bundle's items can be filtered by: columns of the items' table, typed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.cells import values_of
from components.errors import ConfigError, did_you_mean
from components.progress import emit
from components.train.config import TrainConfig
from serving.bundle import ATTRIBUTES_FILE

VALUES, NUMBERS = pa.list_(pa.string()), pa.float64()
"""Types of a column in the file; serving refuses others."""
MOST_VALUES = 200
"""Distinct values up to which a column is taken where none is named: a description has as many as there are items."""
MOST_STAND_INS = 3
"""Distinct texts up to which those among numbers are taken for stand-ins of missing ones, such as "N/A" and "unknown"; book
numbers that end with X and episodes such as 12a are more, and are no mistake."""


def attributes_of(items: pd.DataFrame, texts: list[str], config: TrainConfig) -> pa.Table:
    """One row per item, one column per column of the items' table that can be filtered by, typed.

    A column whose texts are all numbers becomes numbers, any other becomes lists of values.

    Args:
        items: the items' table of ingest.
        texts: its text columns, without the title.
        config: which of them, and what stands between the values of one cell.

    Where none is named, a column that looks as if it should be one of numbers, and is not, is told.

    Raises ConfigError for a column that is named and that the items do not have, or that says nothing of any item.
    """
    _check_named(items, texts, config)
    return pa.table(dict(_columns(items, texts, config)))


def _check_named(items: pd.DataFrame, texts: list[str], config: TrainConfig) -> None:
    for name in config.filter_columns or ():
        if name not in texts:
            raise ConfigError(
                f"train.filter_columns names '{name}', which is no text column of the items.", did_you_mean(name, texts)
            )
        if not (items[name] != "").any():
            raise ConfigError(
                f"train.filter_columns names '{name}', of which no item has anything.", "Leave it out, or fill the column."
            )


def _columns(items: pd.DataFrame, texts: list[str], config: TrainConfig) -> Iterator[tuple[str, pa.Array]]:
    for name in texts if config.filter_columns is None else config.filter_columns:
        cells = items[name]
        is_told = cells != ""
        if not is_told.any():
            continue
        numbers = pd.to_numeric(cells.where(is_told), errors="coerce").to_numpy(np.float64)
        others = cells[is_told & ~np.isfinite(numbers)]
        if others.empty:
            yield name, pa.array(numbers, NUMBERS, from_pandas=True)
            continue
        split = [values_of(cell, config.filter_separator or "") for cell in cells]
        is_chosen = config.filter_columns is not None or len(set().union(*split)) <= MOST_VALUES
        if config.filter_columns is None and 2 * len(others) < is_told.sum() and others.nunique() <= MOST_STAND_INS:
            now = "is filtered by its values and not by numbers" if is_chosen else "is no filter"
            emit(
                "warning",
                stage="train",
                message=f"'{name}' {now}: {len(others)} of {is_told.sum()} cells hold no number, for example "
                f"{others.iloc[0]!r}. Where numbers are meant, empty or correct them",
            )
        if is_chosen:
            yield name, pa.array(split, VALUES)


def write_attributes(directory: Path, table: pa.Table) -> None:
    """Adds them to a bundle; nothing where there are none."""
    if table.num_columns:
        pq.write_table(table, directory / ATTRIBUTES_FILE)

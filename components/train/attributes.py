"""What the bundle's items can be filtered by: columns of the items' table, typed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.errors import ConfigError, did_you_mean
from components.train.config import TrainConfig
from serving.bundle import ATTRIBUTES_FILE

VALUES, NUMBERS = pa.list_(pa.string()), pa.float64()
"""Types of a column in the file; serving refuses others."""
MOST_VALUES = 200
"""Distinct values up to which a column is taken where none is named: a description has as many as there are items."""


def attributes_of(items: pd.DataFrame, texts: list[str], config: TrainConfig) -> pa.Table:
    """One row per item, one column per column of the items' table that can be filtered by, typed.

    A column whose texts are all numbers becomes numbers, any other becomes lists of values.

    Args:
        items: the items' table of ingest.
        texts: its text columns, without the title.
        config: which of them, and what stands between the values of one cell.

    Raises ConfigError as `check_filter_columns`.
    """
    check_filter_columns(items, texts, config)
    return pa.table(dict(_columns(items, texts, config)))


def check_filter_columns(items: pd.DataFrame, texts: list[str], config: TrainConfig) -> None:
    """Raises ConfigError for a column that is named and that the items do not have, or that says nothing of any item."""
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
        if not (cells != "").any():
            continue
        numbers = pd.to_numeric(cells.where(cells != ""), errors="coerce").to_numpy(np.float64)
        if np.isfinite(numbers[cells != ""]).all():
            yield name, pa.array(numbers, NUMBERS, from_pandas=True)
            continue
        split = [_values(cell, config.filter_separator) for cell in cells]
        if config.filter_columns is not None or len(set().union(*split)) <= MOST_VALUES:
            yield name, pa.array(split, VALUES)


def _values(cell: str, separator: str | None) -> list[str]:
    """The values of one cell, each once."""
    parts = [cell] if separator is None else cell.split(separator)
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def write_attributes(directory: Path, table: pa.Table) -> None:
    """Adds them to a bundle; nothing where there are none."""
    if table.num_columns:
        pq.write_table(table, directory / ATTRIBUTES_FILE)

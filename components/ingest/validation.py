"""What a row must be to count, and why one does not: schemas whose failures are reasons.

A rejected row is quarantined with its reason, it never stops the stage; the reasons are the names of the checks.
"""

from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pandera

from components.cells import NO_VALUE
from components.ids import ITEM_ID, MAX_ID_LENGTH, RATING, TIMESTAMP, USER_ID

LARGEST_TIME = 2.0**63
"""Nanoseconds since 1970 that fit in 64 bits."""


def is_present(ids: pd.Series) -> pd.Series:
    """Whether each text is an id."""
    return ~ids.str.casefold().isin(NO_VALUE)


def is_askable(ids: pd.Series) -> pd.Series:
    """Whether each text is short enough for the API to be asked for it."""
    return ids.str.len() <= MAX_ID_LENGTH


def has_no_nul(ids: pd.Series) -> pd.Series:
    """Whether each text is free of NUL: pandas ends a text there, and ids that differ after it become one."""
    return ~ids.str.contains("\0", regex=False)


def is_number(texts: pd.Series) -> pd.Series:
    """Whether each text is a finite number."""
    return pd.Series(np.isfinite(numbers(texts)), index=texts.index)


def is_number_or_empty(texts: pd.Series) -> pd.Series:
    """Whether each text is a finite number, or stands for none."""
    return is_number(texts) | ~is_present(texts.str.strip())


def is_time(texts: pd.Series) -> pd.Series:
    """Whether each text is a number of (milli-, micro-, nano-) seconds since 1970; other texts are `is_number`'s business."""
    values = numbers(texts)
    return pd.Series(~np.isfinite(values) | ((values >= 0) & (values < LARGEST_TIME)), index=texts.index)


def numbers(texts: pd.Series) -> np.ndarray:
    """float64, NaN where a text is not a number."""
    return pd.to_numeric(texts, errors="coerce").to_numpy(np.float64)


def _id_column(column: str, unique: bool = False) -> pandera.Column:
    checks = [
        pandera.Check(is_present, name=f"missing_{column}"),
        pandera.Check(is_askable, name=f"{column}_too_long"),
        pandera.Check(has_no_nul, name=f"{column}_has_nul"),
    ]
    if unique:
        checks.append(pandera.Check(lambda ids: ~ids.duplicated(keep="first"), name=f"duplicate_{column}"))
    return pandera.Column(checks=checks)


def interactions_schema(has_rating: bool, has_timestamp: bool, needs_rating: bool = True) -> pandera.DataFrameSchema:
    """Schema of a chunk of interactions, all columns text; where there are ratings, `needs_rating`: each row has one."""
    columns = {USER_ID: _id_column(USER_ID), ITEM_ID: _id_column(ITEM_ID)}
    if has_rating:
        is_rating = is_number if needs_rating else is_number_or_empty
        columns[RATING] = pandera.Column(checks=[pandera.Check(is_rating, name="rating_not_a_number")])
    if has_timestamp:
        checks = [
            pandera.Check(is_number, name="timestamp_not_a_number"),
            pandera.Check(is_time, name="timestamp_out_of_range"),
        ]
        columns[TIMESTAMP] = pandera.Column(checks=checks)
    return pandera.DataFrameSchema(columns)


def entities_schema(id_column: str, unique: bool = True) -> pandera.DataFrameSchema:
    """Schema of a table of items or users: each has an id, and where ids are `unique`, the first row of an id is its row."""
    return pandera.DataFrameSchema({id_column: _id_column(id_column, unique)})


def rejections(frame: pd.DataFrame, schema: pandera.DataFrameSchema) -> pd.DataFrame:
    """The rows that break `schema`.

    Returns:
        DataFrame with `reason` (name of the check) and `value` (the text that failed it), indexed as `frame`; a row that
        breaks several checks is listed once, with the first of them in the order of the schema.
    """
    try:
        schema.validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as errors:
        cases = errors.failure_cases
        unexpected = cases[cases["index"].isna()]
        assert unexpected.empty, unexpected  # a schema problem: frames come from our own readers
        found = pd.DataFrame(
            {
                "reason": cases["check"].astype(str).to_numpy(),
                "value": cases["failure_case"].astype(str).to_numpy(),
            },
            index=cases["index"].astype(np.int64),
        )
        order = {check.name: place for place, check in enumerate(_checks(schema))}
        found = found.iloc[np.argsort(found["reason"].map(order).to_numpy(), kind="stable")]
        return found[~found.index.duplicated(keep="first")].sort_index()
    return pd.DataFrame({"reason": [], "value": []}, dtype=object, index=pd.Index([], dtype=np.int64))


def _checks(schema: pandera.DataFrameSchema) -> list[Any]:
    return [check for column in schema.columns.values() for check in column.checks]

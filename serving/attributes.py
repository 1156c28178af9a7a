"""What items can be filtered by: columns of the items' table that came into the bundle (``attributes.parquet``).

A column holds values ("genres": each item any number of them) or numbers ("release_year": each item one or none). A filter
names columns; an item passes that has one of the values, or a number in the range, of every column named. An item of which
a column says nothing passes no filter on it.
"""

import shlex
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from cachetools import LRUCache

from components.errors import ArtifactError, UserError, did_you_mean
from components.ids import UNKNOWN
from serving.bundle import ATTRIBUTES_FILE
from serving.ranking import Matching, Rows
from serving.schemas import Filter, FilterColumn, Range

VALUES, NUMBERS = pa.list_(pa.string()), pa.float64()
"""Types of a column in the file; `components.train.attributes` writes them."""

SHOWN_VALUES = 200  # of a column, the most frequent ones, where the model is described
_NAMED_VALUES = 20  # in an error
_CACHED_BYTES = 32 << 20  # of what filters found: four bytes for each item and distinct filter

Mask = npt.NDArray[np.bool_]


class FilterError(UserError):
    """A filter on what the model's items do not have."""

    code = "invalid_filter"


@dataclass(frozen=True)
class Values:
    """Any number of values of each item."""

    names: tuple[str, ...]
    """Every value, the most frequent first."""
    codes: npt.NDArray[np.int32]
    """Places in `names` of the items' values, item after item."""
    rows: npt.NDArray[np.int32]
    """Whose each of them is."""

    def mask(self, column: str, wanted: Filter, num_items: int) -> Mask:
        """Which items have one of the values."""
        if isinstance(wanted, Range):
            raise FilterError(f"filters: '{column}' has values, no numbers.", f"Give a list of some: {self._named()}.")
        places = {name: place for place, name in enumerate(self.names)}
        for value in wanted:
            if value not in places:
                raise FilterError(f"filters: no item has '{column}' = '{value}'.", self._suggested(value))
        chosen = np.zeros(len(self.names), dtype=np.bool_)
        chosen[[places[value] for value in wanted]] = True
        mask = np.zeros(num_items, dtype=np.bool_)
        mask[self.rows[chosen[self.codes]]] = True
        return mask

    @cached_property
    def are_shared(self) -> bool:
        """Whether most items have a value in common with another: else they are texts of their own, and a list of them is long
        and helps nobody to choose."""
        is_shared = np.bincount(self.codes, minlength=len(self.names)) > 1
        return 2 * len(np.unique(self.rows[is_shared[self.codes]])) >= len(np.unique(self.rows))

    def _named(self) -> str:
        if not self.are_shared:
            return "those of the items' table, where most items have their own"
        return ", ".join(self.names[:_NAMED_VALUES]) + (", ... (see /v1/model)" if len(self.names) > _NAMED_VALUES else "")

    def _suggested(self, value: str) -> str:
        if self.are_shared and len(self.names) <= _NAMED_VALUES:
            return did_you_mean(value, self.names)
        return f"Allowed are {len(self.names)} values: {self._named()}."

    def described(self) -> FilterColumn:
        """What a caller must know."""
        return FilterColumn(
            kind="values",
            num_items=len(np.unique(self.rows)),
            num_values=len(self.names),
            values=list(self.names[:SHOWN_VALUES]) if self.are_shared else [],
        )

    def of(self, rows: Rows, num_items: int) -> "Values":
        """Those of some items, which are numbered anew."""
        places = _renumbered(rows, num_items)[self.rows]
        kept = places != UNKNOWN
        return Values(self.names, self.codes[kept], places[kept])


@dataclass(frozen=True)
class Numbers:
    """A number of each item, NaN where it has none."""

    numbers: npt.NDArray[np.float64]

    def mask(self, column: str, wanted: Filter, num_items: int) -> Mask:
        """Which items have a number in the range."""
        if not isinstance(wanted, Range):
            least, most = self._span()
            range_ = shlex.quote(f"{column}={least:g}..{most:g}")
            raise FilterError(
                f"filters: '{column}' has numbers, {least:g} to {most:g}, no values.",
                f'Give a range: {{"min": {least:g}, "max": {most:g}}}, or with cllmr --filter {range_}.',
            )
        least = -np.inf if wanted.min is None else wanted.min
        most = np.inf if wanted.max is None else wanted.max
        mask: Mask = (self.numbers >= least) & (self.numbers <= most)  # false where it is NaN
        return mask

    def _span(self) -> tuple[float, float]:
        return float(np.nanmin(self.numbers)), float(np.nanmax(self.numbers))

    def described(self) -> FilterColumn:
        """What a caller must know."""
        least, most = self._span()
        return FilterColumn(kind="numbers", num_items=int(np.isfinite(self.numbers).sum()), min=least, max=most)

    def of(self, rows: Rows, num_items: int) -> "Numbers":
        """Those of some items."""
        return Numbers(self.numbers[rows])


class Attributes:
    """The columns that some items can be filtered by.

    Args:
        num_items: how many there are.
        columns: by name.
    """

    def __init__(self, num_items: int, columns: Mapping[str, Values | Numbers]) -> None:
        self._num_items, self._columns = num_items, dict(columns)

    @classmethod
    def read(cls, bundle_dir: Path, num_items: int) -> "Attributes":
        """Those of a bundle; none where it has no such file, as it was made before there was one.

        Raises:
            ArtifactError: the file is damaged, or is of other items.
        """
        path = bundle_dir / ATTRIBUTES_FILE
        if not path.exists():
            return cls(num_items, {})
        try:
            table = pq.read_table(path)
            if len(table) != num_items:
                raise ValueError(f"it has {len(table)} rows for {num_items} items")
            return cls(num_items, {name: _column(table[name].combine_chunks()) for name in table.column_names})
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"{path} cannot be read: {reason}.", "Build it again: cllmr run --from train") from None

    def matching(self, filters: Mapping[str, Filter]) -> Matching:
        """The items that pass all filters, at least one.

        Raises:
            FilterError: a column or a value is not known, or a filter is of the other kind.
        """
        mask = np.ones(self._num_items, dtype=np.bool_)
        for name, wanted in filters.items():
            if name not in self._columns:
                hint = did_you_mean(name, self._columns) if self._columns else "Set train.filter_columns and train again."
                raise FilterError(f"filters: items cannot be filtered by '{name}'.", hint)
            mask &= self._columns[name].mask(name, wanted, self._num_items)
        return Matching.of(mask)

    def of(self, rows: Rows) -> "Attributes":
        """Those of some items, in this order."""
        return Attributes(len(rows), {name: column.of(rows, self._num_items) for name, column in self._columns.items()})

    def described(self) -> dict[str, FilterColumn]:
        """What a caller must know, by column."""
        return {name: column.described() for name, column in self._columns.items()}


class Filters:
    """What the filters found that were asked for last: the same few come again and again.

    Args:
        attributes: of all items.
        cached_bytes: of memory that what they found may take.
    """

    def __init__(self, attributes: Attributes, cached_bytes: int = _CACHED_BYTES) -> None:
        self._attributes = attributes
        self._found: LRUCache[str, Matching] = LRUCache(cached_bytes, getsizeof=lambda found: found.penalty.nbytes)
        self._lock = threading.Lock()  # requests of many users are answered in threads
        self.described = attributes.described()

    def matching(self, filters: Mapping[str, Filter]) -> Matching | None:
        """The items that pass; None: no filter is asked for. Raises as `Attributes.matching`."""
        if not filters:
            return None
        key = repr(sorted((name, one if isinstance(one, Range) else sorted(set(one))) for name, one in filters.items()))
        with self._lock:
            found = self._found.get(key)
        if found is None:
            found = self._attributes.matching(filters)
            if found.penalty.nbytes <= self._found.maxsize:
                with self._lock:
                    self._found[key] = found
        return found

    def know(self, filters: Mapping[str, Filter]) -> bool:
        """Whether there are such columns and values; `matching` raises otherwise."""
        try:
            self.matching(filters)
        except FilterError:
            return False
        return True


def _column(column: pa.Array) -> Values | Numbers:
    if column.type == NUMBERS:
        numbers = column.to_numpy(zero_copy_only=False).astype(np.float64)
        if not np.isfinite(numbers).any():
            raise ValueError("a column has no number")
        return Numbers(numbers)
    if column.type != VALUES:
        raise ValueError(f"it has a column of type {column.type}, allowed are {VALUES} and {NUMBERS}")
    encoded = column.flatten().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    names = encoded.dictionary.to_pylist()
    counts = np.bincount(codes, minlength=len(names))
    order = sorted(range(len(names)), key=lambda place: (-counts[place], names[place]))
    places = np.empty(len(names), dtype=np.int32)
    places[order] = np.arange(len(names), dtype=np.int32)
    rows = np.repeat(np.arange(len(column), dtype=np.int32), pc.list_value_length(column).fill_null(0).to_numpy())
    return Values(tuple(names[place] for place in order), places[codes], rows)


def _renumbered(rows: Rows, num_items: int) -> npt.NDArray[np.int32]:
    """New row by old row, `UNKNOWN` for the others."""
    places = np.full(num_items, UNKNOWN, dtype=np.int32)
    places[rows] = np.arange(len(rows), dtype=np.int32)
    return places

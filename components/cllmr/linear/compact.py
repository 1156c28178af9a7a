"""Item vectors in half or a quarter of the memory, and how far off a score can be with them.

A vector b becomes b' and scores a . b' instead of a . b. With float16 every number keeps 11 significant bits; with int8 it is
a multiple of the vector's own scale, its largest number over 127. Either way |a . b' - a . b| has a bound that depends on a
and on the largest step of the matrix alone (`CompactItems.bound`), which tests and the check of a loaded bundle use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
ItemStorage = Literal["float32", "float16", "int8"]

READ_ROWS = 65_536
_HALF_STEP = 2.0**-11  # of a float16 number, relative to its size; below 2**-14 the step is 2**-25 whatever the size
_LEAST_STEP = 2.0**-25


@dataclass(frozen=True)
class CompactItems:
    """Item vectors that are float32 when they are looked at: rows by `[...]`, as of an array of shape (num_items, d)."""

    stored: npt.NDArray[Any]
    """float16 or int8, (num_items, d)."""
    scale: Floats
    """What a stored row is multiplied by, (num_items,)."""
    ndim = 2
    dtype = np.dtype(np.float32)

    @classmethod
    def of(cls, read: Callable[[int, int], Floats], shape: tuple[int, int], storage: ItemStorage) -> "CompactItems":
        """Reads the rows from `start` to `stop` block by block, so that the whole is never in memory as it was.

        Raises:
            ValueError: a number is not finite, or too large for float16.
        """
        stored = np.empty(shape, dtype=np.dtype(storage))
        scale = np.ones(shape[0], dtype=np.float32)
        for start in range(0, shape[0], READ_ROWS):
            rows = slice(start, min(start + READ_ROWS, shape[0]))
            block = read(rows.start, rows.stop)
            largest = np.abs(block).max(axis=1, initial=0.0)
            limit = np.finfo(np.float16).max if storage == "float16" else np.finfo(np.float32).max
            if not (largest <= limit).all():
                raise ValueError(f"items of {rows.start} to {rows.stop} have numbers that {storage} does not hold")
            if storage == "int8":
                # not below the smallest normal number: a row of next to nothing would be divided by zero
                scale[rows] = np.where(largest > 0, np.maximum(largest / 127, np.finfo(np.float32).tiny), 1)
                block = np.rint(block / scale[rows, None])
            stored[rows] = block
        return cls(stored, scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(num_items, d)."""
        return self.stored.shape[0], self.stored.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.stored.nbytes + self.scale.nbytes)

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, rows: Any) -> Floats:
        values = self.stored[rows]
        if values.dtype == np.float16:
            return _widened(values)
        scaled: Floats = values * self.scale[rows][..., None]
        return scaled

    def bound(self, users: Floats) -> npt.NDArray[np.float64]:
        """How far a score of each user (n, d) with any item can be off, not counting rounding in the sum: (n,)."""
        size = np.abs(users).astype(np.float64)
        if self.stored.dtype == np.int8:
            return np.asarray(size.sum(axis=1) * float(self.scale.max(initial=0.0)) / 2)
        largest = np.abs(self.stored).max(axis=0, initial=0).astype(np.float64)
        return np.asarray(size @ np.maximum(largest * _HALF_STEP, _LEAST_STEP))


def _widened(half: npt.NDArray[np.float16]) -> Floats:
    """float16 as float32, exactly; a fifth of the time that numpy takes without instructions for it.

    The sign goes to its place, exponent and mantissa to theirs with an exponent that is 112 too small; numbers that are
    denormal in float16 are so before the multiplication and are right after it.
    """
    bits = np.ascontiguousarray(half).view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70000001)  # the copies of the sign
    values: Floats = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values

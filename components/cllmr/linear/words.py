"""Which rare words the beginnings of texts share: a similarity beside that of their embeddings.

An embedding of a text keeps what an item is and loses whose it is: brands, series and model numbers are in its title, which is
where a text begins. Words are hashed, so that there is no vocabulary to keep, and weigh more the rarer they are among the items
that there are (tf-idf): the inner product of two rows is 1 for the same words, and 0 where none is shared.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self
from zlib import crc32

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Floats = npt.NDArray[np.float32]

FIRST_WORDS = 12  # where the title stands
BUCKETS = 1 << 16  # so many that few words share one, and as many as two bytes tell apart
_WORD = re.compile(r"\w\w+")


@dataclass(frozen=True)
class ItemWords:
    """The words of the items that there are, and what is needed to compare those of others with them."""

    rows: sp.csr_array
    """Unit rows, zero without a word, (num_items, BUCKETS)."""
    rarity: Floats
    """Of each word: ln((1 + texts) / (1 + texts with that word)) + 1, (BUCKETS,)."""
    share: float
    """Of the words in a similarity, above 0, to 1."""

    @classmethod
    def of(cls, texts: Iterable[str | None], share: float) -> Self:
        """Made of the texts of the items that there are; None and those without a word have no part in the rarity."""
        counts = _counts(texts)
        told = np.count_nonzero(np.diff(counts.indptr))
        having = np.bincount(counts.indices, minlength=BUCKETS)
        rarity = (np.log((1 + told) / (1 + having)) + 1).astype(np.float32)
        return cls(_weighed(counts, rarity), rarity, share)

    def of_new(self, texts: Iterable[str | None]) -> sp.csr_array:
        """Other texts to rows like those of the items, (num_texts, BUCKETS)."""
        return _weighed(_counts(texts), self.rarity)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Plain arrays for a file, all but the share; see `of_tensors`."""
        return {
            "words.indptr": self.rows.indptr.astype(np.int32),
            "words.indices": self.rows.indices.astype(np.uint16),
            "words.data": self.rows.data.astype(np.float16),
            "words.rarity": self.rarity,
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Any], num_items: int, share: float) -> Self:
        """The inverse of `tensors`, in the precision that these have; raises KeyError or ValueError where they do not fit."""
        data, indices, indptr, rarity = (tensors[f"words.{name}"] for name in ("data", "indices", "indptr", "rarity"))
        parts = (data.astype(np.float32), indices.astype(np.int32), indptr.astype(np.int32))
        rows = sp.csr_array(parts, shape=(num_items, BUCKETS))
        rows.check_format()
        if rarity.shape != (BUCKETS,) or not (np.isfinite(rarity).all() and np.isfinite(rows.data).all()):
            raise ValueError(f"words.rarity has shape {rarity.shape}, expected {(BUCKETS,)}, or a number is not finite")
        return cls(rows, rarity, share)


def _counts(texts: Iterable[str | None]) -> sp.csr_array:
    """How often each word is in the beginning of each text, (num_texts, BUCKETS)."""
    found, ends = list[int](), [0]
    for text in texts:
        beginning = " ".join((text or "").split(maxsplit=FIRST_WORDS)[:FIRST_WORDS])
        found += [crc32(word.encode()) % BUCKETS for word in _WORD.findall(beginning.lower())]
        ends.append(len(found))
    parts = (np.ones(len(found), np.float32), np.array(found, np.int32), np.array(ends, np.int32))
    counts = sp.csr_array(parts, shape=(len(ends) - 1, BUCKETS))
    counts.sum_duplicates()
    return counts


def _weighed(counts: sp.csr_array, rarity: Floats) -> sp.csr_array:
    """Unit rows of the counts times the rarity of their words."""
    weights = counts.data * rarity[counts.indices]
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    lengths = np.sqrt(np.bincount(row, weights.astype(np.float64) ** 2, counts.shape[0]))
    return sp.csr_array(((weights / lengths[row]).astype(np.float32), counts.indices, counts.indptr), shape=counts.shape)

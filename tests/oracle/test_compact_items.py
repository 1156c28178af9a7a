"""Compact item vectors against the vectors themselves: the bound on a score's error, on any numbers."""

from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from components.cllmr.linear.compact import CompactItems, ItemStorage
from components.cllmr.linear.scores import BLOCK_SIZE, products

COMPACT: list[ItemStorage] = [storage for storage in get_args(ItemStorage) if storage != "float32"]
NUMBERS = st.floats(-1e4, 1e4, width=32)


def compact(items: npt.NDArray[np.float32], storage: ItemStorage) -> CompactItems:
    return CompactItems.of(lambda start, stop: items[start:stop], (len(items), items.shape[1]), storage)


@pytest.mark.parametrize("storage", COMPACT)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_score_is_off_by_more_than_the_bound(storage: ItemStorage, data: st.DataObject) -> None:
    items = data.draw(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=NUMBERS))
    users = data.draw(arrays(np.float32, (3, items.shape[1]), elements=NUMBERS))
    stored = compact(items, storage)
    exact = users.astype(np.float64) @ items.T.astype(np.float64)
    found = users.astype(np.float64) @ stored[:].T.astype(np.float64)
    # int8's products with its scale are rounded to float32: 2**-24 of their size, as much again as float32 itself is off
    rounding = 2.0**-22 * (np.abs(users).astype(np.float64) @ np.abs(items).T.astype(np.float64))
    assert (np.abs(found - exact) <= stored.bound(users)[:, None] * (1 + 1e-6) + rounding).all()


@pytest.mark.parametrize("storage", COMPACT)
def test_the_bound_is_not_far_above_what_happens(storage: ItemStorage) -> None:
    rng = np.random.default_rng(0)
    items, users = (rng.standard_normal((rows, 16)).astype(np.float32) for rows in (2_000, 50))
    stored = compact(items, storage)
    worst = np.abs(users @ stored[:].T - users @ items.T).max(axis=1)
    assert (worst > stored.bound(users) / 20).all()


def test_float16_is_widened_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].reshape(-1, 64)
    stored = compact(finite.astype(np.float32), "float16")
    np.testing.assert_array_equal(stored[:].view(np.int32), finite.astype(np.float32).view(np.int32))  # signs of zero too


@pytest.mark.parametrize(("storage", "share"), [("float16", 0.5), ("int8", 0.25)])
def test_memory_is_what_it_is_for(storage: ItemStorage, share: float) -> None:
    items = np.ones((1_000, 128), dtype=np.float32)
    assert compact(items, storage).nbytes == pytest.approx(share * items.nbytes, rel=0.05)


@pytest.mark.parametrize("storage", COMPACT)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(storage: ItemStorage, value: float) -> None:
    items = np.zeros((5, 2), dtype=np.float32)
    items[3, 1] = value
    with pytest.raises(ValueError, match=f"numbers that {storage} does not hold"):
        compact(items, storage)


def test_what_is_too_large_for_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="numbers that float16 does not hold"):
        compact(np.full((1, 1), 1e5, dtype=np.float32), "float16")


@pytest.mark.parametrize("storage", ["float32", *COMPACT])
@pytest.mark.parametrize("num_users", [1, 3, 4, 9])
def test_products_are_those_of_the_whole_matrix_whatever_the_block(storage: ItemStorage, num_users: int) -> None:
    rng = np.random.default_rng(1)
    items = rng.standard_normal((2 * BLOCK_SIZE + 17, 8)).astype(np.float32)
    users = rng.standard_normal((num_users, 8)).astype(np.float32)
    stored = items if storage == "float32" else compact(items, storage)
    np.testing.assert_allclose(products(users, stored), users @ stored[:].T, atol=1e-5)

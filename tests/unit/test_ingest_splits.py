"""The splits are a partition of each user's interactions and a function of the data alone, not of the order of their rows."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.ids import SPLITS, TEST, TRAIN, VALIDATION
from components.ingest.splits import draws, held_out_counts, split, stable

RATIOS = (3.0, 1.0, 1.0)

pairs_strategy = st.sets(st.tuples(st.integers(0, 7), st.integers(0, 25)), min_size=1, max_size=120)


def split_by_pair(
    pairs: list[tuple[int, int]], ratios: tuple[float, ...], seed: int, temporal: bool
) -> dict[tuple[int, int], str]:
    """The split of each (user, item); times repeat, so that the temporal split meets ties."""
    users = np.array([user for user, _ in pairs])
    items = np.array([item for _, item in pairs])
    texts = [
        np.array([f"{kind}{number}" for number in numbers], dtype=object) for kind, numbers in (("u", users), ("i", items))
    ]
    drawn = draws(*texts, seed)
    orders = (items % 3, drawn, items) if temporal else (drawn,)
    return dict(zip(pairs, split(users, orders, ratios), strict=True))


@settings(max_examples=60, deadline=None)
@given(pairs=pairs_strategy, seed=st.integers(0, 2**31), temporal=st.booleans(), shuffled=st.randoms(use_true_random=False))
def test_every_interaction_is_in_one_split_whatever_the_order_of_rows(pairs, seed, temporal, shuffled):
    rows = sorted(pairs)
    other = list(rows)
    shuffled.shuffle(other)
    parts = split_by_pair(rows, RATIOS, seed, temporal)
    assert parts == split_by_pair(other, RATIOS, seed, temporal)
    assert set(parts) == pairs
    assert set(parts.values()) <= set(SPLITS)
    for user in {user for user, _ in rows}:
        theirs = [part for (owner, _), part in parts.items() if owner == user]
        # hand computed: a fifth, rounded down, validates, as many test, the rest (at least one) trains
        assert theirs.count(VALIDATION) == theirs.count(TEST) == len(theirs) // 5
        assert theirs.count(TRAIN) == len(theirs) - 2 * (len(theirs) // 5) >= 1


@settings(max_examples=60, deadline=None)
@given(
    degrees=st.lists(st.integers(0, 500), min_size=1, max_size=30),
    ratios=st.tuples(st.floats(0.01, 10), st.floats(0, 10), st.floats(0, 10)),
)
def test_no_ratio_leaves_a_user_without_training(degrees, ratios):
    counts = np.array(degrees)
    validation, test = held_out_counts(counts, ratios)
    assert (validation >= 0).all()
    assert (test >= 0).all()
    assert (counts - validation - test >= np.minimum(counts, 1)).all()


def test_held_out_counts_of_few_interactions_are_as_computed_by_hand():
    validation, test = held_out_counts(np.array([0, 1, 4, 5, 9, 10, 20]), (3, 1, 1))
    assert validation.tolist() == [0, 0, 0, 1, 1, 2, 4]
    assert test.tolist() == [0, 0, 0, 1, 1, 2, 4]


def test_when_almost_all_is_to_be_held_out_one_interaction_still_trains_and_the_test_goes_first():
    validation, test = held_out_counts(np.array([1, 2, 3]), (0.001, 1, 1))
    assert test.tolist() == [0, 0, 1]
    assert validation.tolist() == [0, 0, 1]
    validation, test = held_out_counts(np.array([1, 2, 3]), (0.001, 0, 1))
    assert test.tolist() == [0, 1, 2]
    assert validation.tolist() == [0, 0, 0]


def test_the_temporal_split_tests_the_latest_and_orders_equal_times_by_the_next_key():
    users = np.array([0] * 5 + [1] * 5)
    times = np.array([50, 10, 40, 30, 20, 7, 7, 7, 7, 7])
    drawn = np.array([0, 1, 2, 3, 4, 8, 6, 9, 5, 7])
    parts = split(users, (times, drawn), (3, 1, 1)).tolist()
    assert parts[:5] == [TEST, TRAIN, VALIDATION, TRAIN, TRAIN]
    # one time for all: draws 5, 6, 7 train, 8 validates, 9 tests
    assert parts[5:] == [VALIDATION, TRAIN, TEST, TRAIN, TRAIN]


def test_no_training_interaction_is_later_than_a_held_out_one_in_the_temporal_split():
    random = np.random.default_rng(0)
    users, times = random.integers(0, 20, 600), random.integers(0, 40, 600)
    parts = split(users, (times, np.arange(600)), (3, 1, 1))
    for user in range(20):
        bounds = [times[(users == user) & (parts == name)] for name in SPLITS]
        assert all(before.max() <= after.min() for before, after in pairwise(bounds))


def test_the_draw_of_an_interaction_tells_its_user_from_its_item():
    """Users and items of many data sets have the same numbers."""
    users, items = (np.array(ids, dtype=object) for ids in (["1", "2", "1", "2"], ["1", "2", "2", "1"]))
    assert len(set(draws(users, items, seed=1).tolist())) == 4


def test_another_seed_draws_another_split_of_the_same_sizes():
    pairs = [(user, item) for user in range(4) for item in range(25)]
    one, other = (split_by_pair(pairs, RATIOS, seed, temporal=False) for seed in (1, 2))
    assert one != other
    assert sorted(one.values()) == sorted(other.values())


def test_users_with_the_same_items_do_not_get_the_same_split():
    pairs = [(user, item) for user in range(2) for item in range(25)]
    parts = split_by_pair(pairs, RATIOS, 2023, temporal=False)
    assert [parts[0, item] for item in range(25)] != [parts[1, item] for item in range(25)]


@pytest.mark.parametrize("seed", range(3))
def test_held_out_items_are_drawn_evenly(seed):
    """200 users with the same 10 items: each item is tested about 40 times (binomial, sd 5.7; bounds at more than 4 sd)."""
    pairs = [(user, item) for user in range(200) for item in range(10)]
    parts = split_by_pair(pairs, RATIOS, seed, temporal=False)
    tested = np.bincount([item for (_, item), part in parts.items() if part == TEST], minlength=10)
    assert tested.sum() == 400
    assert tested.min() > 15
    assert tested.max() < 65


def stable_parts(users: np.ndarray, items: np.ndarray, ratios: tuple[float, ...] = RATIOS) -> np.ndarray:
    texts = [np.array([str(number) for number in numbers], dtype=object) for numbers in (users, items)]
    return stable(draws(*texts, seed=1), ratios)


def test_a_stable_split_gives_an_interaction_the_same_part_whatever_else_there_is():
    users, items = np.divmod(np.arange(4000), 50)
    some = np.random.default_rng(0).choice(4000, 700, replace=False)
    np.testing.assert_array_equal(stable_parts(users, items)[some], stable_parts(users[some], items[some]))


def test_a_stable_split_has_the_ratios_as_chances_and_users_are_divided_independently():
    users, items = np.divmod(np.arange(60_000), 200)
    parts = stable_parts(users, items)
    for name, share in ((TRAIN, 0.6), (VALIDATION, 0.2), (TEST, 0.2)):
        # five standard deviations of a share of 60,000 draws
        assert (parts == name).mean() == pytest.approx(share, abs=5 * 0.5 / 60_000**0.5)
    trained = (parts == TRAIN).reshape(300, 200).astype(float)
    alike = np.corrcoef(trained)[np.triu_indices(300, 1)]
    assert abs(alike).max() < 0.45  # of 44,850 pairs with a standard deviation of 0.07: six of them


def test_a_stable_split_without_a_share_for_validation_has_none():
    users, items = np.divmod(np.arange(1000), 50)
    assert set(stable_parts(users, items, (1.0, 0.0, 1.0))) == {TRAIN, TEST}

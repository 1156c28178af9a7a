"""Batches: what they contain against a dense computation, and that they are a pure function of their place in the run."""

import numpy as np
import pytest
import torch

from components.cllmr.sampling import Batch, Sampler

NUM_USERS, NUM_ITEMS, BATCH, NEGATIVES = 20, 15, 16, 6


def log(seed: int = 0, density: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users and items in no order, and the same dense."""
    rng = np.random.default_rng(seed)
    dense = rng.random((NUM_USERS, NUM_ITEMS)) < density
    users, items = dense.nonzero()
    order = rng.permutation(len(users))
    return users[order], items[order], dense


def sampler(negatives: int = NEGATIVES, seed: int = 0, batch_size: int = BATCH) -> Sampler:
    users, items, _ = log()
    return Sampler(users, items, NUM_ITEMS, batch_size, negatives, seed)


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("negatives", [NEGATIVES, 0])
def test_a_batch_is_a_function_of_seed_epoch_step_and_rank_alone(negatives: int) -> None:
    expected = sampler(negatives).batch(3, 2, rank=1, world_size=2)
    busy = sampler(negatives)
    for step in range(busy.steps_per_epoch):  # what was drawn before must not matter
        busy.batch(0, step)
    assert same(busy.batch(3, 2, rank=1, world_size=2), expected)
    users, items, _ = log()
    reversed_log = Sampler(users[::-1], items[::-1], NUM_ITEMS, BATCH, negatives, 0)
    assert same(reversed_log.batch(3, 2, rank=1, world_size=2), expected)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epoch": 4}, {"step": 1}, {"rank": 0}])
def test_another_seed_epoch_step_or_rank_draws_another_batch(changed: dict[str, int]) -> None:
    def draw(seed: int = 0, epoch: int = 3, step: int = 2, rank: int = 1) -> Batch:
        return sampler(seed=seed).batch(epoch, step, rank, world_size=2)

    assert not same(draw(), draw(**changed))
    assert not torch.equal(draw().negatives, draw(**changed).negatives)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_one_epoch_visits_every_interaction_once(world_size: int) -> None:
    users, items, _ = log()
    keep = len(users) // BATCH * BATCH  # whole steps: see below for the last, shorter one
    drawn = Sampler(users[:keep], items[:keep], NUM_ITEMS, BATCH, NEGATIVES, 0)
    assert drawn.steps_per_epoch == keep // BATCH
    visited = []
    for step in range(drawn.steps_per_epoch):
        for rank in range(world_size):
            batch = drawn.batch(5, step, rank, world_size)
            assert len(batch.users) == BATCH // world_size
            visited += list(zip(batch.users.tolist(), batch.items.tolist(), strict=True))
    assert sorted(visited) == sorted(zip(users[:keep].tolist(), items[:keep].tolist(), strict=True))


def test_the_last_step_is_filled_up_so_that_all_ranks_have_equal_shares_and_none_is_left_out() -> None:
    users, _, dense = log()
    world_size, drawn = 5, sampler()
    assert len(users) % BATCH % world_size, "the example needs a remainder"
    visited = set()
    for step in range(drawn.steps_per_epoch):
        shares = [drawn.batch(0, step, rank, world_size) for rank in range(world_size)]
        assert len({len(share.users) for share in shares}) == 1
        size = min(BATCH, len(users) - step * BATCH)
        assert len(shares[0].users) == -(-size // world_size)
        pairs = [pair for share in shares for pair in zip(share.users.tolist(), share.items.tolist(), strict=True)]
        assert len(set(pairs)) == size, "shares overlap in more than the filling"
        visited |= set(pairs)
    assert visited == set(zip(*(axis.tolist() for axis in dense.nonzero()), strict=True))


def test_the_false_negatives_among_the_shared_ones_equal_the_dense_interactions() -> None:
    _, _, dense = log()
    drawn = sampler()
    for step in range(drawn.steps_per_epoch):
        batch = drawn.batch(1, step)
        negatives = batch.negatives.numpy()
        assert len(set(negatives.tolist())) == NEGATIVES
        pair, negative = batch.false_negatives.numpy()
        assert (np.diff(pair) >= 0).all(), "the loss looks pairs up by bisection"
        found = np.zeros((len(batch.users), NEGATIVES), dtype=int)
        np.add.at(found, (pair, negative), 1)
        np.testing.assert_array_equal(found, dense[batch.users.numpy()][:, negatives])
        assert found.any()


def test_where_there_are_fewer_items_than_negatives_all_items_are_taken() -> None:
    batch = sampler(negatives=500).batch(0, 0)
    assert sorted(batch.negatives.tolist()) == list(range(NUM_ITEMS))


def test_bpr_negatives_are_never_positives_and_every_other_item_is_drawn() -> None:
    _, _, dense = log()
    drawn, seen = sampler(negatives=0), set()
    for epoch in range(30):
        for step in range(drawn.steps_per_epoch):
            batch = drawn.batch(epoch, step)
            assert len(batch.negatives) == len(batch.users)
            assert not dense[batch.users.numpy(), batch.negatives.numpy()].any()
            seen |= set(zip(batch.users.tolist(), batch.negatives.tolist(), strict=True))
    active = dense.any(axis=1)
    assert len(seen) > 0.95 * (~dense[active]).sum()


def test_a_user_who_has_every_item_does_not_hang_the_sampler() -> None:
    batch = Sampler(np.zeros(4, int), np.arange(4), 4, 4, 0, 0).batch(0, 0)
    assert set(batch.negatives.tolist()) <= {0, 1, 2, 3}

"""Worlds in which the right answer is known.

``block_world``: users of a block like the items of their block and nothing else; all of them can be found.

``propensity_world``: the same tastes, but a tenth of the items have inflated side information: whatever they are, their text
is pulled towards one generic direction ("everybody will love this"), and the log contains the clicks that such a text
brought in, from users whose taste it is not. The held-out interactions are taste alone: the truth.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class World:
    """Interactions as (users, items) row pairs, and side information with unit rows."""

    num_users: int
    num_items: int
    train: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    test: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    user_text: FloatArray
    """(num_users, text_dim)"""
    item_text: FloatArray
    """(num_items, text_dim)"""
    inflated: npt.NDArray[np.bool_]
    """Items whose text was inflated, (num_items,)."""
    user_block: npt.NDArray[np.int64]
    item_block: npt.NDArray[np.int64]

    def matrix(self, pairs: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]) -> FloatArray:
        """Dense 0/1 interactions, (num_users, num_items)."""
        dense = np.zeros((self.num_users, self.num_items), dtype=np.float32)
        dense[pairs] = 1.0
        return dense


def _unit(x: npt.NDArray[np.floating]) -> FloatArray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def block_world(
    num_blocks: int = 6, users_per_block: int = 25, items_per_block: int = 20, keep: float = 0.5, seed: int = 0
) -> World:
    """A fraction `keep` of every user's block is seen in training, the rest is the test: recall 1.0 can be reached."""
    rng = np.random.default_rng(seed)
    user_block = np.repeat(np.arange(num_blocks), users_per_block)
    item_block = np.repeat(np.arange(num_blocks), items_per_block)
    likes = user_block[:, None] == item_block[None, :]
    seen = likes & (rng.random(likes.shape) < keep)
    topics = rng.normal(size=(num_blocks, 32))
    return World(
        len(user_block),
        len(item_block),
        np.nonzero(seen),
        np.nonzero(likes & ~seen),
        _unit(topics[user_block] + rng.normal(size=(len(user_block), 32))),
        _unit(topics[item_block] + rng.normal(size=(len(item_block), 32))),
        np.zeros(len(item_block), dtype=bool),
        user_block,
        item_block,
    )


def propensity_world(
    num_blocks: int = 8,
    users_per_block: int = 40,
    items_per_block: int = 40,
    inflation: float = 1.5,
    propensity: float = 0.08,
    seed: int = 0,
) -> World:
    """Taste is the block; a tenth of the items are `inflated` and draw extra training clicks from everybody.

    Args:
        inflation: length of the generic direction that is added to an inflated item's text, its topic having length 1.
        propensity: chance that a user clicks an inflated item of another block, in the training log only.
    """
    rng = np.random.default_rng(seed)
    user_block = np.repeat(np.arange(num_blocks), users_per_block)
    item_block = np.repeat(np.arange(num_blocks), items_per_block)
    num_users, num_items = len(user_block), len(item_block)
    inflated = np.zeros(num_items, dtype=bool)
    inflated[rng.choice(num_items, num_items // 10, replace=False)] = True
    taste = np.where(user_block[:, None] == item_block[None, :], 0.3, 0.01)
    liked = rng.random(taste.shape) < taste
    held_out = liked & (rng.random(taste.shape) < 0.3)
    lured = inflated[None, :] & (rng.random(taste.shape) < propensity)
    topics = _unit(rng.normal(size=(num_blocks, 32)))
    praise = _unit(rng.normal(size=(1, 32)))
    item_text = topics[item_block] + 0.15 * rng.normal(size=(num_items, 32)) + inflation * inflated[:, None] * praise
    user_text = topics[user_block] + 0.15 * rng.normal(size=(num_users, 32))
    train = (liked & ~held_out) | (lured & ~held_out)
    return World(
        num_users,
        num_items,
        np.nonzero(train),
        np.nonzero(held_out),
        _unit(user_text),
        _unit(item_text),
        inflated,
        user_block,
        item_block,
    )

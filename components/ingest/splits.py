"""Train, validation and test: a partition of the interactions.

The draw of an interaction is a hash of the seed and its two raw ids. So it depends neither on the order of rows nor on other
users, and an interaction that was held out yesterday is most likely held out today, when a few more have come in.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from components.ids import SPLITS, UNKNOWN

Ints = npt.NDArray[np.int64]
Texts = Sequence[str] | npt.NDArray[np.object_]


def held_out_counts(degrees: Ints, ratios: Sequence[float]) -> tuple[Ints, Ints]:
    """Interactions that validate and that test, per user.

    Both are rounded down, the rest trains: at 3:1:1 a user with 4 interactions trains with all of them, one with 5 with 3.
    A user with an interaction keeps at least one for training.

    Args:
        degrees: interactions of each user, (num_users,).
        ratios: shares of train (> 0), validation and test.

    Returns:
        Two arrays, (num_users,).
    """
    total = float(sum(ratios))
    validation, test = (np.floor(degrees * ratio / total + 1e-9).astype(np.int64) for ratio in ratios[1:])
    most = np.maximum(degrees - 1, 0)
    test = np.minimum(test, most)
    return np.minimum(validation, most - test), test


def draws(user_ids: Texts, item_ids: Texts, seed: int) -> npt.NDArray[np.uint64]:
    """A pseudo-random number per interaction: a function of the seed and the two raw ids only, (interactions,)."""
    return pd.util.hash_array(_hashed(user_ids) ^ (_hashed(item_ids) * np.uint64(3)) ^ _hashed([f"seed {seed}"]))


def split(
    users: npt.NDArray[np.integer], orders: Sequence[npt.NDArray[np.integer]], ratios: Sequence[float]
) -> npt.NDArray[np.object_]:
    """Assigns each interaction to "train", "validation" or "test".

    Args:
        users: user row of each interaction, 0-based, (interactions,).
        orders: keys, each (interactions,), that put a user's interactions in order, the first key first: the last test, those
            before validate. Random: (`draws`,). Temporal: (Unix seconds, `draws`, item rows): coarse times
            tie, and by item rows alone the same items would be tested for all.
        ratios: shares of train, validation and test, see `held_out_counts`.

    Returns:
        Names of the splits, (interactions,).
    """
    assert (users > UNKNOWN).all()
    order = np.lexsort((*reversed(orders), users))
    degrees = np.bincount(users)
    starts = np.concatenate([[0], np.cumsum(degrees)[:-1]])
    place = np.empty(len(users), np.int64)  # of an interaction among those of its user
    place[order] = np.arange(len(users)) - np.repeat(starts, degrees)
    validation, test = held_out_counts(degrees, ratios)
    train = degrees - validation - test
    part = (place >= train[users]).astype(np.int64) + (place >= (train + validation)[users])
    names: npt.NDArray[np.object_] = np.array(SPLITS, dtype=object)[part]
    return names


def stable(drawn: npt.NDArray[np.uint64], ratios: Sequence[float]) -> npt.NDArray[np.object_]:
    """Assigns each interaction by its own draw alone: it has the same part whatever other interactions there are.

    Args:
        drawn: see `draws`, (interactions,).
        ratios: chances of train, validation and test, in any unit.

    Returns:
        Names of the splits, (interactions,).
    """
    # hashed again: the draws of two users differ by a constant, and their parts would go together
    place = pd.util.hash_array(drawn) / 2.0**64  # in [0, 1)
    bounds = np.cumsum(ratios)[:-1] / sum(ratios)
    names: npt.NDArray[np.object_] = np.array(SPLITS, dtype=object)[np.searchsorted(bounds, place, side="right")]
    return names


def _hashed(texts: Texts) -> npt.NDArray[np.uint64]:
    return pd.util.hash_array(np.asarray(texts, dtype=object), categorize=True)

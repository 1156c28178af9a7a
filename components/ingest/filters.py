"""Which interactions count: duplicates and the k-core."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from components.ids import ITEM_ID, RATING, TIMESTAMP, USER_ID

Codes = npt.NDArray[np.integer]

KEPT, USER_BELOW, ITEM_BELOW = 0, 1, 2
K_CORE_REASONS = {USER_BELOW: "user_below_k_core", ITEM_BELOW: "item_below_k_core"}


def latest_events(interactions: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Marks the interaction to keep of each (user, item): the latest, of equally late ones the best rated.

    Which interactions are kept does not depend on the order of the rows, save between rows that are equal.

    Args:
        interactions: user_id and item_id (categories), rating, timestamp.

    Returns:
        bool, (len(interactions),).
    """
    users, items = (interactions[name].cat.codes.to_numpy() for name in (USER_ID, ITEM_ID))
    rating = np.nan_to_num(interactions[RATING].to_numpy(), nan=-np.inf)
    order = np.lexsort((rating, interactions[TIMESTAMP].to_numpy(), items, users))
    is_last = np.ones(len(order), bool)
    is_last[:-1] = (np.diff(users[order]) != 0) | (np.diff(items[order]) != 0)
    kept = np.zeros(len(order), bool)
    kept[order[is_last]] = True
    return kept


def k_core(users: Codes, items: Codes, k: int) -> tuple[npt.NDArray[np.int8], int]:
    """The largest set of interactions in which every user and every item has at least k.

    Args:
        users: the user of each interaction, any non-negative numbers, (interactions,).
        items: its item, (interactions,).
        k: least interactions per user and item; 1 keeps all.

    Returns:
        Per interaction KEPT, USER_BELOW or ITEM_BELOW (what it was removed for first; a user counts before an item in one
        round), (interactions,); and the number of rounds until nothing changed.
    """
    verdict = np.full(len(users), KEPT, np.int8)
    rounds = 0
    while True:
        alive = np.flatnonzero(verdict == KEPT)
        few_users = np.bincount(users[alive], minlength=1)[users[alive]] < k
        few_items = np.bincount(items[alive], minlength=1)[items[alive]] < k
        if not (few_users | few_items).any():
            return verdict, rounds
        verdict[alive[few_items]] = ITEM_BELOW
        verdict[alive[few_users]] = USER_BELOW
        rounds += 1

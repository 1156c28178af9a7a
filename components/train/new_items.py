"""How much the words that texts begin with count for items that are new: chosen on validation, items as if they were new."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import scipy.sparse as sp

from components.cllmr.linear.ensemble import by_lot
from components.cllmr.linear.kernel import KernelScores, NewItems
from components.cllmr.linear.words import ItemWords
from components.evaluate.metrics import MOST_CHOOSING, PRIMARY, rank

SHARES = (0.3, 0.5)
NEW_SHARE = 0.2  # of the items with text and validation interactions
MOST_NEW = 2000


def with_words(known: NewItems, texts: Sequence[str], train: sp.csr_array, validation: sp.csr_array, seed: int) -> NewItems:
    """`known` with that share of the words by which some items, taken out of all histories, are ranked best among themselves;
    as it is where they are ranked no better.

    Args:
        known: of the items, without words.
        texts: of the items, (num_items,), "" where there is none.
        train: training interactions, binary, (num_users, num_items).
        validation: by which it is chosen.
        seed: of the items.
    """
    eligible = np.flatnonzero((np.bincount(validation.indices, minlength=validation.shape[1]) > 0) & known.side.any(axis=1))
    size = min(MOST_NEW, round(NEW_SHARE * len(eligible)))
    if size < 2:
        return known
    new = np.sort(np.random.default_rng(seed).choice(eligible, size, replace=False))
    is_old = np.isin(np.arange(train.shape[1]), new, invert=True)
    histories = sp.csr_array(train @ sp.diags_array(is_old.astype(np.float32)), dtype=np.float32)
    held_out, words = sp.csr_array(validation[:, new]), ItemWords.of(texts, share=0.0)
    nothing, users = sp.csr_array(held_out.shape, dtype=np.float32), by_lot(held_out, MOST_CHOOSING)

    def found(share: float) -> float:
        scores = KernelScores(histories, known.side, known.power, words.rows if share else None, share)
        return rank(lambda some: scores.score(some, items=new), nothing, held_out, users=users).mean()[PRIMARY]

    best = max((0.0, *SHARES), key=found)  # the first of equally good ones
    return replace(known, words=replace(words, share=best)) if best else known

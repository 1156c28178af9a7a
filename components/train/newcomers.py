"""How a newcomer's text is answered, and whether it is at all: chosen on validation, users as if they were new.

The texts are the users' own columns alone, which is all that a newcomer has. A known user's profile tells what he chose, so a
map of profiles looks far better on validation than it is: on MovieLens-100k, NDCG@10 of .207 instead of .140 (popularity .128).
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.linear.newcomers import CrossFits, Fits, Newcomers
from components.cllmr.linear.scores import Floats, LinearScores, Rows, by_popularity
from components.evaluate.metrics import PRIMARY, rank

L2 = (0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
POPULARITY_WEIGHTS = (0.0, 1.0)
FEWEST_USERS = 50
"""That choose, with a text and a validation interaction: fewer say nothing about others."""
MOST_RANKED = 2000
"""Users that choose."""
LEVEL = 0.05
"""Chance at most of a map being used that is no better than popularity."""


def fit_newcomers(
    texts: Floats, train: sp.csr_array, validation: sp.csr_array, models: dict[str, LinearScores], seed: int
) -> tuple[Newcomers | None, dict[str, Any]]:
    """The best map from texts to scores, None where too few users can choose or popularity does as well.

    Args:
        texts: embeddings of the users' own texts, (num_users, dim), rows of zeros where there is none.
        train: training interactions, binary, (num_users, num_items).
        validation: by which it is chosen.
        models: "factual" and "counterfactual".
        seed: of the folds and of the users that choose.

    Returns:
        And what was found: "users" with a text, and, where enough can choose, validation NDCG@10 of "popularity" and of the
        best map, "side_information", with its "l2" and "popularity_weight", and whether it is "used".
    """
    told = texts.any(axis=1)
    found: dict[str, Any] = {"users": int(told.sum()), "used": False}
    users = np.flatnonzero(told & (np.diff(validation.indptr) > 0))
    if len(users) < FEWEST_USERS:
        return None, found
    fits = CrossFits(texts, seed, models["factual"])
    popularity = by_popularity(np.bincount(train.indices, minlength=train.shape[1]))
    users = np.sort(np.random.default_rng(seed).permutation(users)[:MOST_RANKED])
    seen, held_out = sp.csr_array(train[users]), sp.csr_array(validation[users])

    def ranked(score: Callable[[Rows], Floats]) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = rank(lambda rows: score(users[rows]), seen, held_out).per_user[PRIMARY]
        return values

    of_popularity = ranked(lambda rows: np.repeat(popularity[None], len(rows), axis=0))
    tried = {(l2, weight): ranked(fits.fit(popularity, l2, weight).score) for l2 in L2 for weight in POPULARITY_WEIGHTS}
    best = max(tried, key=lambda setting: tried[setting].mean())
    gain = tried[best] - of_popularity
    # one of the settings tried is always best: each may pass by chance at its share of the level alone
    least = NormalDist().inv_cdf(1 - LEVEL / len(tried)) * gain.std(ddof=1) / np.sqrt(len(gain))
    found |= {
        "popularity": round(float(of_popularity.mean()), 6),
        "side_information": round(float(tried[best].mean()), 6),
        **dict(zip(("l2", "popularity_weight"), best, strict=True)),
        "used": bool(gain.mean() > least),
    }
    return (newcomers_of(texts, models, found) if found["used"] else None), found


def newcomers_of(texts: Floats, models: dict[str, LinearScores], found: dict[str, Any]) -> Newcomers:
    """The map that has been chosen.

    Args:
        texts: see `fit_newcomers`.
        models: "factual" and "counterfactual".
        found: its "l2" and "popularity_weight".
    """
    users = np.flatnonzero(texts.any(axis=1))
    return Fits(texts, users, models).fit(found["l2"], found["popularity_weight"])

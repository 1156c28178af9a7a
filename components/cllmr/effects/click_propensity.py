"""Which clicks a text brought in by itself: the propensity of the text, told from taste by the rest of the clickers' history.

A click on an item has two sources, the user's taste and the item's text ("everybody will love this"). Popularity cannot tell
them apart; two facts together can:

1. A user whom the text brought in does not match the item in the rest of his history: among all users, his match is a random
   one. So (2p - 1), p the percentile of a clicker's match among all users, has mean zero over such clicks, and over clicks
   of taste the mean of items without propensity, s. The clicks of item i that taste does not explain are, unbiasedly,

       N0_i = sum over clickers (1 - (2p - 1) / s)

2. The propensity is a direction of the text that taste does not share: items of all topics have it, and a user who clicked
   one such item is no more likely to have clicked others. A topic whose buyers are a mixed crowd (tape, batteries) also
   has unexplained clicks, but its direction is shared within users' histories. So N0_i / sqrt(n_i) is regressed on the text
   with a penalty on shared directions:

       w = argmin sum_i (N0_i / sqrt(n_i) - w . t_i)² + ridge |w|² + (taste_weight / n) w' M w

   M the covariance of the texts of two different items of one user's history, positive part, and n the clicks of the mean
   item: N0_i / sqrt(n_i) is sqrt(n_i) times the share of lured clicks, and it is the share that the prior speaks of.

The prediction w . t_i (cross-fitted over items) orders the items. How many clicks a text lures is a monotone function of it,
above the median item's (the reference). That function and the posterior of each single click are learnt by expectation and
maximisation, as the mixture of the two kinds of clicks; both densities of the percentile are learnt as well.

Assumptions: more than half of the items carry no propensity; lured users are not chosen by taste; the propensity is linear
in the text up to a monotone function. What is not identified: a propensity all texts share (it changes no ranking), and one
whose text direction is itself a taste (it cannot be told from that taste).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.effects.base import FloatArray, FloatMatrix, centred, cross_fitted, unit_rows

NUM_BINS = 20
"""Of the histograms of percentiles."""
MIDDLES = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
EM_STEPS = 20
MAX_SHARE = 0.98
"""No item is left without a trace of its clicks."""
SHARPNESS = 2.0
"""Exponent of the posteriors as weights of clicks. 1 blurs; beyond 3 accuracy falls, for then the likeliest clicks are all."""
BLOCK_SIZE = 4096
"""Users whose profiles are held at a time, where that is enough."""
MIN_SUPPORT = 3.0
"""Standard errors of the mean of 2p - 1 over clicks, were they all random. Below, histories say nothing about what is clicked,
and taste cannot be told from anything: no propensity is found. Above, little is enough: where many clicks are lured, most of a
user's history hides what the rest of it says."""


@dataclass(frozen=True)
class ClickPropensity:
    """Estimates of `estimate`."""

    share: FloatArray
    """Share of an item's clicks that its text brought in, above the reference item's; in [0, 1), (num_items,)."""
    lured: FloatArray
    """Expected number of such clicks by text alone, (num_items,)."""
    index: FloatArray
    """w . t_i, cross-fitted over items, (num_items,): the order of the items by propensity."""
    taste: sp.csr_array
    """Posterior probability that a click is of taste, at the clicks of the training log, (num_users, num_items) float32."""
    direction: FloatMatrix
    """Unit direction along which the text moves with the propensity, (text_dim,); zero where there is none."""

    def taste_log(self) -> sp.csr_array:
        """The log had the texts lured nobody: weights of the clicks in [0, 1], (num_users, num_items) float32.

        Of each item as many clicks as are expected of taste, but more of them where they are likelier: in proportion to the
        posterior to the power of `SHARPNESS`. Posteriors themselves spread an item's clicks of taste over users whose taste
        it is not, and it is then recommended to nobody.
        """
        clicks = sp.coo_array(self.taste)
        weights = _sharpened(clicks.data.astype(np.float64), clicks.coords[1], self.taste.shape[1])
        return sp.csr_array((weights.astype(np.float32), clicks.coords), shape=self.taste.shape)

    def likely_taste(self) -> sp.csr_array:
        """The clicks that are more likely of taste than lured, binary: for models whose log has no weights."""
        kept = self.taste.copy()  # zeros are eliminated in place
        kept.data = (kept.data >= 0.5).astype(np.float32)
        kept.eliminate_zeros()
        return kept


def estimate(
    train: sp.csr_array,
    text: npt.NDArray[np.floating],
    *,
    ridge: float = 30.0,
    taste_weight: float = 350.0,
    rounds: int = 3,
    null_users: int = 2000,
    seed: int = 0,
) -> ClickPropensity:
    """Tells clicks of taste from clicks of the text; see the module's docstring.

    Args:
        train: binary interactions, (num_users, num_items).
        text: item text embeddings with unit rows, (num_items, text_dim).
        ridge: penalty of w.
        taste_weight: penalty of shared directions.
        rounds: later rounds match users without the text direction and the clicks that the earlier ones found.
        null_users: users in whose matches a percentile is taken, at most.
        seed: of the folds and of the null users.
    """
    rng = np.random.default_rng(seed)
    num_users, num_items = train.shape
    users, items = (np.asarray(axis, dtype=np.int64) for axis in sp.coo_array(train).coords)
    clicks = np.bincount(items, minlength=num_items).astype(np.float64)
    told = centred(text)
    crowd = rng.permutation(num_users)[:null_users]
    # from all clicks, once: among clicks that passed for taste, any direction looks shared
    shared = taste_weight / max(clicks.mean(), 1.0)
    penalty = ridge * np.eye(told.shape[1]) + shared * shared_covariance(train, told)

    taste = np.ones(len(users))
    direction = np.zeros(told.shape[1])
    index = lured = share = np.zeros(num_items)
    for _ in range(rounds):
        log = sp.csr_array((taste, (users, items)), shape=train.shape)
        without = unit_rows(told - np.outer(told @ direction, direction))
        percentile = match_percentiles(log, users, items, taste, without, crowd)
        known = ~np.isnan(percentile)
        count = np.bincount(items[known], minlength=num_items).astype(np.float64)
        signal = np.bincount(items[known], 2 * percentile[known] - 1, minlength=num_items)
        reference = index <= np.median(index)
        seen = max(count[reference].sum(), 1.0)
        support = signal[reference].sum() / seen
        if support <= MIN_SUPPORT / np.sqrt(3 * seen):  # 2p - 1 is uniform on [-1, 1] then
            break
        unexplained = count - signal / support
        index = cross_fitted(told, unexplained / np.sqrt(count + 1), penalty, seed)
        taste, lured, share = _mixture(index, unexplained, percentile, items, clicks)
        direction = _direction(told, share)
    posterior = sp.csr_array((taste.astype(np.float32), (users, items)), shape=train.shape)
    return ClickPropensity(share, lured, index, posterior, direction.astype(np.float32))


def _mixture(
    index: FloatArray, unexplained: FloatArray, percentile: FloatArray, items: npt.NDArray[np.int64], clicks: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Posterior of each click, lured clicks and their share of each item, by expectation and maximisation.

    Percentiles of clicks of taste are distributed as those of the reference items (index below the median); those of lured
    clicks start as a random user's, uniform, and are then learnt, as a density that does not rise: a lured user never matches
    better than chance. How many are lured is a function of the index alone.
    """
    bins = np.minimum(np.nan_to_num(percentile) * NUM_BINS, NUM_BINS - 1).astype(np.int64)
    bins[np.isnan(percentile)] = NUM_BINS
    of_taste = _density(bins, (index <= np.median(index))[items].astype(np.float64))
    of_lured = np.ones(NUM_BINS + 1)
    counts: FloatArray = unexplained
    for _ in range(EM_STEPS):
        lured = excess(index, counts)
        share = np.where(clicks > 0, np.minimum(lured / np.maximum(clicks, 1.0), MAX_SHARE), 0.0)
        prior = share[items]
        taste = (1 - prior) * of_taste[bins] / ((1 - prior) * of_taste[bins] + prior * of_lured[bins])
        counts = np.bincount(items, 1 - taste, minlength=len(index)).astype(np.float64)
        of_lured[:NUM_BINS] = -monotone(MIDDLES, -_density(bins, 1 - taste)[:NUM_BINS])
    return taste, lured, share


def _density(bins: npt.NDArray[np.int64], weight: FloatArray) -> FloatArray:
    """Histogram density of percentiles, one more click in every bin; 1 for unknown ones, which tell nothing."""
    seen = np.bincount(bins, weight, minlength=NUM_BINS + 1)[:NUM_BINS] + 1.0
    return np.append(NUM_BINS * seen / seen.sum(), 1.0)


def excess(index: FloatArray, counts: FloatArray) -> FloatArray:
    """Counts that the index explains, above its median and beyond what the lower half varies, mirrored: (n,) >= 0.

    Natural differences between texts are taken to be symmetric about the median; a propensity is what the upper half has
    beyond that. Without one, little is left.
    """
    fitted = monotone(index, counts)
    ordered = np.sort(fitted)
    middle = np.median(ordered)
    mirrored = ordered[::-1][np.argsort(np.argsort(index, kind="stable"), kind="stable")]
    return np.asarray(np.maximum(fitted - middle - np.maximum(middle - mirrored, 0.0), 0.0))


def _sharpened(posterior: FloatArray, items: npt.NDArray[np.int32], num_items: int) -> FloatArray:
    """min(1, c_i posterior^SHARPNESS), c_i such that an item's weights sum to what its posteriors do: (num_clicks,)."""
    expected = np.bincount(items, posterior, minlength=num_items)
    powers = posterior**SHARPNESS
    full = np.zeros(len(posterior), dtype=bool)
    while True:  # those at 1 leave the rest to the others, of whom some may reach 1 by that
        left = expected - np.bincount(items, full, minlength=num_items)
        mass = np.bincount(items, np.where(full, 0.0, powers), minlength=num_items)
        scale = left / np.where(mass > 0, mass, 1.0)
        weights = np.where(full, 1.0, scale[items] * powers)
        beyond = weights > 1.0
        if not beyond.any():
            return np.asarray(weights)
        full |= beyond


def match_percentiles(
    log: sp.csr_array,
    users: npt.NDArray[np.int64],
    items: npt.NDArray[np.int64],
    weights: FloatArray,
    text: npt.NDArray[np.floating],
    crowd: npt.NDArray[np.int64],
) -> FloatArray:
    """Percentile of each click's match among the crowd's matches with the same item, in [0, 1].

    Match: cosine of the item's text and the weighted sum of the texts of the *other* items of the user's history, for the
    crowd as for who clicked: with the item in their own histories, those of the crowd who clicked it would match it best, and
    every popular item would look lured.

    Returns:
        (num_clicks,), NaN where the item has no text, and where the user's history holds nothing else.
    """
    profile = np.asarray(log @ text, dtype=np.float64)
    crowd_profile = unit_rows(profile[crowd])
    crowd_profile[~crowd_profile.any(axis=1)] = np.nan  # NaN: of whom nothing is known
    place = np.full(log.shape[0], -1)
    place[crowd] = np.arange(len(crowd))
    order = np.argsort(items, kind="stable")
    bounds = np.searchsorted(items[order], np.arange(len(text) + 1))
    result = np.full(len(users), np.nan)
    for item in np.flatnonzero((np.diff(bounds) > 0) & text.any(axis=1)):
        of_item = order[bounds[item] : bounds[item + 1]]
        others = profile[users[of_item]] - weights[of_item, None] * text[item]
        length = np.linalg.norm(others, axis=1)
        match = np.where(length < 1e-6, np.nan, others @ text[item] / np.maximum(length, 1e-9))
        of_crowd, places = crowd_profile @ text[item], place[users[of_item]]
        of_crowd[places[places >= 0]] = match[places >= 0]
        of_crowd = np.sort(of_crowd[~np.isnan(of_crowd)])
        rank = np.searchsorted(of_crowd, match) / max(len(of_crowd), 1)
        result[of_item] = np.where(np.isnan(match), np.nan, rank)
    return result


def shared_covariance(log: sp.csr_array, text: FloatArray) -> FloatArray:
    """M: covariance of the texts of two different clicks of one user, positive part, in units of a sum over items.

    Args:
        log: click weights, (num_users, num_items).
        text: (num_items, text_dim).
    """
    size = np.asarray(log.sum(axis=1)).ravel()
    squares = np.asarray(log.multiply(log).sum(axis=1)).ravel()
    pairs = size**2 - squares
    usable = pairs > 1e-9
    weight = np.where(usable, size / np.where(usable, pairs, 1.0), 0.0)  # a user counts as often as he clicked
    own = np.asarray(log.multiply(log).T @ weight).ravel()
    mean = np.asarray(log.sum(axis=0)).ravel() @ text / max(size.sum(), 1e-9)
    moment = -(text.T * own) @ text - size[usable].sum() * np.outer(mean, mean)
    for start in range(0, len(size), BLOCK_SIZE):  # all profiles at once are gigabytes for a million users
        some = slice(start, start + BLOCK_SIZE)
        profile = log[some] @ text
        moment += (profile.T * weight[some]) @ profile
    values, vectors = np.linalg.eigh((moment + moment.T) / 2)
    return np.asarray((vectors * np.maximum(values, 0.0)) @ vectors.T * (len(text) / max(size.sum(), 1e-9)))


def monotone(x: FloatArray, y: FloatArray) -> FloatArray:
    """Least-squares non-decreasing function of x through (x, y), at the x given (pool adjacent violators): (n,)."""
    order = np.argsort(x, kind="stable")
    means: list[float] = []
    counts: list[int] = []
    for value in y[order].tolist():
        mean, count = value, 1
        while means and means[-1] >= mean:
            mean = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            count += counts.pop()
            means.pop()
        means.append(mean)
        counts.append(count)
    result = np.empty(len(x))
    result[order] = np.repeat(means, counts)
    return result


def _direction(text: FloatArray, share: FloatArray) -> FloatArray:
    """The unit direction in which texts differ as their propensity does: the covariance of text and share."""
    direction = text.T @ (share - share.mean())
    length = np.linalg.norm(direction)
    return np.asarray(direction / length) if length > 1e-9 else np.zeros(text.shape[1])

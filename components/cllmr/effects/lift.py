"""(b, c) The direct effect is what the text, by itself, adds to an item's score for everybody: NDE_ui = c_u h(text_i).

`score_lift`: h predicts, from the text, how much higher the mean score is than that of the same model without text; c_u = 1.
`popularity_lift`: h predicts the item's log clicks. c_u = a_u . v is the slope of the user's scores on log clicks, v the
regression of the item factors on log clicks: the score that this much popularity brings with this user.
`identified_lift`: the same, h the log clicks that the text lured (`click_propensity`).
"""

import numpy as np

from components.cllmr.effects.base import Effect, EffectFactors, Evidence, FloatArray, FloatMatrix, centred, cross_fitted, ridge
from components.cllmr.effects.click_propensity import estimate

RIDGE = 30.0


def item_lift(evidence: Evidence) -> FloatArray:
    """Mean score of each item over the users, minus that of the same model without text: (num_items,)."""
    bare = evidence.refit(evidence.train, np.zeros_like(evidence.text))
    means = [factors.items @ factors.users.mean(axis=0) for factors in (evidence.factual, bare)]
    return np.asarray(means[0] - means[1], dtype=np.float64)


def score_lift(evidence: Evidence) -> EffectFactors:
    """The mean lift of the score that the text explains."""
    text = centred(evidence.text)
    h = cross_fitted(text, item_lift(evidence), ridge(text, RIDGE))
    return EffectFactors(*evidence.factual, np.ones((len(evidence.factual.users), 1), np.float32), _column(h - np.median(h)))


def popularity_lift(evidence: Evidence) -> EffectFactors:
    """The score of the log clicks that the text explains, whether lured or not: not identified."""
    text = centred(evidence.text)
    h = cross_fitted(text, _log_clicks(evidence), ridge(text, RIDGE))
    return _of_log_clicks(evidence, h - np.median(h))


def identified_lift(evidence: Evidence) -> EffectFactors:
    """The score of the log clicks that the text lured."""
    propensity = estimate(evidence.train, evidence.text)
    clicks = np.asarray(evidence.train.sum(axis=0), dtype=np.float64).ravel()
    return _of_log_clicks(evidence, np.log1p(clicks) - np.log1p(clicks * (1 - propensity.share)))


def _of_log_clicks(evidence: Evidence, h: FloatArray) -> EffectFactors:
    deviation = _log_clicks(evidence) - _log_clicks(evidence).mean()
    v = deviation @ evidence.factual.items / max(float(deviation @ deviation), 1e-12)
    slope = np.asarray(evidence.factual.users @ v, dtype=np.float32)[:, None]
    return EffectFactors(*evidence.factual, slope, _column(h))


def _log_clicks(evidence: Evidence) -> FloatArray:
    return np.log1p(np.asarray(evidence.train.sum(axis=0), dtype=np.float64).ravel())


def _column(values: FloatArray) -> FloatMatrix:
    return values.astype(np.float32)[:, None]


FORMULATIONS: dict[str, Effect] = {"lift_score": score_lift, "lift_popularity": popularity_lift, "lift": identified_lift}

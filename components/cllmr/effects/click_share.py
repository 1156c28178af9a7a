"""The direct effect is the share of the score that the item's lured clicks are of its clicks: NDE_ui = share_i TE_ui."""

import numpy as np

from components.cllmr.effects.base import Effect, EffectFactors, Evidence
from components.cllmr.effects.click_propensity import estimate


def click_share(evidence: Evidence) -> EffectFactors:
    """Scores in proportion to the clicks of taste; needs scores that are positive where they matter, and no second fit."""
    share = estimate(evidence.train, evidence.text).share.astype(np.float32)
    return EffectFactors(*evidence.factual, evidence.factual.users, share[:, None] * evidence.factual.items)


FORMULATIONS: dict[str, Effect] = {"click_share": click_share}

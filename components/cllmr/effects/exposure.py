"""(e) Offsets per item that bring its expected exposure to what its clicks of taste support: NDE_ui = spread_u d_i.

Exposure is soft: each user hands out one unit by the softmax of his scores over what he has not clicked. Items whose text
lures keep the share of their exposure that their clicks of taste are of their clicks; d_i >= 0 is solved for by fixed point.
"""

import numpy as np
import numpy.typing as npt

from components.cllmr.effects.base import Effect, EffectFactors, Evidence, FloatArray
from components.cllmr.effects.click_propensity import estimate

TEMPERATURE = 0.25
"""Of the softmax, in standard deviations of the user's scores: most of the exposure goes to the top few."""
STEPS = 30
"""Of the fixed point."""
MAX_USERS = 1000
"""Users that the offsets are solved for, by lot."""


def exposure(evidence: Evidence) -> EffectFactors:
    """Solves for the offsets d_i on a sample of users."""
    share = estimate(evidence.train, evidence.text).share
    users, items = evidence.factual
    blocks = [np.std(users[start : start + 512] @ items.T, axis=1) for start in range(0, len(users), 512)]
    spread = np.maximum(np.concatenate(blocks), 1e-12)
    sample = np.random.default_rng(0).permutation(len(users))[:MAX_USERS]
    logits = users[sample] @ items.T / spread[sample][:, None] / TEMPERATURE
    logits[evidence.train[sample].toarray() > 0] = -np.inf
    logits = logits[np.isfinite(logits).any(axis=1)]  # who has clicked everything has nothing left to be shown
    offset = np.zeros(len(items))
    wanted = _exposure(logits) * (1 - share)
    affected = share > 0
    for _ in range(STEPS):
        found = _exposure(logits - offset[None, :] / TEMPERATURE)
        step = TEMPERATURE * np.log(np.maximum(found, 1e-12) / np.maximum(wanted, 1e-12))
        offset[affected] = np.maximum(offset[affected] + step[affected], 0.0)
    return EffectFactors(users, items, spread.astype(np.float32)[:, None], offset.astype(np.float32)[:, None])


def _exposure(logits: npt.NDArray[np.floating]) -> FloatArray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray((weights / weights.sum(axis=1, keepdims=True)).mean(axis=0))


FORMULATIONS: dict[str, Effect] = {"exposure": exposure}

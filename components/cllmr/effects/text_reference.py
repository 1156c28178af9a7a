"""(a) The direct effect is the score that the reference part of the text carries: NDE_ui = a_u . map(r_i).

map is the ridge regression of the item factors on the texts, r_i the text projected on directions that are not the item's own:
generic ones (the mean and the first principal component), or the identified direction of the propensity. Where a language model
wrote reference texts, r_i is the part along those (`reference_texts`).
"""

import numpy as np
import numpy.typing as npt

from components.cllmr.effects.base import Effect, EffectFactors, Evidence, FloatArray, centred, ridge, ridge_map
from components.cllmr.effects.click_propensity import estimate
from components.cllmr.effects.subspace import generic_directions

RIDGE = 1.0


def text_reference(evidence: Evidence, directions: npt.NDArray[np.floating]) -> EffectFactors:
    """The effect of the part of the text in the span of `directions` (text_dim, k), orthonormal columns."""
    return carried(evidence, centred(evidence.text) @ directions @ directions.T)


def carried(evidence: Evidence, reference: FloatArray) -> EffectFactors:
    """The effect of the part `reference` (num_items, text_dim) of the centred texts."""
    text = centred(evidence.text)
    score = reference @ ridge_map(text, evidence.factual.items, ridge(text, RIDGE))
    return EffectFactors(*evidence.factual, evidence.factual.users, score.astype(np.float32))


def generic(evidence: Evidence) -> EffectFactors:
    """Reference: the mean text and the first principal component."""
    return text_reference(evidence, generic_directions(evidence.text))


def identified(evidence: Evidence) -> EffectFactors:
    """Reference: the direction along which texts lure clicks."""
    return text_reference(evidence, estimate(evidence.train, evidence.text).direction[:, None])


FORMULATIONS: dict[str, Effect] = {"text_reference_generic": generic, "text_reference": identified}

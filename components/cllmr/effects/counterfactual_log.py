"""The counterfactual log: the model as it would be, had the texts lured nobody. NDE = TE - Y(taste log, text without praise).

Every click is weighted by how likely it is of taste (`ClickPropensity.taste_log`), the direction of the propensity is projected
out of the texts, and the same model is fitted again and asked with histories of the same weights: a lured click that stays in a
user's history goes on asking for what lured him. λ = 1 is right by construction: weights are clicks, not a unit to be tuned.
"""

from components.cllmr.effects.base import Effect, EffectFactors, Evidence, contrast
from components.cllmr.effects.click_propensity import estimate
from components.cllmr.effects.subspace import project_out


def counterfactual_log(evidence: Evidence) -> EffectFactors:
    """Clicks of taste, and texts without the direction along which they lure."""
    found = estimate(evidence.train, evidence.text)
    return contrast(evidence.factual, evidence.refit(found.taste_log(), project_out(evidence.text, found.direction[:, None])))


def clicks_alone(evidence: Evidence) -> EffectFactors:
    """Clicks of taste, texts as they are."""
    return contrast(evidence.factual, evidence.refit(estimate(evidence.train, evidence.text).taste_log(), evidence.text))


FORMULATIONS: dict[str, Effect] = {"counterfactual_clicks": clicks_alone, "counterfactual_log": counterfactual_log}

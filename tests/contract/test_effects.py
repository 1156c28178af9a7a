"""Every formulation of the counterfactual passes the inherited suite, and none is left out."""

import numpy as np
import torch

from components.cllmr.effects import EFFECTS
from components.cllmr.effects.base import EffectFactors, Evidence
from components.cllmr.effects.gates import MediatorFactors, effect_factors
from tests.contract.effect_contract import EffectContract


class TestGates(EffectContract):
    def fitted(self, evidence: Evidence) -> EffectFactors:
        """A model whose mediator and gates together give the factual score of the evidence."""
        gate = torch.linspace(0.5, 1.5, len(evidence.factual.items))
        items = torch.from_numpy(evidence.factual.items) / gate[:, None]
        mediator = MediatorFactors(torch.from_numpy(evidence.factual.users), items)
        return effect_factors(mediator, torch.ones(len(evidence.factual.users)), gate)


class TestTextReferenceGeneric(EffectContract):
    name = "text_reference_generic"


class TestTextReference(EffectContract):
    name = "text_reference"


class TestReferenceTextsScore(EffectContract):
    name = "reference_texts"


class TestReferenceTexts(EffectContract):
    name = "reference_texts_refitted"


class TestLiftScore(EffectContract):
    name = "lift_score"


class TestLiftPopularity(EffectContract):
    name = "lift_popularity"


class TestLift(EffectContract):
    name = "lift"


class TestSubspaceGeneric(EffectContract):
    name = "subspace_generic"


class TestSubspaceLift(EffectContract):
    name = "subspace_lift"


class TestSubspace(EffectContract):
    name = "subspace"


class TestExposure(EffectContract):
    name = "exposure"


class TestClickShare(EffectContract):
    name = "click_share"


class TestCounterfactualClicks(EffectContract):
    name = "counterfactual_clicks"


class TestCounterfactualLog(EffectContract):
    name = "counterfactual_log"


def test_no_formulation_is_left_out() -> None:
    tested = {cls.name for cls in EffectContract.__subclasses__() if hasattr(cls, "name")}
    assert tested == set(EFFECTS)


def test_gates_equal_the_papers_algebra() -> None:
    generator = torch.Generator().manual_seed(0)
    mediator = MediatorFactors(torch.rand(5, 3, generator=generator), torch.rand(7, 3, generator=generator))
    user_gate, item_gate = torch.rand(5, generator=generator), torch.rand(7, generator=generator)
    found = effect_factors(mediator, user_gate, item_gate)
    m = (mediator.users @ mediator.items.T).numpy()
    gate = (user_gate[:, None] * item_gate[None, :]).numpy()
    served = found.debiased(0.7)
    expected = (m - 0.7 * m.mean(axis=1, keepdims=True)) * gate
    np.testing.assert_allclose(served.users @ served.items.T, expected, atol=1e-6)

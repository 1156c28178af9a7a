"""Every formulation of the counterfactual passes the inherited suite, and none is left out."""

import numpy as np
import pytest

from components.cllmr.effects import EFFECTS, lift
from components.cllmr.effects.base import EffectFactors, Evidence, gated, reference
from components.cllmr.registry import mappings
from tests.contract.effect_contract import EffectContract


class TestGates(EffectContract):
    def fitted(self, evidence: Evidence) -> EffectFactors:
        """A model whose mediator and gates together give the factual score of the evidence."""
        users, gate = evidence.factual.users, np.linspace(0.5, 1.5, len(evidence.factual.items), dtype=np.float32)
        items = evidence.factual.items / gate[:, None]
        return EffectFactors(users, gated(items, gate, 0.0), users, gate[:, None] * reference(items))


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


def test_a_name_that_two_files_offer_and_a_file_that_offers_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made_of = ("click_propensity", "gates")
    assert mappings("effects", "FORMULATIONS", made_of) == EFFECTS
    with pytest.raises(TypeError, match=r"effects\.click_propensity offers nothing: a file here has FORMULATIONS, by name"):
        mappings("effects", "FORMULATIONS", but=())
    monkeypatch.setitem(lift.FORMULATIONS, "exposure", EFFECTS["lift"])
    said = r"effects\.exposure and .*effects\.lift both offer 'exposure': give it another name in the FORMULATIONS of one"
    with pytest.raises(TypeError, match=said):
        mappings("effects", "FORMULATIONS", made_of)


def test_gates_equal_the_papers_algebra() -> None:
    rng = np.random.default_rng(0)
    users, items, gate = (rng.random(shape, dtype=np.float32) for shape in ((5, 3), (7, 3), 7))
    m = users @ items.T
    for strength in (0.0, 0.7, 1.0):
        expected = (m - strength * m.mean(axis=1, keepdims=True)) * gate
        np.testing.assert_allclose(users @ gated(items, gate, strength).T, expected, atol=1e-6)
    np.testing.assert_array_equal(gated(items, gate, 0.0), gate[:, None] * items)

"""What every formulation of the counterfactual must do; a new one inherits this suite by naming itself."""

import numpy as np
import pytest
import scipy.sparse as sp

from components.cllmr.effects import EFFECTS
from components.cllmr.effects.base import EffectFactors, Evidence, Factors, centred
from components.cllmr.linear.ease import EaseSettings
from components.errors import ConfigError
from components.experiment.propensity import ease
from tests.planted import propensity_world


class EffectContract:
    """Inherit, and give `name`, or override `fitted`."""

    name: str

    @pytest.fixture(scope="class")
    def evidence(self) -> Evidence:
        """A small log with inflated texts, and a model of it."""
        world = propensity_world(num_blocks=4, users_per_block=25, items_per_block=15, propensity=0.15, seed=1)
        train = sp.csr_array(world.matrix(world.train))
        refit = ease(EaseSettings(20.0, side_weight=10.0))
        of_class = np.array([world.item_text[world.item_block == block].mean(axis=0) for block in world.item_block])
        references = centred(of_class, around=world.item_text).astype(np.float32)
        return Evidence(refit(train, world.item_text), train, world.item_text, refit, references)

    @pytest.fixture(scope="class")
    def found(self, evidence: Evidence) -> EffectFactors:
        return self.fitted(evidence)

    def fitted(self, evidence: Evidence) -> EffectFactors:
        return EFFECTS[self.name](evidence)

    @staticmethod
    def table(factors: Factors) -> np.ndarray:
        return np.asarray(factors.users, dtype=np.float64) @ np.asarray(factors.items, dtype=np.float64).T

    def test_factors_are_finite_float32(self, found: EffectFactors) -> None:
        for factor in (found.users, found.items, found.direct_users, found.direct_items):
            assert factor.dtype == np.float32
            assert np.isfinite(factor).all()

    def test_there_is_a_direct_effect_that_differs_between_items(self, found: EffectFactors) -> None:
        direct = self.table(found.factors("pnde"))
        assert np.ptp(direct, axis=1).max() > 1e-6

    def test_total_is_direct_plus_indirect(self, found: EffectFactors) -> None:
        users, items = np.arange(40) % len(found.users), np.arange(40) % len(found.items)
        effects = found.effects(users, items, strength=0.3)
        np.testing.assert_allclose(effects.total, effects.direct + effects.indirect, atol=1e-5)
        np.testing.assert_allclose(effects.debiased, effects.total - 0.3 * effects.direct, atol=1e-5)

    def test_strength_zero_is_the_factual_score(self, found: EffectFactors, evidence: Evidence) -> None:
        np.testing.assert_allclose(self.table(found.debiased(0.0)), self.table(evidence.factual), atol=1e-5)

    @pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
    def test_the_served_inner_product_is_the_algebra(self, found: EffectFactors, strength: float) -> None:
        users, items = (grid.ravel() for grid in np.indices((len(found.users), len(found.items))))
        algebra = found.effects(users, items, strength).debiased.reshape(len(found.users), -1)
        served = found.debiased(strength)
        assert served.users.shape[1] == found.users.shape[1] + found.direct_users.shape[1]
        np.testing.assert_allclose(served.users @ served.items.T, algebra, atol=1e-5)
        np.testing.assert_array_equal(found.factors("tnie", strength).items, served.items)

    def test_the_effect_kinds_are_direct_and_factual(self, found: EffectFactors) -> None:
        np.testing.assert_array_equal(found.factors("pnde").items, found.direct_items)
        np.testing.assert_array_equal(found.factors("none").items, found.items)
        with pytest.raises(ConfigError, match="tnie, pnde, none"):
            found.factors("tie")  # type: ignore[arg-type]  # what a user may write into a config

    def test_the_same_evidence_gives_the_same_effect(self, found: EffectFactors, evidence: Evidence) -> None:
        np.testing.assert_array_equal(self.fitted(evidence).direct_items, found.direct_items)

"""What every kind of model in an experiment must do; a new one inherits this suite by naming itself."""

from typing import Any, ClassVar

import numpy as np
import pytest

from components.evaluate.metrics import rank
from components.experiment.config import Kind
from components.experiment.dataset import ExperimentData
from components.experiment.models import KINDS, Fitted, Task


class ModelContract:
    """Inherit, and give `kind` and `settings`."""

    kind: Kind
    settings: ClassVar[dict[str, Any]] = {}
    personal = True
    """Whether users are ranked different items."""

    def fit(self, data: ExperimentData, seed: int = 1, chosen: Any = None) -> Fitted:
        return KINDS[self.kind].fit(Task(data, self.settings, seed, chosen=chosen))

    @pytest.fixture(scope="class")
    def fitted(self, data: ExperimentData) -> Fitted:
        return self.fit(data)

    @staticmethod
    def table(fitted: Fitted, data: ExperimentData) -> np.ndarray:
        return fitted.scores.score(np.arange(data.num_users))

    def test_scores_are_finite_numbers_of_all_items(self, fitted: Fitted, data: ExperimentData) -> None:
        table = self.table(fitted, data)
        assert table.shape == (data.num_users, data.num_items)
        assert table.dtype == np.float32
        assert np.isfinite(table).all()
        assert (np.ptp(table, axis=0).max() > 0) == self.personal

    def test_a_users_scores_do_not_depend_on_who_is_asked_with_them(self, fitted: Fitted, data: ExperimentData) -> None:
        table, some = self.table(fitted, data), np.array([17, 3, 3])
        np.testing.assert_allclose(fitted.scores.score(some), table[some], rtol=1e-4, atol=1e-5)

    def test_the_same_seed_gives_the_same_bits(self, fitted: Fitted, data: ExperimentData) -> None:
        again = self.fit(data)
        np.testing.assert_array_equal(self.table(again, data), self.table(fitted, data))
        assert again.chosen == fitted.chosen

    def test_another_seed_changes_what_depends_on_chance_and_nothing_else(self, fitted: Fitted, data: ExperimentData) -> None:
        other = self.fit(data, seed=2, chosen=fitted.chosen)
        assert np.array_equal(self.table(other, data), self.table(fitted, data)) != KINDS[self.kind].uses_chance

    def test_it_ranks_better_than_chance_does(self, fitted: Fitted, data: ExperimentData) -> None:
        drawn = np.random.default_rng(0).random((data.num_users, data.num_items), dtype=np.float32)
        by_chance, found = (
            rank(score, data.train, data.test).mean()["recall@10"] for score in (lambda rows: drawn[rows], fitted.scores.score)
        )
        assert found > (1.8 if self.personal else 1.2) * by_chance, f"{found:.3f} against {by_chance:.3f}"

"""Statistics of experiments against scipy and against hand-made grids."""

import numpy as np
import pytest
from scipy import stats

from components.experiment.statistics import paired, spread, two_way


def test_the_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 4.0]) == {
        "mean": 2.333333,
        "std": round(float(np.std([1, 2, 4], ddof=1)), 6),
        "per_seed": [1, 2, 4],
    }
    assert spread([0.5])["std"] == 0.0


def test_the_paired_tests_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.random(200)
    ours = theirs + rng.normal(0.02, 0.1, 200)
    found = paired(ours, theirs)
    assert found["t_p"] == stats.ttest_1samp(ours - theirs, 0.0).pvalue
    assert found["wilcoxon_p"] == stats.wilcoxon(ours, theirs).pvalue
    assert found["difference"] == pytest.approx(ours.mean() - theirs.mean(), abs=1e-6)
    assert found["relative_percent"] == pytest.approx(100 * (ours.mean() / theirs.mean() - 1), abs=1e-3)


def test_equal_models_do_not_differ_and_a_constant_difference_is_certain() -> None:
    same = np.array([0.1, 0.5, 0.9])
    assert paired(same, same) == {"difference": 0.0, "relative_percent": 0.0, "t_p": 1.0, "wilcoxon_p": 1.0}
    assert paired(np.array([1.0, 2.0]), np.array([0.5, 1.5]))["t_p"] == 0.0


def test_one_user_shows_nothing() -> None:
    assert paired(np.array([1.0]), np.array([0.5])) == {
        "difference": 0.5,
        "relative_percent": 100.0,
        "t_p": 1.0,
        "wilcoxon_p": 1.0,
    }


def test_the_analysis_of_variance_equals_sums_of_squares_by_least_squares() -> None:
    rng = np.random.default_rng(1)
    blocks, num_a, num_b, repeats = 3, 4, 2, 5
    values = rng.normal(size=(blocks, num_a, num_b, repeats)) + np.arange(4)[None, :, None, None]
    found = two_way(values)
    block, a, b, _ = (index.ravel() for index in np.indices(values.shape))
    y = values.ravel()

    def residual(*factors: np.ndarray) -> float:
        columns = [np.ones_like(y)] + [(factor == level).astype(float) for factor in factors for level in np.unique(factor)]
        design = np.stack(columns, axis=1)
        return float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())

    cell = a * num_b + b
    assert found["a"]["sum_of_squares"] == pytest.approx(residual(block, b) - residual(block, a, b))
    assert found["interaction"]["sum_of_squares"] == pytest.approx(residual(block, a, b) - residual(block, cell))
    assert found["error"]["sum_of_squares"] == pytest.approx(residual(block, cell))
    assert found["error"]["df"] == y.size - 1 - (blocks - 1) - (num_a * num_b - 1)
    f = (found["a"]["sum_of_squares"] / 3) / (found["error"]["sum_of_squares"] / found["error"]["df"])
    assert found["a"]["p"] == pytest.approx(stats.f.sf(f, 3, found["error"]["df"]))


def test_a_planted_interaction_is_found_and_an_additive_grid_has_none() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(scale=0.1, size=(2, 3, 3, 4))
    additive = np.arange(3)[None, :, None, None] + 2 * np.arange(3)[None, None, :, None] + noise
    crossed = additive + np.eye(3)[None, :, :, None]
    assert two_way(additive)["interaction"]["p"] > 0.01
    assert two_way(crossed)["interaction"]["p"] < 1e-6
    assert two_way(crossed)["interaction_effects"][0][0] == pytest.approx(2 / 3, abs=0.1)


def test_without_repeats_and_blocks_nothing_is_tested() -> None:
    found = two_way(np.arange(4.0).reshape(1, 2, 2, 1))
    assert found["error"]["df"] == 0
    assert found["a"]["p"] is None

"""Statistics of experiments against scipy and against hand-made grids."""

import numpy as np
import pytest
from scipy import stats

from components.experiment.statistics import means, paired, spread, two_way
from components.experiment.tables import signed


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
    assert found["t_p"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert found["wilcoxon_p"] == stats.wilcoxon(ours, theirs).pvalue
    assert found["difference"] == pytest.approx(ours.mean() - theirs.mean(), abs=1e-6)
    assert found["relative_percent"] == pytest.approx(100 * (ours.mean() / theirs.mean() - 1), abs=1e-3)


def test_equal_models_do_not_differ_and_a_constant_difference_is_certain() -> None:
    same = np.array([0.1, 0.5, 0.9])
    assert paired(same, same) == {"difference": 0.0, "relative_percent": 0.0, "t_p": 1.0, "wilcoxon_p": 1.0}
    assert paired(np.array([1.0, 2.0]), np.array([0.5, 1.5]))["t_p"] == 0.0


def test_rounding_of_means_over_seeds_is_no_difference() -> None:
    x = np.random.default_rng(0).random(1000)
    mean = means([{"m": x}] * 5)["m"]
    assert (mean != x).any(), "nothing was rounded: nothing is tested"
    assert paired(mean, x) == {"difference": 0.0, "relative_percent": 0.0, "t_p": 1.0, "wilcoxon_p": 1.0}
    ours = np.where(np.arange(1000) < 9, mean + 0.1, mean)
    assert paired(ours, x)["wilcoxon_p"] == stats.wilcoxon([0.1] * 9 + [0.0] * 991).pvalue


def test_against_nothing_there_is_no_share_and_the_table_says_so() -> None:
    found = paired(np.array([0.1, 0.2]), np.zeros(2))
    assert (found["difference"], found["relative_percent"]) == (0.15, None)
    assert signed(found) == "theirs is 0"
    assert signed(paired(np.zeros(2), np.zeros(2))) == "+0.0 %"
    assert signed(paired(np.zeros(2), np.array([0.1, 0.2]))) == "−100.0 %"


def test_one_user_shows_nothing() -> None:
    assert paired(np.array([1.0]), np.array([0.5])) == {
        "difference": 0.5,
        "relative_percent": 100.0,
        "t_p": 1.0,
        "wilcoxon_p": 1.0,
    }


def least_squares(y: np.ndarray, *factors: np.ndarray) -> float:
    """Residual sum of squares of a regression on indicators of the levels of every factor."""
    columns = [np.ones_like(y)] + [(factor == level).astype(float) for factor in factors for level in np.unique(factor)]
    design = np.stack(columns, axis=1)
    return float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_analysis_of_variance_equals_sums_of_squares_by_least_squares(blocks: int) -> None:
    rng = np.random.default_rng(1)
    num_a, num_b, repeats = 4, 2, 5
    values = rng.normal(size=(blocks, num_a, num_b, repeats)) + np.arange(4)[None, :, None, None]
    found = two_way(values)
    if blocks > 1:  # what is tested are the means over repeats
        values = values.mean(axis=3, keepdims=True)
    block, a, b, _ = (index.ravel() for index in np.indices(values.shape))
    y = values.ravel()
    cell = a * num_b + b
    assert found["a"]["sum_of_squares"] == pytest.approx(least_squares(y, block, b) - least_squares(y, block, a, b))
    additive = least_squares(y, block, a, b) - least_squares(y, block, cell)
    assert found["interaction"]["sum_of_squares"] == pytest.approx(additive)
    assert found["error"]["sum_of_squares"] == pytest.approx(least_squares(y, block, cell))
    df = found["error"]["df"]
    assert df == ((blocks - 1) * (num_a * num_b - 1) if blocks > 1 else num_a * num_b * (repeats - 1))
    f = (found["a"]["sum_of_squares"] / 3) / (found["error"]["sum_of_squares"] / df)
    assert found["a"]["p"] == pytest.approx(stats.f.sf(f, 3, df))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_where_data_sets_agree_on_nothing_one_effect_in_twenty_is_significant(blocks: int) -> None:
    """Each data set responds in its own way; with seeds as degrees of freedom 7 of 10 effects on two of them passed."""
    rng = np.random.default_rng(0)
    drawn = 1000
    rejected = dict.fromkeys(("a", "b", "interaction"), 0)
    for _ in range(drawn):
        own = rng.normal(size=(blocks, 3, 3, 1)) if blocks > 1 else 0.0  # of one data set the response is what is tested
        found = two_way(own + 0.3 * rng.normal(size=(blocks, 3, 3, 5)))
        for name in rejected:
            rejected[name] += found[name]["p"] < 0.05
    # four standard errors of a share of .05 among so many
    assert all(abs(count / drawn - 0.05) < 4 * (0.05 * 0.95 / drawn) ** 0.5 for count in rejected.values()), rejected


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


def test_rounding_of_equal_repeats_is_no_error_of_an_analysis_of_variance() -> None:
    for seed in range(20):
        found = two_way(np.repeat(np.random.default_rng(seed).random((1, 4, 2, 1)), 5, axis=3))
        assert found["error"]["sum_of_squares"] == 0
        assert found["a"]["f"] is None

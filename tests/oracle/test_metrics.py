"""Ranking metrics, intervals, collapse and exposure figures against values computed by hand."""

import math
import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp

from components.cllmr.linear.ranking import NO_ITEM, head_items, top_k
from components.evaluate import bias, collapse, metrics


def interactions(rows: list[list[int]], num_items: int) -> sp.csr_array:
    """One list of item rows per user."""
    users = [user for user, items in enumerate(rows) for _ in items]
    items = [item for row in rows for item in row]
    return sp.csr_array((np.ones(len(items), dtype=np.float32), (users, items)), shape=(len(rows), num_items))


def score_of(table: np.ndarray):
    return lambda users: table[users].astype(np.float32)


def test_recall_and_ndcg_equal_the_hand_computed_table():
    scores = np.zeros((3, 6))
    scores[0] = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    scores[2] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    seen = interactions([[0], [1], []], 6)
    held_out = interactions([[2, 4], [], [0]], 6)
    ranking = metrics.rank(score_of(scores), seen, held_out)
    assert ranking.users.tolist() == [0, 2]  # user 1 has nothing held out
    # user 0: item 0 is masked, so 1 2 3 4 5: hits at ranks 2 and 4. user 2: 5 4 3 2 1 0: hit at rank 6
    assert ranking.top_items[0].tolist() == [1, 2, 3, 4, 5, *[NO_ITEM] * 15]
    assert ranking.top_items[1, :6].tolist() == [5, 4, 3, 2, 1, 0]
    ndcg = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert ndcg == pytest.approx(0.650921, abs=1e-6)
    assert ranking.per_user["recall@5"].tolist() == [1.0, 0.0]
    assert ranking.per_user["recall@10"].tolist() == [1.0, 1.0]
    assert ranking.per_user["ndcg@5"] == pytest.approx([ndcg, 0.0], abs=1e-12)
    assert ranking.per_user["ndcg@10"] == pytest.approx([ndcg, 1 / math.log2(7)], abs=1e-12)
    assert ranking.mean()["recall@5"] == 0.5


def test_the_ideal_has_at_most_k_hits_and_recall_divides_by_all_held_out_items():
    held_out = interactions([[0, 1, 2, 3, 4, 5, 6]], 30)
    ranking = metrics.rank(score_of(-np.arange(30.0)[None]), interactions([[]], 30), held_out)
    assert ranking.mean() == pytest.approx(
        {"recall@5": 5 / 7, "recall@10": 1.0, "recall@20": 1.0, "ndcg@5": 1.0, "ndcg@10": 1.0, "ndcg@20": 1.0}
    )


def test_validation_items_stay_in_the_ranking_at_test_time():
    # the best item is a validation item: it takes the first place, the test item gets the second
    ranking = metrics.rank(score_of(np.array([[3.0, 2.0, 1.0]])), interactions([[2]], 3), interactions([[1]], 3))
    assert ranking.top_items[0, :2].tolist() == [0, 1]
    assert ranking.mean()["ndcg@5"] == pytest.approx(1 / math.log2(3))


def test_training_items_are_never_ranked_even_when_their_scores_are_the_best():
    rng = np.random.default_rng(0)
    seen = sp.csr_array((rng.random((20, 40)) < 0.3).astype(np.float32))
    held_out = sp.csr_array(((rng.random((20, 40)) < 0.2) & (seen.toarray() == 0)).astype(np.float32))
    ranking = metrics.rank(score_of(seen.toarray() * 100 + rng.random((20, 40))), seen, held_out)
    for user, top in zip(ranking.users, ranking.top_items, strict=True):
        assert not set(top[top != NO_ITEM]) & set(seen[[user]].nonzero()[1])


@pytest.mark.parametrize("block_size", [1, 3, 7, 100])
def test_blocks_do_not_change_rankings_and_ties_go_to_the_lower_row(block_size: int):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, (25, 60)).astype(np.float32)  # full of ties
    seen = sp.csr_array((rng.random((25, 60)) < 0.1).astype(np.float32))
    held_out = sp.csr_array((rng.random((25, 60)) < 0.1).astype(np.float32))
    ranking = metrics.rank(score_of(scores), seen, held_out, block_size)
    for user, top in zip(ranking.users, ranking.top_items, strict=True):
        allowed = [item for item in range(60) if not seen[user, item]]
        assert top.tolist() == sorted(allowed, key=lambda item, user=user: (-scores[user, item], item))[:20]


def test_models_that_are_ranked_together_have_the_rankings_that_each_has_alone():
    rng = np.random.default_rng(4)
    one, other = rng.random((2, 25, 60))
    seen, held_out = (sp.csr_array((rng.random((25, 60)) < 0.1).astype(np.float32)) for _ in range(2))
    together = metrics.rank_several(lambda block: (one[block], other[block]), seen, held_out, block_size=7)
    for scores, found in zip((one, other), together, strict=True):
        alone = metrics.rank(score_of(scores), seen, held_out)
        assert (found.users == alone.users).all()
        assert (found.top_items == alone.top_items).all()
        assert found.mean() == alone.mean()


def test_top_k_equals_a_full_sort_on_random_scores_with_masked_items():
    rng = np.random.default_rng(2)
    scores = np.round(rng.normal(size=(50, 30)), 1)
    scores[rng.random(scores.shape) < 0.5] = -np.inf
    for row, top in zip(scores, top_k(scores, 20), strict=True):
        expected = [item for item in np.lexsort((np.arange(30), -row)) if np.isfinite(row[item])][:20]
        assert top.tolist() == expected + [NO_ITEM] * (20 - len(expected))


def test_an_empty_place_is_no_item_of_the_user_before():
    relevant = interactions([[3], [0]], 4)
    assert metrics.among(relevant, np.array([[3, NO_ITEM], [NO_ITEM, 0]])).tolist() == [[True, False], [False, True]]


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="NaN in 1 of 2 rows"):
        top_k(np.array([[0.0, 1.0], [np.nan, 0.0]]), 1)


def test_an_evaluation_without_held_out_items_is_refused():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        metrics.rank(score_of(np.zeros((1, 2))), interactions([[0]], 2), interactions([[]], 2))


def test_bootstrap_interval_covers_the_normal_approximation_and_is_paired():
    rng = np.random.default_rng(3)
    values = rng.normal(0.3, 0.1, 400)
    bootstrap = metrics.Bootstrap(400, 2000, seed=0)
    ((low, high),) = bootstrap.intervals(values[:, None])
    half = 1.96 * values.std() / 20
    # 2,000 resamples know a percentile to about 4 % of the interval's width
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    worse = dict.fromkeys(metrics.METRICS, values - 0.01)
    better = dict.fromkeys(metrics.METRICS, values)
    difference = metrics.paired_difference(better, worse, bootstrap)["ndcg@10"]
    assert difference["mean"] == pytest.approx(0.01)
    assert difference["ci95"] == pytest.approx([0.01, 0.01], abs=1e-6)  # the same users on both sides: no noise left


def test_bootstrap_is_a_function_of_its_seed():
    first, second, other = (np.array(list(metrics.Bootstrap(50, 20, seed).counts())) for seed in (0, 0, 1))
    assert (first == second).all()
    assert not (first == other).all()
    assert (first.sum(axis=1) == 50).all()


def test_resamples_are_not_all_held_in_memory():
    values = np.random.default_rng(0).random((20_000, 3))
    tracemalloc.start()
    together = metrics.Bootstrap(20_000, 100, seed=0).intervals(values)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * 20_000 * 100 / 5
    alone = [metrics.Bootstrap(20_000, 100, seed=0).intervals(column[:, None])[0] for column in values.T]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_effective_rank_is_the_dimension_for_equal_and_one_for_a_single_direction():
    assert collapse.effective_rank(np.array([2.0, 2.0, 2.0, 2.0])) == pytest.approx(4.0)
    assert collapse.effective_rank(np.array([5.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert collapse.effective_rank(np.zeros(3)) == 0.0
    # p = (3/4, 1/4): exp(3/4 ln 4/3 + 1/4 ln 4)
    assert collapse.effective_rank(np.array([3.0, 1.0])) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


def test_singular_values_are_those_of_the_centred_matrix():
    rows = np.array([[1.0, 7.0], [-1.0, 7.0]])  # centred: one axis with norm sqrt(2), the constant column vanishes
    assert collapse.singular_values(rows) == pytest.approx([math.sqrt(2), 0.0], abs=1e-12)
    report = collapse.collapse({"z": rows, "none": np.empty((2, 0))})
    assert report == {"z": {"dim": 2, "effective_rank": 1.0, "singular_values": [1.0, 0.0]}}


def test_singular_values_of_many_rows_are_as_precise_without_a_copy_of_them():
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((50_000, 16)) * 10.0 ** -np.arange(16) + 3.0).astype(np.float32)
    tracemalloc.start()
    found = collapse.singular_values(rows)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < rows.nbytes
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(found, np.linalg.svd(centred, compute_uv=False), rtol=1e-12, atol=1e-13 * found[0])


def test_exposure_figures_equal_hand_computed_values():
    top = np.array([[0, 1], [0, 2], [0, NO_ITEM]])
    popularity = np.array([10, 4, 2, 1, 1])
    assert bias.exposure(top, 5).tolist() == [3, 1, 1, 0, 0]
    assert bias.exposure_share(top, np.array([True, False, False, False, False])) == pytest.approx(3 / 5)
    assert bias.average_popularity(top, popularity) == pytest.approx((7 + 6 + 10) / 3)
    # counts 0 0 1 1 3: sum (2i - 6) x_i / (5 * 5) = (1*0 + 1*2 + 3*4) / 25
    assert bias.gini(np.array([3, 1, 1, 0, 0])) == pytest.approx(14 / 25)
    assert bias.gini(np.array([2, 2, 2])) == pytest.approx(0.0)
    assert head_items(popularity).tolist() == [True, False, False, False, False]
    assert bias.exposure_summary(top, popularity) == {
        "average_popularity": pytest.approx(23 / 3, abs=1e-4),
        "coverage": 0.6,
        "gini": pytest.approx(0.56),
        "head_share": 0.6,
        "tail_share": 0.4,
    }


def test_exposure_by_decile_sums_to_one_and_follows_the_order_of_the_values():
    values = np.arange(20)[::-1]
    assert bias.exposure_by_decile(np.array([[0, 1], [0, 19]]), values) == [0.25, *[0.0] * 8, 0.75]
    assert bias.exposure_by_decile(np.full((2, 2), NO_ITEM), values) == [0.0] * 10


def test_items_of_equal_value_are_in_the_same_deciles_whatever_their_rows():
    # four of ten items are equal, over the first four deciles: their 6 of 8 appearances are spread over them
    values = np.array([1, 1, 1, 1, 2, 3, 4, 5, 6, 7])
    top = np.array([[0, 1], [0, 2], [0, 3], [9, 5]])
    expected = [0.1875] * 4 + [0, 0.125, 0, 0, 0, 0.125]
    assert bias.exposure_by_decile(top, values) == expected
    order = np.array([3, 9, 0, 5, 2, 4, 1, 6, 8, 7])  # the same items in other rows
    assert bias.exposure_by_decile(np.argsort(order)[top], values[order]) == expected
    # a decile of fifteen items is one and a half of them
    assert bias.exposure_by_decile(np.array([[0], [14]]), np.array([0, 0, 0, *range(1, 13)]))[:3] == [0.25, 0.25, 0.0]


def test_rank_shift_counts_places_of_unseen_items():
    factual = score_of(np.array([[4.0, 3.0, 2.0, 1.0]]))
    debiased = score_of(np.array([[4.0, 1.0, 2.0, 3.0]]))
    # item 0 is masked; the others are 1 2 3 and then 3 2 1: shifts 2 0 2
    shift = bias.rank_shift(factual, debiased, interactions([[0]], 4), np.array([0]))
    assert shift == {"all": pytest.approx(4 / 3, abs=1e-4), "top10": pytest.approx(4 / 3, abs=1e-4)}


def test_genericness_is_the_mean_cosine_and_a_constant_gate_has_no_correlation():
    text = np.array([[1.0, 0.0], [0.0, 1.0], [math.sqrt(0.5), math.sqrt(0.5)]])
    side = (1 + 0 + math.sqrt(0.5)) / 3
    assert bias.genericness(text) == pytest.approx([side, side, (1 + 2 * math.sqrt(0.5)) / 3])
    assert bias.correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])) == pytest.approx(1.0)
    assert bias.correlation(np.full(3, 0.5), np.array([2.0, 4.0, 6.0])) is None


def test_items_without_text_are_not_generic_and_do_not_count():
    rng = np.random.default_rng(0)
    text = rng.normal(size=(50, 4)) + 1
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    text[:10] = 0
    propensity = np.where(text.any(axis=1), rng.random(50) + 1, 0)
    popularity, top = rng.integers(1, 9, size=50), np.arange(10)[None]
    found, told = (
        bias.propensity_report(propensity[rows], popularity[rows], text[rows], top, top) for rows in (slice(50), slice(10, 50))
    )
    assert found["correlation_genericness"] == told["correlation_genericness"] < 0.5
    assert found["mean"] < told["mean"], "the propensity itself is every item's"
    assert found["correlation_log_popularity"] == bias.correlation(propensity, np.log(1 + popularity))

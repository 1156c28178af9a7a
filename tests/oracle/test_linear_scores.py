"""The served form of a score against dense NumPy: sums, standardisation, mixtures, truncation, and the file."""

import tracemalloc
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp

from components.cllmr.linear.ease import Ease, EaseSettings, centred_unit_rows
from components.cllmr.linear.ensemble import Ensemble
from components.cllmr.linear.folding import Folding
from components.cllmr.linear.kernel import KernelScores
from components.cllmr.linear.scores import (
    LinearScores,
    Standard,
    as_tensors,
    from_tensors,
    joined,
    mixed,
    mixtures,
    standardised,
    strongest,
)

NUM_USERS, NUM_ITEMS = 11, 17
EVERYBODY = np.arange(NUM_USERS)


def histories(seed: int = 0) -> sp.csr_array:
    return sp.csr_array((np.random.default_rng(seed).random((NUM_USERS, NUM_ITEMS)) < 0.3).astype(np.float32))


def model(seed: int) -> tuple[LinearScores, npt.NDArray[np.float64]]:
    """A model of both kinds, and its scores as a dense table."""
    rng = np.random.default_rng(seed)
    users, items = rng.normal(size=(NUM_USERS, 3)), rng.normal(size=(NUM_ITEMS, 3))
    weights = np.where(rng.random((NUM_ITEMS, NUM_ITEMS)) < 0.4, rng.normal(size=(NUM_ITEMS, NUM_ITEMS)), 0.0)
    history = histories(seed)
    found = LinearScores(users.astype(np.float32), items.astype(np.float32), history, sp.csr_array(weights.astype(np.float32)))
    return found, users @ items.T + history.toarray() @ weights


def test_scores_are_the_inner_product_plus_the_weights_of_the_history() -> None:
    found, table = model(0)
    np.testing.assert_allclose(found.score(np.array([4, 1])), table[[4, 1]], atol=1e-5)
    np.testing.assert_allclose(found.pairs(3, np.array([16, 0, 5])), table[3, [16, 0, 5]], atol=1e-6)
    assert found.score(EVERYBODY).dtype == np.float32


def test_either_kind_stands_alone() -> None:
    found, _ = model(1)
    factors, weights = LinearScores.of_factors(found.users, found.items), LinearScores.of_weights(found.history, found.weights)
    np.testing.assert_allclose(factors.score(EVERYBODY) + weights.score(EVERYBODY), found.score(EVERYBODY), atol=1e-5)
    items = np.arange(NUM_ITEMS)
    np.testing.assert_allclose(factors.pairs(2, items) + weights.pairs(2, items), found.pairs(2, items), atol=1e-6)


def test_pairs_of_a_user_read_the_weights_of_his_own_items_alone() -> None:
    num_items = 1_000
    history = sp.csr_array((np.ones(2, np.float32), ([0, 0], [7, 30])), shape=(1, num_items))
    found = LinearScores.of_weights(history, sp.csr_array(np.ones((num_items, num_items), dtype=np.float32)))
    tracemalloc.start()
    scores = found.pairs(0, np.arange(num_items))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(scores, 2.0)
    assert most < found.weights.data.nbytes / 10


def test_joined_models_are_the_weighted_sum_of_their_standardised_scores() -> None:
    members, weights = [model(seed)[0] for seed in range(3)], (0.8, 0.0, -0.3)
    found = joined(members, weights, [Standard.of(one, block_size=4) for one in members])
    np.testing.assert_allclose(found.score(EVERYBODY), Ensemble(members, weights).score(EVERYBODY), atol=1e-5)


@pytest.mark.parametrize("dim", [1, 5])
def test_factors_are_standardised_by_the_moments_of_the_items_without_a_score(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(NUM_USERS, dim)), rng.normal(size=(NUM_ITEMS, dim)) + 2.0
    users[3] = 0.0
    factors = LinearScores.of_factors(users, items)
    table = factors.users.astype(np.float64) @ np.asarray(factors.items, dtype=np.float64).T
    monkeypatch.delattr(LinearScores, "score")
    found = Standard.of(factors, block_size=4)
    np.testing.assert_allclose(found.mean, table.mean(axis=1), rtol=5e-7, atol=1e-12)
    np.testing.assert_allclose(found.deviation, table.std(axis=1), rtol=5e-7)
    assert (found.mean[3], found.deviation[3]) == (0.0, 0.0)


def test_a_user_whose_scores_of_a_member_do_not_vary_gets_nothing_from_it() -> None:
    flat = LinearScores.of_factors(np.array([[0.0], [1.0]]), np.arange(NUM_ITEMS)[:, None])
    found = joined([flat], (2.0,), [Standard.of(flat)]).score(np.arange(2))
    np.testing.assert_array_equal(found[0], 0.0)
    assert found[1].std() == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shared", [(), ("users",), ("history",), ("users", "history")])
def test_a_mixture_is_between_the_two_models_whatever_they_share(strength: float, shared: tuple[str, ...]) -> None:
    factual, counterfactual = model(5)[0], model(6)[0]
    counterfactual = replace(counterfactual, **{part: getattr(factual, part) for part in shared})
    expected = (1 - strength) * factual.score(EVERYBODY) + strength * counterfactual.score(EVERYBODY)
    found = mixed(factual, counterfactual, strength)
    np.testing.assert_allclose(found.score(EVERYBODY), expected, atol=1e-5)
    (together,) = mixtures(factual, counterfactual, (strength,), EVERYBODY)
    np.testing.assert_allclose(together, expected, atol=1e-5)
    alone = strength in (0.0, 1.0)
    assert found.items.shape[1] == (3 if alone or "users" in shared else 6), "what is shared is not doubled"
    assert found.history.shape[1] == (NUM_ITEMS if alone or "history" in shared else 2 * NUM_ITEMS)


def test_the_strongest_weights_of_every_target_are_kept() -> None:
    weights = np.random.default_rng(3).normal(size=(NUM_ITEMS, NUM_ITEMS))
    kept = strongest(weights, 4).toarray()
    for target in range(NUM_ITEMS):
        best = np.argsort(-np.abs(weights[:, target]))[:4]
        assert set(np.flatnonzero(kept[:, target])) == set(best)
        np.testing.assert_allclose(kept[best, target], weights[best, target], rtol=1e-6)
    np.testing.assert_allclose(strongest(weights, NUM_ITEMS).toarray(), weights, rtol=1e-6)


def test_ease_and_the_text_kernel_are_served_as_they_were_fitted() -> None:
    train, text = histories(7), centred_unit_rows(np.random.default_rng(7).normal(size=(NUM_ITEMS, 6)))
    ease = Ease(train, text).fit(EaseSettings(5.0, 2.0, user_power=0.1, item_power=0.3, popularity_power=0.2))
    kernel = KernelScores(train, text, 3.0)
    for fitted in (ease, kernel):
        np.testing.assert_allclose(fitted.linear(NUM_ITEMS).score(EVERYBODY), fitted.score(EVERYBODY), atol=1e-5)
        few = fitted.linear(3).weights.toarray()
        assert ((few != 0).sum(axis=0) <= 3).all()
    np.testing.assert_array_equal(kernel.linear(3, block_size=5).weights.toarray(), kernel.linear(3).weights.toarray())


def folding(seed: int = 8) -> Folding:
    rng = np.random.default_rng(seed)
    return Folding(rng.normal(size=(3, 3)).astype(np.float32), 0.7)


def test_a_history_without_a_user_is_scored_by_its_weights_and_by_what_is_told_of_the_user() -> None:
    found, _ = model(5)
    told = folding()
    whole = replace(found, folding=told)
    items = np.array([2, 5, 11])
    user = found.items[items].mean(axis=0) @ told.matrix
    by_weights = standardised(found.weights.toarray()[items].sum(axis=0)[None])[0]
    by_user = standardised((found.items @ user)[None])[0]
    np.testing.assert_allclose(whole.folded([0.4], items), 0.4 * by_weights + 0.7 * by_user, atol=1e-5)
    np.testing.assert_array_equal(whole.folded([0.4], items[:0]), 0.0)


def test_what_more_of_a_history_adds_is_what_it_changes_of_the_user_that_is_told() -> None:
    found, _ = model(5)
    told = folding()
    whole = replace(found, folding=told)
    seen, new = np.array([1, 2, 9]), np.array([4])
    moved = (found.items[[1, 2, 9, 4]].mean(axis=0) - found.items[seen].mean(axis=0)) @ told.matrix
    by_weights = found.added(0, new, seen)
    assert np.abs(by_weights).max() > 0
    np.testing.assert_allclose(whole.added(0, new, seen), by_weights + found.items @ moved, atol=1e-5)


def test_what_more_of_a_history_adds_has_the_scale_of_every_member() -> None:
    first, second = (LinearScores.of_weights(histories(5), model(seed)[0].weights) for seed in (5, 6))
    found = joined([first, second], (0.8, 0.3), [Standard.of(first), Standard.of(second)])
    user = int(np.flatnonzero(first.history[:, [0]].toarray()[:, 0])[0])  # whose items are the first of each block among others
    seen = first.history[[user]].indices
    new = np.setdiff1d(np.arange(NUM_ITEMS), seen)[:2]
    longer = found.history.tolil()
    for start in (0, NUM_ITEMS):
        longer[user, start + new] = found.history[user, start]
    after = replace(found, history=sp.csr_array(longer))
    expected = after.score(np.array([user]))[0] - found.score(np.array([user]))[0]
    np.testing.assert_allclose(found.added(user, new, seen), expected, atol=1e-5)


def test_a_model_is_the_same_after_a_file() -> None:
    found, _ = model(8)
    folds = np.random.default_rng(8).normal(size=(NUM_ITEMS, 3)).astype(np.float32)
    for written in (found, replace(found, folds=folds), replace(found, folding=folding())):
        again = from_tensors(as_tensors(written, "factual"), "factual")
        np.testing.assert_array_equal(again.score(EVERYBODY), written.score(EVERYBODY))
        np.testing.assert_array_equal(again.added(0, EVERYBODY, EVERYBODY[:2]), written.added(0, EVERYBODY, EVERYBODY[:2]))
        np.testing.assert_array_equal(again.folded([0.5], EVERYBODY), written.folded([0.5], EVERYBODY))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("users", np.ones((NUM_USERS, 2), np.float32), r"m\.users and m\.items have shapes \(11, 2\) and \(17, 3\)"),
        ("users", np.ones(NUM_USERS, np.float32), r"m\.users has shape \(11,\) and type float32, expected 2 axes"),
        ("items", np.full((NUM_ITEMS, 3), np.nan, np.float32), r"m\.items has 51 values that are not finite"),
        ("history.indptr", np.zeros(3, np.int64), r"m\.history is no sparse matrix of shape \(11, 17\)"),
        # of a user beyond the end and back: rows outside of what there is would be read
        ("history.indptr", np.array([0, 999, *[histories(9).nnz] * 10]), r"m\.history is no sparse matrix of shape \(11, 17\)"),
        ("folds", np.ones((NUM_ITEMS, 2), np.float32), r"m\.folds has shape \(17, 2\), not \(17, 3\)"),
        ("folding.matrix", np.ones((3, 2), np.float32), r"m\.folding has shapes \(\(3, 2\), \(1,\)\), not \(\(3, 3\), \(1,"),
        ("folding.deviation", np.full(1, np.inf, np.float32), r"m\.folding\.deviation has 1 values that are not finite"),
        ("weights.indices", np.full(1, 99, np.int32), r"m\.weights is no sparse matrix of shape \(17, 17\)"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(name: str, value: npt.NDArray[np.generic], said: str) -> None:
    tensors = {**as_tensors(replace(model(9)[0], folding=folding()), "m"), f"m.{name}": value}
    with pytest.raises(ValueError, match=said):
        from_tensors(tensors, "m")


def test_ease_on_a_log_with_weights_is_the_regression_of_the_weighted_matrix() -> None:
    rng = np.random.default_rng(4)
    log = histories(4)
    log.data = rng.uniform(0.2, 1.0, len(log.data)).astype(np.float32)
    dense, l2 = log.toarray().astype(np.float64), 3.0
    inverse = np.linalg.inv(dense.T @ dense + l2 * np.eye(NUM_ITEMS))
    expected = -inverse / np.diag(inverse)
    np.fill_diagonal(expected, 0.0)
    np.testing.assert_allclose(Ease(log).fit(EaseSettings(l2)).weights, expected, atol=1e-5)
    whole = EaseSettings(l2, user_power=0.2, item_power=0.3, popularity_power=0.1)
    halved = sp.csr_array(log * np.float32(0.5))
    assert not np.allclose(Ease(log).fit(whole).weights, Ease(halved).fit(whole).weights), "weights count in the degrees"

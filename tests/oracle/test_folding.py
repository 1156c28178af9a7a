"""The map from histories to users against one that is known, and against a ridge regression written out."""

import numpy as np
import pytest
import scipy.sparse as sp

from components.cllmr.linear import folding
from components.cllmr.linear.folding import fit_folding

NUM_USERS, NUM_ITEMS, COLUMNS = 90, 40, (slice(0, 3), slice(4, 6))


def planted() -> tuple[np.ndarray, np.ndarray, sp.csr_array, np.ndarray]:
    """Items, histories (two of them empty), the weighted means of these, and a user's side of six columns for each."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(NUM_ITEMS, 6))
    log = (rng.random((NUM_USERS, NUM_ITEMS)) < rng.uniform(0.05, 0.6, NUM_ITEMS)).astype(np.float32)
    log[:2] = 0
    weights = np.maximum(log.sum(axis=0), 1) ** -0.25
    means = (log * weights) @ items / np.maximum(log.sum(axis=1), 1)[:, None]
    return items.astype(np.float32), sp.csr_array(log), means, weights


def test_a_user_who_is_a_linear_map_of_the_history_is_told_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "BLOCK_SIZE", 32)
    items, log, means, weights = planted()
    rng = np.random.default_rng(1)
    users = rng.normal(size=(NUM_USERS, 6))
    known = np.zeros((6, 6))
    for columns in COLUMNS:
        width = columns.stop - columns.start
        known[columns, columns] = rng.normal(size=(width, width))
        users[:, columns] = means[:, columns] @ known[columns, columns]
    users[:2] = 99.0  # of who has no history
    found = fit_folding(users.astype(np.float32), items, log, COLUMNS, 1e-9)
    np.testing.assert_allclose(found.matrix, known, atol=1e-3)
    np.testing.assert_allclose(found.item_weights, weights, rtol=1e-6)
    scores = np.hstack([users[2:, columns] for columns in COLUMNS]) @ np.hstack([items[:, columns] for columns in COLUMNS]).T
    assert found.deviation == pytest.approx(scores.std(axis=1).mean(), rel=1e-4)


def test_it_is_a_ridge_regression_whatever_the_scale_of_the_items() -> None:
    items, log, means, _ = planted()
    users = np.random.default_rng(2).normal(size=(NUM_USERS, 6)).astype(np.float32)
    found = fit_folding(users, items, log, COLUMNS, 0.5).matrix
    for columns in COLUMNS:
        x, y = means[2:, columns], users[2:, columns]
        gram = x.T @ x
        expected = np.linalg.solve(gram + 0.5 * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y)
        np.testing.assert_allclose(found[columns, columns], expected, rtol=1e-3, atol=1e-5)
    larger = fit_folding(users, 8 * items, log, COLUMNS, 0.5).matrix
    np.testing.assert_allclose(8 * larger, found, rtol=1e-4, atol=1e-6)


def test_without_histories_nothing_is_told() -> None:
    items, log, _, _ = planted()
    found = fit_folding(np.ones((NUM_USERS, 6), np.float32), items, sp.csr_array(log.shape, dtype=np.float32), COLUMNS, 0.1)
    assert not found.matrix.any()
    assert found.deviation == 0.0

"""The map from histories to users against one that is known, and against a ridge regression written out."""

import numpy as np
import pytest
import scipy.sparse as sp

from components.cllmr.linear import folding
from components.cllmr.linear.folding import Folding, MemberColumns, fit_folding

NUM_USERS, NUM_ITEMS, COLUMNS = 90, 40, (slice(0, 3), slice(4, 6))


def planted() -> tuple[np.ndarray, sp.csr_array, np.ndarray]:
    """Items, histories (two of them empty), and the means of these."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(NUM_ITEMS, 6))
    log = (rng.random((NUM_USERS, NUM_ITEMS)) < rng.uniform(0.05, 0.6, NUM_ITEMS)).astype(np.float32)
    log[:2] = 0
    means = log @ items / np.maximum(log.sum(axis=1), 1)[:, None]
    return items.astype(np.float32), sp.csr_array(log), means


def fit(users: np.ndarray, items: np.ndarray, log: sp.csr_array, *l2: float) -> Folding:
    members = [MemberColumns(*one) for one in zip(COLUMNS, l2, strict=True)]
    return fit_folding(users.astype(np.float32), items.astype(np.float32), log, members)


def test_a_user_who_is_a_linear_map_of_the_history_is_told_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "BLOCK_SIZE", 32)
    items, log, means = planted()
    rng = np.random.default_rng(1)
    users = rng.normal(size=(NUM_USERS, 6))
    known = np.zeros((6, 6))
    for columns in COLUMNS:
        width = columns.stop - columns.start
        known[columns, columns] = rng.normal(size=(width, width))
        users[:, columns] = means[:, columns] @ known[columns, columns]
    users[:2] = 99.0  # of who has no history
    found = fit(users, items, log, 1e-9, 1e-9)
    np.testing.assert_allclose(found.matrix, known, atol=1e-3)
    scores = np.hstack([users[2:, columns] for columns in COLUMNS]) @ np.hstack([items[:, columns] for columns in COLUMNS]).T
    assert found.deviation == pytest.approx(scores.std(axis=1).mean(), rel=1e-4)


def test_it_is_a_ridge_regression_whatever_the_scale_of_the_items() -> None:
    items, log, means = planted()
    users = np.random.default_rng(2).normal(size=(NUM_USERS, 6))
    found = fit(users, items, log, 0.5, 2.0).matrix
    for columns, l2 in zip(COLUMNS, (0.5, 2.0), strict=True):
        x, y = means[2:, columns], users[2:, columns]
        gram = x.T @ x
        expected = np.linalg.solve(gram + l2 * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y)
        np.testing.assert_allclose(found[columns, columns], expected, rtol=1e-3, atol=1e-5)
    larger = fit(users, 8 * items, log, 0.5, 2.0).matrix
    np.testing.assert_allclose(8 * larger, found, rtol=1e-4, atol=1e-6)


def test_without_histories_nothing_is_told() -> None:
    items, log, _ = planted()
    found = fit(np.ones((NUM_USERS, 6)), items, sp.csr_array(log.shape, dtype=np.float32), 0.1, 0.1)
    assert not found.matrix.any()
    assert found.deviation == 0.0
    np.testing.assert_array_equal(found.user(items[:0]), np.zeros(6))

"""The spectrum against a dense decomposition by numpy, and against worlds whose spectrum is known."""

import numpy as np
import pytest
from scipy import sparse

from components.spectrum.decompose import component_signs, decompose, inverse, normalise, spectrum
from tests.planted import block_world


def _random_matrix(users: int = 40, items: int = 30, density: float = 0.2, seed: int = 3) -> sparse.csr_array:
    dense = np.random.default_rng(seed).random((users, items)) < density
    dense[0], dense[:, 0] = True, True  # nobody without interactions
    return sparse.csr_array(dense.astype(np.float32))


def test_symmetric_normalisation_of_a_small_matrix_is_the_one_computed_by_hand() -> None:
    # user degrees 2, 1; item degrees 1, 2
    found = normalise(sparse.csr_array(np.array([[1, 1], [0, 1]], dtype=np.float32)), "sym").toarray()
    np.testing.assert_allclose(found, [[1 / np.sqrt(2), 1 / 2], [0, 1 / np.sqrt(2)]])


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
@pytest.mark.parametrize("normalisation", ["sym", "raw"])
def test_truncated_decomposition_equals_numpys_dense_one(shape: tuple[int, int], normalisation: str) -> None:
    matrix = normalise(_random_matrix(*shape), normalisation)  # type: ignore[arg-type]  # a str by parametrize
    left, values, right = np.linalg.svd(matrix.toarray(), full_matrices=False)
    for rank in (1, 7, 20):
        u, sigma, v = decompose(matrix, rank)
        np.testing.assert_allclose(sigma, values[:rank], atol=1e-10)
        truth = left[:, :rank] * values[:rank] @ right[:rank]
        np.testing.assert_allclose(u * sigma @ v.T, truth, atol=1e-9)
        signs = np.sign(right[np.arange(rank), np.abs(right[:rank]).argmax(axis=1)])
        np.testing.assert_allclose(v, (right[:rank] * signs[:, None]).T, atol=1e-7)


@pytest.mark.parametrize("rank", [28, 29, 30])
def test_full_and_nearly_full_rank_rebuild_the_matrix(rank: int) -> None:
    matrix = normalise(_random_matrix(), "sym")
    u, sigma, v = decompose(matrix, rank)
    assert sigma.shape == (rank,)
    left = np.linalg.norm(matrix.toarray() - u * sigma @ v.T)
    dropped = np.linalg.svd(matrix.toarray(), compute_uv=False)[rank:]
    assert left == pytest.approx(np.linalg.norm(dropped), abs=1e-9)


def test_the_largest_entry_of_every_component_is_positive() -> None:
    _, _, v = decompose(normalise(_random_matrix(), "sym"), 12)
    assert (v[np.abs(v).argmax(axis=0), np.arange(12)] > 0).all()


def test_among_equally_large_entries_the_first_decides_the_sign() -> None:
    # rounding makes the second entry the larger one by a hair; it must not matter
    vectors = np.array([[-0.7, 0.1], [0.7 * (1 + 1e-12), -0.9], [0.1, 0.2]])
    np.testing.assert_array_equal(component_signs(vectors), [-1, -1])


@pytest.mark.parametrize("normalisation", ["sym", "raw"])
def test_mean_row_norm_over_users_and_items_together_is_one(normalisation: str) -> None:
    found = spectrum(_random_matrix(), 8, normalisation)  # type: ignore[arg-type]  # a str by parametrize
    norms = np.linalg.norm(np.concatenate([found.users, found.items]), axis=1)
    assert norms.mean() == pytest.approx(1.0, abs=1e-12)
    assert np.linalg.norm(found.users, axis=1).mean() != pytest.approx(1.0, abs=1e-3)  # jointly, not each for itself


def test_users_and_items_of_the_spectrum_keep_the_singular_values_as_column_norms() -> None:
    found = spectrum(_random_matrix(), 8)
    for side in (found.users, found.items):  # U and V have unit columns
        np.testing.assert_allclose(np.linalg.norm(side, axis=0) * found.scale, found.singular_values, rtol=1e-9)


def test_separate_complete_blocks_have_one_unit_singular_value_each_and_no_other() -> None:
    # sym turns a complete a x b block into 1/sqrt(a b) everywhere: rank one, sigma 1
    dense = np.zeros((9, 12), dtype=np.float32)
    for block in range(3):
        dense[block * 3 : block * 3 + 3, block * 4 : block * 4 + 4] = 1
    found = spectrum(sparse.csr_array(dense), 6)
    np.testing.assert_allclose(found.singular_values, [1, 1, 1, 0, 0, 0], atol=1e-7)
    assert found.energy_share(1) == pytest.approx(1 / 3)
    assert found.energy_share(3) == pytest.approx(1.0)
    assert found.total_energy == pytest.approx(3.0)


@pytest.mark.parametrize("is_wide", [False, True])
def test_equal_blocks_and_pairs_of_their_own_give_the_same_bytes_twice(is_wide: bool) -> None:
    # singular values that many components share, and fewer that are not 0 than asked for: Lanczos has to start anew
    dense = np.zeros((90, 80), dtype=np.float32)
    dense[:60, :50] = np.kron(np.eye(10), np.ones((6, 5)))
    dense[60:80, 50:70] = np.eye(20)
    matrix = normalise(sparse.csr_array(dense.T if is_wide else dense), "sym")
    first, second = decompose(matrix, 40), decompose(matrix, 40)
    assert [array.tobytes() for array in first] == [array.tobytes() for array in second]
    u, sigma, v = first
    np.testing.assert_allclose(sigma, [1] * 30 + [0] * 10, atol=1e-7)
    np.testing.assert_allclose(u * sigma @ v.T, matrix.toarray(), atol=1e-7)


def test_in_a_block_world_users_lie_nearest_to_the_items_of_their_block() -> None:
    world = block_world()
    found = spectrum(sparse.csr_array(world.matrix(world.train)), 6)
    nearest = np.argmax(found.users @ found.items.T, axis=1)
    assert (world.item_block[nearest] == world.user_block).all()


def test_a_component_without_energy_has_no_inverse_but_zero() -> None:
    np.testing.assert_array_equal(inverse(np.array([2.0, 0.5, 1e-9])), [0.5, 2.0, 0.0])
    np.testing.assert_array_equal(inverse(np.zeros(2)), 0.0)

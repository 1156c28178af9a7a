"""The spectrum of the interactions: where the training matrix places each user and item (CLLMR, E1-E3).

Everything is computed in float64; the stage rounds to float32 when it writes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import linalg, sparse
from scipy.sparse.linalg import LinearOperator, eigsh

from components.errors import ConfigError, DataError
from components.spectrum.config import Normalisation

Floats = npt.NDArray[np.float64]

_TIE = 1e-6  # entries this close (relative) count as equally large: rounding must not decide a sign


@dataclass(frozen=True)
class Spectrum:
    """Rows of users and items in the coordinates of the leading singular vectors."""

    users: Floats
    """U sigma / scale, (num_users, q); a user without interactions is 0."""
    items: Floats
    """V sigma / scale, (num_items, q); an item without interactions is 0."""
    singular_values: Floats
    """(q,), largest first, of the normalised matrix (not scaled)."""
    scale: float
    """Mean Euclidean norm of the rows of U sigma and V sigma together, what E3 divides by."""
    total_energy: float
    """Squared Frobenius norm of the normalised matrix: the sum of all its squared singular values."""

    @property
    def rank(self) -> int:
        """q."""
        return len(self.singular_values)

    def energy_share(self, rank: int) -> float:
        """Share of the squared Frobenius norm in the first `rank` components, 0 to 1."""
        return min(1.0, float((self.singular_values[:rank] ** 2).sum() / self.total_energy))


def spectrum(interactions: sparse.csr_array, rank: int, normalisation: Normalisation = "sym") -> Spectrum:
    """The spectrum of a 0/1 matrix of training interactions, (num_users, num_items) (CLLMR, E1-E3).

    Raises:
        ConfigError: `rank` is larger than the smaller side of the matrix.
        DataError: there is no interaction.
    """
    check_rank(rank, *interactions.shape)
    if not interactions.nnz:
        raise DataError(
            "there are no training interactions to decompose.", "Give more interactions, or lower ingest's filters."
        )
    matrix = normalise(interactions, normalisation)
    left, values, right = decompose(matrix, rank)
    users, items = left * values, right * values
    scale = float(np.linalg.norm(np.concatenate([users, items]), axis=1).mean())
    return Spectrum(users / scale, items / scale, values, scale, float((matrix.data**2).sum()))


def check_rank(rank: int, num_users: int, num_items: int) -> None:
    """Raises ConfigError for a rank that is larger than the smaller side of the matrix."""
    if rank > (largest := min(num_users, num_items)):
        raise ConfigError(
            f"setting 'spectrum.rank' = {rank}: at most {largest} with {num_users} users and {num_items} items.",
            f"Choose a smaller rank: --set spectrum.rank={largest}",
        )


def normalise(interactions: sparse.csr_array, normalisation: Normalisation) -> sparse.csr_array:
    """D_u^-1/2 R D_i^-1/2 (E1), or R itself; float64, rows and columns without interactions stay 0."""
    matrix = interactions.astype(np.float64)
    if normalisation == "raw":
        return matrix
    by_user = sparse.diags_array(_inverse_root(matrix.sum(axis=1)))
    by_item = sparse.diags_array(_inverse_root(matrix.sum(axis=0)))
    return sparse.csr_array(by_user @ matrix @ by_item)


def decompose(matrix: sparse.csr_array, rank: int) -> tuple[Floats, Floats, Floats]:
    """The `rank` leading singular triplets of a matrix (m, n), largest value first, signs fixed.

    Args:
        matrix: float64.
        rank: 1 to min(m, n). From min(m, n) - 1 on, where Lanczos iterations no longer pay or work, a dense solver is used.

    Returns:
        U (m, rank), sigma (rank,), V (n, rank).
    """
    smaller = min(matrix.shape)
    if rank >= smaller - 1:
        left, values, right = np.linalg.svd(matrix.toarray(), full_matrices=False)
    else:
        left, values, right = _lanczos(matrix, rank)
    order = np.argsort(-values, kind="stable")[:rank]
    left, values, right = left[:, order], values[order], right[order].T
    signs = component_signs(right)
    return left * signs, values, right * signs


def _lanczos(matrix: sparse.csr_array, rank: int) -> tuple[Floats, Floats, Floats]:
    """U (m, rank), sigma (rank,) and V^T (rank, n), smallest value first.

    scipy's `svds` step by step, so that the last bits are its own, but for the vectors that ARPACK starts again with where
    singular values are equal or 0: `svds` has them drawn from the system's entropy.
    """
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix
    smaller = tall.shape[1]
    gram = LinearOperator((smaller, smaller), matvec=lambda vector: tall.T @ (tall @ vector), dtype=matrix.dtype)
    # random starts meet every component; fixed ones make two runs the same to the last bit
    rng = np.random.default_rng(0)
    _, basis = eigsh(gram, k=rank, v0=rng.standard_normal(smaller), rng=rng)
    basis, _ = np.linalg.qr(basis)  # not quite orthonormal where eigenvalues lie close together
    left, values, right = linalg.svd(tall @ basis, full_matrices=False)
    left, values, right = left[:, ::-1], values[::-1], right[::-1]
    if is_wide:
        return basis @ right.T, values, left.T
    return left, values, right @ basis.T


def component_signs(vectors: Floats) -> Floats:
    """+1 or -1 for each column of (n, q), so that times it the entry of largest magnitude is positive.

    Among equally large entries the first decides: solvers differ in the last bits, and would differ in the sign.
    """
    magnitudes = np.abs(vectors)
    leading = np.argmax(magnitudes >= magnitudes.max(axis=0) * (1 - _TIE), axis=0)
    signs: Floats = np.where(vectors[leading, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    return signs


def energy_report(found: Spectrum, normalisation: Normalisation) -> dict[str, object]:
    """What energy.json says: singular values and how much of the matrix the first 1, 2, 4, ... components hold."""
    return {
        "normalisation": normalisation,
        "rank": found.rank,
        "scale": round(found.scale, 9),
        "squared_frobenius_norm": round(found.total_energy, 6),
        "singular_values": [round(float(value), 9) for value in found.singular_values],
        "energy_share": [{"rank": rank, "share": round(found.energy_share(rank), 9)} for rank in _ranks(found.rank)],
    }


def _ranks(largest: int) -> Iterable[int]:
    """1, 2, 4, 8, ... and the largest."""
    return sorted({1 << power for power in range(largest.bit_length())} | {largest})


def inverse(singular_values: npt.NDArray[np.floating]) -> Floats:
    """1 / value; 0 for a component without energy, which places nobody and has no direction: (q,)."""
    values = singular_values.astype(np.float64)
    found: Floats = np.divide(1.0, values, out=np.zeros_like(values), where=values > values.max(initial=0.0) * 1e-7)
    return found


def _inverse_root(degrees: npt.ArrayLike) -> Floats:
    """degree^-1/2, 0 where the degree is 0."""
    root = np.sqrt(np.asarray(degrees, dtype=np.float64))
    inverse: Floats = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    return inverse

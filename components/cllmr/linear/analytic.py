"""The SSE without training: the linear-Gaussian identifiable VAE, whose posterior is known in closed form.

The same three distributions as `components.cllmr.encoders.sse` (E5-E7), linear and with one precision per node. For node v
with spectrum row p_v (E2, E3), text s_v and n_v interactions:

    prior        z_v ~ N(p_v, c_v D),  c_v = 1 / (1 + n_v / k)      D = diag of the spectrum's mean square on each axis
    likelihood   s_v | z_v ~ N(W z_v + b, Ψ),  Ψ = F Fᵀ + diag(ψ)

so that, by conditioning (Bishop 2006, eq. 2.116), the side representation is

    z_v = p_v + (Wᵀ Ψ⁻¹ W + (c_v D)⁻¹)⁻¹ Wᵀ Ψ⁻¹ (s_v - b - W p_v)

The more interactions, the more z is the spectrum. Without any, p_v = 0 and c_v = 1: the population's prior, and z comes from
the text alone, in the coordinates of the spectrum. That is what places cold items.

Why the noise has shared factors F: most of what a text says has no bearing on who chooses the item, and is correlated over the
dimensions of its embedding. With a diagonal Ψ every dimension counts as a new witness and the text is trusted too much. The
likelihood of real text clearly prefers them; a better ranking of cold items does not follow, so choose `num_shared` by
validation when ranking is the aim.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.floating] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class AnalyticSSE:
    """A fitted model; nodes that it was not fitted to can be encoded as well. All computation is in float64."""

    weight: Floats
    """W, (text_dim, rank)."""
    bias: Floats
    """b, (text_dim,)."""
    shared: Floats
    """F, (text_dim, num_shared)."""
    specific: Floats
    """ψ, (text_dim,), positive."""
    population_variance: Floats
    """Diagonal of D, (rank,)."""
    half_degree: float
    """k: a node with so many interactions has half the population's prior variance."""

    @classmethod
    def fit(
        cls,
        text: Numbers,
        spectrum: Numbers,
        degrees: Numbers,
        *,
        half_degree: float = 5.0,
        ridge: float = 0.01,
        num_shared: int = 32,
        iterations: int = 20,
    ) -> Self:
        """W and b by ridge regression of text on spectrum, then Ψ by maximum likelihood (EM); nodes without text teach nothing.

        Args:
            text: a zero row where there is no text, (num_nodes, text_dim).
            spectrum: (num_nodes, rank).
            degrees: number of interactions of each node, (num_nodes,). At least one must have both text and interactions.
            half_degree: k, positive.
            ridge: penalty on W, relative to the spectrum's mean square; nodes weigh n / (n + k).
            num_shared: columns of F; 0 is diagonal noise.
            iterations: of EM; each of them raises the likelihood.
        """
        told = np.any(text != 0, axis=1)
        s, p, c = text[told].astype(np.float64), _prior_mean(spectrum, degrees)[told], _prior_scale(degrees, half_degree)[told]
        share = (1 - c) / (1 - c).sum()  # a row of the spectrum is worth what its interactions are
        second_moment = share @ p**2
        mean_s, mean_p = share @ s, share @ p
        centred = p - mean_p
        penalty = ridge * second_moment.mean() * np.eye(p.shape[1])
        weight = np.linalg.solve((centred.T * share) @ centred + penalty, (centred.T * share) @ (s - mean_s)).T
        bias = mean_s - weight @ mean_p

        residual = s - bias - p @ weight.T
        covariance = residual.T @ residual / len(residual)
        floor = float(1e-6 * np.trace(covariance) / len(covariance) + np.finfo(np.float64).tiny)
        model = cls(weight, bias, *_leading_factors(covariance, num_shared, floor), second_moment, half_degree)
        for _ in range(iterations):
            # E: what of the residual is noise, its second moment given the text; M: one EM step of factor analysis on that
            axes, gain = model._gain(c)
            scores = model._evidence(residual) @ axes
            deviation = gain * scores @ axes.T  # posterior mean of z - p, (num_nodes, rank)
            moment = deviation.T @ deviation / len(deviation) + (axes * gain.mean(axis=0)) @ axes.T
            cross = residual.T @ deviation / len(residual) @ weight.T
            noise = covariance - cross - cross.T + weight @ moment @ weight.T
            model = cls(weight, bias, *model._factor_step(noise, floor), second_moment, half_degree)
        return model

    def encode(self, text: Numbers, spectrum: Numbers, degrees: Numbers) -> Floats:
        """Posterior mean of z, (num_nodes, rank); the spectrum where there is no text, or an infinity of interactions.

        Args:
            text: a zero row where there is no text, (num_nodes, text_dim).
            spectrum: (num_nodes, rank); not read where there are no interactions.
            degrees: number of interactions, (num_nodes,).
        """
        mean = _prior_mean(spectrum, degrees)
        axes, gain = self._gain(_prior_scale(degrees, self.half_degree))
        update: Floats = gain * (self._evidence(self._residual(text, mean)) @ axes) @ axes.T
        return mean + update

    def _residual(self, text: Numbers, mean: Floats) -> Floats:
        """s - b - W p of nodes with text, and zero, which is no evidence, of the others: (num_nodes, text_dim)."""
        told = np.any(text != 0, axis=1, keepdims=True)
        return np.where(told, text - self.bias - mean @ self.weight.T, 0.0)

    def _precision_times(self, rows: Floats) -> Floats:
        """Ψ⁻¹ on rows of width text_dim, by Woodbury's identity: no text_dim x text_dim matrix is inverted."""
        scaled = self.shared / self.specific[:, None]
        inner = np.eye(self.shared.shape[1]) + self.shared.T @ scaled
        result: Floats = rows / self.specific - np.linalg.solve(inner, scaled.T @ rows.T).T @ scaled.T
        return result

    def _evidence(self, residual: Floats) -> Floats:
        """Wᵀ Ψ⁻¹ r of each node: (num_nodes, text_dim) -> (num_nodes, rank)."""
        return residual @ self._precision_times(self.weight.T).T

    def _precisions(self) -> tuple[Floats, Floats]:
        """The text's precision relative to the population's prior: eigenvalues (rank,), and D^½ Q, (rank, rank)."""
        root = np.sqrt(self.population_variance)
        precision = self.weight.T @ self._precision_times(self.weight.T).T
        values, vectors = np.linalg.eigh(root[:, None] * precision * root)
        return values.clip(min=0.0), root[:, None] * vectors

    def _gain(self, scale: Floats) -> tuple[Floats, Floats]:
        """Axes A, (rank, rank), and gains, (num_nodes, rank), with (WᵀΨ⁻¹W + (c D)⁻¹)⁻¹ = A diag(gain) Aᵀ for every node.

        All nodes share the axes because their priors differ by a factor only: no system is solved for each node, and c = 0 (an
        infinity of interactions) and axes without variance are no special cases.
        """
        values, axes = self._precisions()
        return axes, scale[:, None] / (1 + scale[:, None] * values)

    def _factor_step(self, covariance: Floats, floor: float) -> tuple[Floats, Floats]:
        """One EM step of factor analysis (Rubin and Thayer 1982) towards the second moment of the noise: new F and ψ."""
        scaled = self.shared / self.specific[:, None]
        uncertainty = np.linalg.inv(np.eye(self.shared.shape[1]) + self.shared.T @ scaled)
        explained = covariance @ scaled @ uncertainty  # (text_dim, num_shared)
        moment = uncertainty + uncertainty @ scaled.T @ explained
        shared = np.asarray(np.linalg.solve(moment.T, explained.T).T, dtype=np.float64)
        specific: Floats = (np.diag(covariance) - (shared * explained).sum(axis=1)).clip(min=floor)
        return shared, specific


def analytic_side_representation(
    text: Numbers,
    spectrum: Numbers,
    degrees: Numbers,
    *,
    half_degree: float = 5.0,
    ridge: float = 0.01,
    num_shared: int = 32,
    iterations: int = 20,
) -> Floats:
    """z of the nodes that the model is fitted to, (num_nodes, rank); arguments are those of `AnalyticSSE.fit`."""
    model = AnalyticSSE.fit(
        text, spectrum, degrees, half_degree=half_degree, ridge=ridge, num_shared=num_shared, iterations=iterations
    )
    return model.encode(text, spectrum, degrees)


def _prior_scale(degrees: Numbers, half_degree: float) -> Floats:
    """c, (num_nodes,): 1 without interactions, 0 with an infinity of them."""
    scale: Floats = 1 / (1 + degrees.astype(np.float64) / half_degree)
    return scale


def _prior_mean(spectrum: Numbers, degrees: Numbers) -> Floats:
    """The spectrum, and the population's mean, zero, for nodes without interactions: (num_nodes, rank)."""
    return np.where(degrees[:, None] > 0, spectrum.astype(np.float64), 0.0)


def _leading_factors(covariance: Floats, number: int, floor: float) -> tuple[Floats, Floats]:
    """Where EM starts: F and ψ by probabilistic principal components (Tipping and Bishop 1999)."""
    number = min(number, len(covariance) - 1)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    rest = values[number:].mean()
    shared = vectors[:, :number] * np.sqrt((values[:number] - rest).clip(min=0.0))
    return shared, (np.diag(covariance) - (shared**2).sum(axis=1)).clip(min=floor)

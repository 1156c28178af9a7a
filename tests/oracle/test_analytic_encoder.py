"""The closed-form SSE against brute-force conditioning of the joint Gaussian, torch's distributions and a planted world."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from components.cllmr.linear.analytic import AnalyticSSE, analytic_side_representation
from components.evaluate.collapse import effective_rank, singular_values

TEXT_DIM, RANK, SHARED = 9, 3, 2


def hand_model(rng: np.random.Generator, shared: int = SHARED) -> AnalyticSSE:
    return AnalyticSSE(
        weight=rng.normal(size=(TEXT_DIM, RANK)),
        bias=rng.normal(size=TEXT_DIM),
        shared=rng.normal(size=(TEXT_DIM, shared)),
        specific=rng.uniform(0.3, 2, size=TEXT_DIM),
        population_variance=rng.uniform(0.2, 3, size=RANK),
        half_degree=4.0,
    )


def nodes(rng: np.random.Generator, model: AnalyticSSE, degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text drawn from the model, spectrum rows (zero without interactions), and the z that the text was drawn for."""
    scale = 1 / (1 + degrees[:, None] / model.half_degree)
    spectrum = rng.normal(size=(len(degrees), RANK)) * np.sqrt(model.population_variance) * (degrees[:, None] > 0)
    z = spectrum + rng.normal(size=spectrum.shape) * np.sqrt(scale * model.population_variance)
    noise = rng.normal(size=(len(z), model.shared.shape[1])) @ model.shared.T
    noise += rng.normal(size=(len(z), TEXT_DIM)) * np.sqrt(model.specific)
    return z @ model.weight.T + model.bias + noise, spectrum, z


def noise_covariance(model: AnalyticSSE) -> np.ndarray:
    return model.shared @ model.shared.T + np.diag(model.specific)


def log_likelihood(model: AnalyticSSE, text: np.ndarray, spectrum: np.ndarray, degrees: np.ndarray) -> float:
    """The sum of log p(text | spectrum) over the nodes with text, z integrated out, by torch's distributions."""
    told = text.any(axis=1)
    scale = 1 / (1 + degrees[told, None, None] / model.half_degree)
    covariance = scale * (model.weight * model.population_variance @ model.weight.T) + noise_covariance(model)
    law = MultivariateNormal(torch.tensor(model.bias + spectrum[told] @ model.weight.T), torch.tensor(covariance))
    return law.log_prob(torch.tensor(text[told])).sum().item()


@pytest.mark.parametrize("shared", [0, SHARED])
def test_the_posterior_mean_is_that_of_the_joint_gaussian(shared: int) -> None:
    rng = np.random.default_rng(0)
    model, degrees = hand_model(rng, shared), np.array([0, 1, 4, 30, 1000])
    text, spectrum, _ = nodes(rng, model, degrees)
    found = model.encode(text, spectrum, degrees)
    for row, degree in enumerate(degrees):
        prior = np.diag(model.population_variance) / (1 + degree / 4)
        covariance = model.weight @ prior @ model.weight.T + noise_covariance(model)
        surprise = text[row] - model.bias - model.weight @ spectrum[row]
        expected = spectrum[row] + prior @ model.weight.T @ np.linalg.inv(covariance) @ surprise
        np.testing.assert_allclose(found[row], expected, rtol=1e-9, atol=1e-12)


def test_the_posterior_mean_is_the_precision_weighted_mean_of_text_and_spectrum() -> None:
    """The information form, (WᵀΨ⁻¹W + T)⁻¹ (WᵀΨ⁻¹(s - b) + T p)."""
    rng = np.random.default_rng(1)
    model, degrees = hand_model(rng), np.array([2, 7])
    text, spectrum, _ = nodes(rng, model, degrees)
    weighted = model.weight.T @ np.linalg.inv(noise_covariance(model))
    for row, degree in enumerate(degrees):
        prior = np.diag((1 + degree / 4) / model.population_variance)
        expected = np.linalg.solve(weighted @ model.weight + prior, weighted @ (text[row] - model.bias) + prior @ spectrum[row])
        np.testing.assert_allclose(model.encode(text, spectrum, degrees)[row], expected, rtol=1e-9)


def test_a_cold_node_is_placed_by_its_text_alone_and_others_ever_more_by_their_spectrum() -> None:
    rng = np.random.default_rng(3)
    model = hand_model(rng)
    text, spectrum, _ = nodes(rng, model, np.full(6, 10))
    cold = model.encode(text, spectrum, np.zeros(6))
    np.testing.assert_array_equal(cold, model.encode(text, np.zeros_like(spectrum), np.zeros(6)))
    assert np.abs(cold - model.encode(text[::-1], spectrum, np.zeros(6))).max() > 0.1, "the text decides"
    distance = [
        np.linalg.norm(model.encode(text, spectrum, np.full(6, degree)) - spectrum, axis=1) for degree in (1.0, 10.0, 1e3, 1e6)
    ]
    assert (np.diff(distance, axis=0) < 0).all()
    np.testing.assert_array_equal(model.encode(text, spectrum, np.full(6, np.inf)), spectrum)


def test_without_text_the_spectrum_is_all_that_is_known() -> None:
    rng = np.random.default_rng(4)
    model, degrees = hand_model(rng), np.array([0, 5])
    _, spectrum, _ = nodes(rng, model, degrees)
    np.testing.assert_array_equal(model.encode(np.zeros((2, TEXT_DIM)), spectrum, degrees), spectrum)


def test_a_node_is_encoded_by_itself_and_an_axis_without_variance_stays_at_the_spectrum() -> None:
    rng = np.random.default_rng(5)
    model, degrees = hand_model(rng), np.arange(8)
    text, spectrum, _ = nodes(rng, model, degrees)
    alone = [model.encode(text[[row]], spectrum[[row]], degrees[[row]])[0] for row in range(8)]
    np.testing.assert_allclose(model.encode(text, spectrum, degrees), alone, rtol=1e-10)
    flat = replace(model, population_variance=np.array([1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(flat.encode(text, spectrum, degrees)[:, 1], spectrum[:, 1])


@pytest.mark.parametrize("shared", [0, SHARED])
def test_every_iteration_raises_the_likelihood(shared: int) -> None:
    rng = np.random.default_rng(6)
    degrees = rng.integers(0, 40, size=400)
    text, spectrum, _ = nodes(rng, hand_model(rng, shared), degrees)
    fits = [
        AnalyticSSE.fit(text, spectrum, degrees, half_degree=4, num_shared=shared, iterations=number) for number in range(8)
    ]
    likelihood = [log_likelihood(model, text, spectrum, degrees) for model in fits]
    assert (np.diff(likelihood) > 0).all()


def test_the_fit_finds_the_planted_model_and_its_likelihood_the_planted_half_degree() -> None:
    rng = np.random.default_rng(7)
    planted, degrees = hand_model(rng), rng.integers(0, 60, size=6000)
    text, spectrum, _ = nodes(rng, planted, degrees)
    text[:50] = 0.0  # nodes without text teach nothing

    def fit(half_degree: float) -> AnalyticSSE:
        return AnalyticSSE.fit(text, spectrum, degrees, half_degree=half_degree, ridge=1e-4, num_shared=SHARED, iterations=150)

    found = fit(4.0)
    np.testing.assert_allclose(found.weight, planted.weight, atol=0.1)
    np.testing.assert_allclose(found.bias, planted.bias, atol=0.1)
    error = np.linalg.norm(noise_covariance(found) - noise_covariance(planted)) / np.linalg.norm(noise_covariance(planted))
    assert error < 0.06, "of 6,000 draws a covariance is known to about 1/sqrt(6000) x sqrt(dim)"
    likelihood = {half: log_likelihood(fit(half), text, spectrum, degrees) for half in (0.25, 4.0, 64.0)}
    assert max(likelihood, key=likelihood.__getitem__) == 4.0


def test_shared_noise_places_cold_nodes_better_than_diagonal_noise() -> None:
    """Text that is mostly about other things, in correlated dimensions: what the shared factors are for."""
    rng = np.random.default_rng(8)
    planted = replace(hand_model(rng), shared=3 * rng.normal(size=(TEXT_DIM, SHARED)))
    degrees = np.where(np.arange(3000) < 300, 0, 50)
    text, spectrum, z = nodes(rng, planted, degrees)
    error = {
        number: ((analytic_side_representation(text, spectrum, degrees, num_shared=number) - z)[:300] ** 2).mean()
        for number in (0, SHARED)
    }
    nothing = (z[:300] ** 2).mean()
    assert error[SHARED] < 0.6 * nothing
    assert error[SHARED] < 0.8 * error[0]


def test_a_constant_text_says_nothing() -> None:
    spectrum = np.random.default_rng(9).normal(size=(20, RANK))
    text = np.tile(np.arange(1.0, TEXT_DIM + 1), (20, 1))
    found = analytic_side_representation(text, spectrum, np.full(20, 3))
    np.testing.assert_allclose(found, spectrum, atol=1e-6)


def test_the_effective_rank_equals_hand_computations() -> None:
    assert effective_rank(np.ones(4)) == pytest.approx(4)
    assert effective_rank(np.array([5.0, 0.0, 0.0])) == pytest.approx(1)
    # shares 1/2, 1/4, 1/4: entropy 1.5 bits
    assert effective_rank(np.array([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)
    assert effective_rank(np.zeros(3)) == 0


def test_text_that_collapses_on_one_axis_does_not_collapse_z() -> None:
    """What the spectrum's prior is for: the text has one strong direction, the interactions have three."""
    rng = np.random.default_rng(10)
    planted = replace(hand_model(rng), shared=20 * rng.normal(size=(TEXT_DIM, 1)), population_variance=np.ones(RANK))
    degrees = np.full(500, 20)
    text, spectrum, _ = nodes(rng, planted, degrees)
    z = analytic_side_representation(text, spectrum, degrees)
    assert effective_rank(singular_values(text)) < 0.5 * TEXT_DIM
    assert effective_rank(singular_values(z)) > 0.95 * RANK

"""Side encoders against other implementations of the same mathematics."""

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from components.cllmr.config import ModelConfig
from components.cllmr.encoders import ENCODERS
from components.cllmr.encoders.generative import MaskedGenerative
from components.cllmr.encoders.sse import DECODER_VARIANCE, SpectrumSideEncoder, gaussian_kl, perturb_spectrum


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sse(rank: int = 3, **settings: object) -> SpectrumSideEncoder:
    torch.manual_seed(0)
    return SpectrumSideEncoder(6, rank, 4, ModelConfig(embedding_dim=4, **settings))


def test_the_elbo_is_that_of_torch_distributions() -> None:
    encoder, text, spectrum = sse(spectrum_noise=0.0), rows(50, 6), rows(50, 3, seed=1)
    found = encoder(text, spectrum, torch.Generator().manual_seed(2))
    with torch.no_grad():
        mean_q, log_var_q = encoder.posterior(text, spectrum)
        mean_p, log_var_p = encoder.prior(spectrum)
        q, p = (Independent(Normal(m, (0.5 * v).exp()), 1) for m, v in ((mean_q, log_var_q), (mean_p, log_var_p)))
        likelihood = Independent(Normal(encoder.decoder(found.z), DECODER_VARIANCE**0.5), 1).log_prob(text)
        constant = 3 * np.log(2 * np.pi * DECODER_VARIANCE)  # of six dimensions, which no gradient sees
        expected = -(likelihood + constant - kl_divergence(q, p)).mean()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_divergence_has_the_gradient_of_finite_differences() -> None:
    parts = tuple(rows(4, 3, seed=seed).double().requires_grad_() for seed in range(4))
    assert torch.autograd.gradcheck(gaussian_kl, parts)


def test_noise_with_sign_stays_in_the_orthant_and_without_it_does_not() -> None:
    spectrum = rows(200, 5)
    spectrum[0, 2] = 0.0
    generator = torch.Generator().manual_seed(1)
    inside = perturb_spectrum(spectrum, 3.0, generator)
    assert torch.equal(torch.sign(inside), torch.sign(spectrum))
    outside = perturb_spectrum(spectrum, 3.0, generator, sign=False)
    assert (torch.sign(outside) != torch.sign(spectrum)).any()
    torch.testing.assert_close((outside - spectrum).norm(dim=1), torch.full((200,), 3.0))


def test_the_prior_mean_starts_as_the_spectrum_or_is_zero() -> None:
    spectrum = rows(5, 4)
    torch.testing.assert_close(sse(rank=4).prior(spectrum)[0], spectrum)
    assert not sse(rank=4, prior_mean="zero").prior(spectrum)[0].any()


@pytest.mark.parametrize("rank", [2, 4, 9])
def test_the_rank_of_the_spectrum_need_not_be_the_dimension(rank: int) -> None:
    found = sse(rank=rank)(rows(7, 6), rows(7, rank), torch.Generator().manual_seed(0))
    assert found.z.shape == (7, 4)


def test_only_the_concatenating_encoder_reads_the_spectrum() -> None:
    text, one, other = rows(7, 6), rows(7, 3), rows(7, 3, seed=5)
    assert torch.equal(sse().encode(text, one), sse().encode(text, other))
    concat = sse(spectrum_input="concat")
    assert not torch.equal(concat.encode(text, one), concat.encode(text, other))


def test_spectrum_dropout_hides_whole_rows_in_training_only() -> None:
    hidden = sse(spectrum_input="concat", spectrum_dropout=0.999, spectrum_noise=0.0)
    text, spectrum = rows(7, 6), rows(7, 3)
    generator = torch.Generator().manual_seed(0)
    trained = [hidden(text, spectrum, generator).z.detach() for _ in range(300)]
    without = hidden.encode(text, torch.zeros_like(spectrum)).detach()
    deviation = (0.5 * hidden.posterior(text, torch.zeros_like(spectrum))[1]).exp().max().item()
    torch.testing.assert_close(torch.stack(trained).mean(dim=0), without, atol=5 * deviation / 300**0.5, rtol=0)
    assert not torch.allclose(hidden.encode(text, spectrum), without)


def test_principal_components_are_those_of_the_singular_value_decomposition_of_the_texts_that_there_are() -> None:
    text = rows(40, 6) + 1.0
    for name, scale in (("pca", None), ("whitening", 1.0)):
        encoder = ENCODERS[name](6, 3, 4, ModelConfig(side_encoder=name, embedding_dim=4))
        encoder.prepare(torch.cat([text, torch.zeros(20, 6)]))
        z = encoder.encode(text, torch.zeros(40, 3)).numpy().astype(np.float64)
        left, values, _ = np.linalg.svd(text.numpy() - text.numpy().mean(axis=0), full_matrices=False)
        expected = left[:, :4] * (values[:4] if scale is None else 40**0.5)
        np.testing.assert_allclose(np.abs(z), np.abs(expected), atol=1e-4)


def test_the_inverse_of_the_generative_encoder_teaches_nothing_to_the_map_it_inverts() -> None:
    torch.manual_seed(0)
    encoder = MaskedGenerative(6, 3, 4, ModelConfig(side_encoder="generative", embedding_dim=4))
    encoder(rows(9, 6), rows(9, 3)).loss.backward()
    assert all(parameter.grad is None for parameter in encoder.to_text.parameters())
    assert all(parameter.grad is not None for parameter in encoder.from_text.parameters())


def test_the_generative_alignment_is_rlmrecs_reconstruction_of_text_and_teaches_the_map_and_the_backbone() -> None:
    torch.manual_seed(0)
    config = ModelConfig(side_encoder="generative", embedding_dim=4, alignment_temperature=0.3)
    encoder = MaskedGenerative(6, 3, 4, config)
    hidden, text = rows(9, 4).requires_grad_(), rows(9, 6, seed=1)
    found = encoder.alignment(hidden, rows(9, 4, seed=2), text)
    told = encoder.to_text(hidden)
    odds = (torch.cosine_similarity(told[:, None], text[None], dim=2) / 0.3).exp()
    torch.testing.assert_close(found, -(odds.diagonal() / odds.sum(dim=1)).log().mean())
    found.backward()
    assert hidden.grad is not None
    assert all(parameter.grad is not None for parameter in encoder.to_text.parameters())


def test_the_elbo_has_the_gradient_of_finite_differences() -> None:
    encoder = sse(spectrum_input="concat").double()
    text, spectrum = rows(4, 6).double().requires_grad_(), rows(4, 3, seed=1).double().requires_grad_()

    def elbo(text: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
        return encoder(text, spectrum, torch.Generator().manual_seed(2)).loss

    assert torch.autograd.gradcheck(elbo, (text, spectrum))

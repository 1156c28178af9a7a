"""Spectrum-based side-information encoder (SSE): an identifiable VAE whose conditional prior is the interaction spectrum.

The text of a node says what an LLM knows about it; its row of the spectrum says where the interactions place it. The prior
ties the latent space to the spectrum's axes, which spread over all dimensions, so the text cannot collapse into a few (E4-E8).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.cllmr.config import ModelConfig
from components.cllmr.encoders.base import Encoded, SideEncoder, two_layers, xavier

DECODER_VARIANCE = 0.01  # fixed, as in iVAE's reference implementation (E7)
_MOST_LOG_VARIANCE = 10.0


def perturb_spectrum(spectrum: Tensor, noise: float, generator: torch.Generator | None = None, *, sign: bool = True) -> Tensor:
    """Spectrum rows moved by a vector of length `noise` (E4): (num_nodes, rank) -> (num_nodes, rank).

    Models mis-clicks in the interactions that the spectrum was computed from.

    Args:
        sign: stay inside the row's own orthant, so that no sign changes and a zero stays zero; otherwise any direction.
    """
    if sign:
        direction = torch.sign(spectrum) * functional.normalize(
            torch.rand(spectrum.shape, generator=generator).to(spectrum), dim=1
        )
    else:
        direction = functional.normalize(torch.randn(spectrum.shape, generator=generator).to(spectrum), dim=1)
    return spectrum + noise * direction


def gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians, summed over dimensions (E8): (num_nodes, dim) x 4 -> (num_nodes,)."""
    ratio = (log_var_q.exp() + (mean_q - mean_p) ** 2) / log_var_p.exp()
    return 0.5 * (log_var_p - log_var_q + ratio - 1).sum(dim=1)


class SpectrumSideEncoder(SideEncoder):
    """q(z | text[, spectrum]), p(z | spectrum) and p(text | z), shared by users and items.

    With `spectrum_input` "prior" the spectrum is seen by the prior alone. With "concat" the encoder sees it as well, as in
    iVAE; it can then copy the spectrum and ignore the text, and a node without interactions is out of distribution:
    `spectrum_dropout` hides whole rows from the encoder in training against both. Measured worse, kept to reproduce.
    """

    def __init__(self, text_dim: int, rank: int, output_dim: int, config: ModelConfig) -> None:
        super().__init__(config)
        self.concat = config.spectrum_input == "concat"
        self.dropout = config.spectrum_dropout
        self.noise, self.noise_sign = config.spectrum_noise, config.noise_sign
        hidden = (text_dim + output_dim) // 2
        self.encoder = nn.Sequential(nn.Linear(text_dim + (rank if self.concat else 0), hidden), nn.LeakyReLU())
        self.encoder_mean = nn.Linear(hidden, output_dim)
        self.encoder_log_var = nn.Linear(hidden, output_dim)
        self.prior_mean = nn.Linear(rank, output_dim, bias=False) if config.prior_mean == "learned" else None
        self.prior_log_var = nn.Sequential(nn.Linear(rank, output_dim), nn.LeakyReLU(), nn.Linear(output_dim, output_dim))
        self.decoder = two_layers(output_dim, text_dim, text_dim)
        xavier(self)
        if self.prior_mean is not None:
            nn.init.eye_(self.prior_mean.weight)  # the spectrum itself is the prior mean to start with (E5)

    def posterior(self, text: Tensor, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | .) (E6), (num_nodes, output_dim) each."""
        hidden = self.encoder(torch.cat([text, spectrum], dim=1) if self.concat else text)
        return self.encoder_mean(hidden), self.encoder_log_var(hidden).clamp(-_MOST_LOG_VARIANCE, _MOST_LOG_VARIANCE)

    def prior(self, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(z | spectrum) (E5), (num_nodes, output_dim) each."""
        log_var = self.prior_log_var(spectrum).clamp(-_MOST_LOG_VARIANCE, _MOST_LOG_VARIANCE)
        return torch.zeros_like(log_var) if self.prior_mean is None else self.prior_mean(spectrum), log_var

    def forward(self, text: Tensor, spectrum: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Training pass: perturbed spectrum, sampled z, and the negative ELBO of the three distributions (E4-E8)."""
        noisy = perturb_spectrum(spectrum, self.noise, generator, sign=self.noise_sign)
        seen = noisy
        if self.concat and self.dropout:
            kept = torch.rand(len(noisy), 1, generator=generator).to(noisy) >= self.dropout
            seen = noisy * kept
        mean_q, log_var_q = self.posterior(text, seen)
        xi = torch.randn(mean_q.shape, generator=generator).to(mean_q)
        z = mean_q + (0.5 * log_var_q).exp() * xi
        divergence = gaussian_kl(mean_q, log_var_q, *self.prior(noisy))
        reconstruction = ((text - self.decoder(z)) ** 2).sum(dim=1) / (2 * DECODER_VARIANCE)
        return Encoded(z, (reconstruction + divergence).mean())

    def encode(self, text: Tensor, spectrum: Tensor) -> Tensor:
        """The posterior mean without noise: (num_nodes, output_dim)."""
        return self.posterior(text, spectrum)[0]

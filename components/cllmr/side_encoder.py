"""Spectrum-based side-information encoder (SSE): an identifiable VAE whose conditional prior is the interaction spectrum.

The text of a node says what an LLM knows about it; its row of the spectrum says where the interactions place it. The prior
ties the latent space to the spectrum's axes, which spread over all dimensions, so the text cannot collapse into a few (E4-E8).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

DECODER_VARIANCE = 0.01  # fixed, as in iVAE's reference implementation (E7)


class Encoded(NamedTuple):
    """One pass of the encoder over a set of nodes."""

    z: Tensor
    """Side representation, (num_nodes, dim)."""
    negative_elbo: Tensor
    """Mean reconstruction error plus divergence (E8), a scalar."""


def perturb_spectrum(spectrum: Tensor, noise: float, generator: torch.Generator | None = None) -> Tensor:
    """Spectrum rows moved by a vector of length `noise` inside their own orthant (E4): signs never change.

    Models mis-clicks in the interactions that the spectrum was computed from. (num_nodes, rank) -> (num_nodes, rank).
    """
    delta = torch.rand(spectrum.shape, generator=generator).to(spectrum)
    return spectrum + noise * torch.sign(spectrum) * functional.normalize(delta, dim=1)


def gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians, summed over dimensions (E8): (num_nodes, dim) x 4 -> (num_nodes,)."""
    ratio = (log_var_q.exp() + (mean_q - mean_p) ** 2) / log_var_p.exp()
    return 0.5 * (log_var_p - log_var_q + ratio - 1).sum(dim=1)


class SpectrumSideEncoder(nn.Module):
    """q(z | text[, spectrum]), p(z | spectrum) and p(text | z), shared by users and items.

    Args:
        text_dim: width of the text embeddings.
        rank: width of the spectrum.
        embedding_dim: width of z, the backbone's.
        spectrum_input: "prior" gives the spectrum to the prior only; "concat" to the encoder as well, as iVAE does. With
            "concat" the encoder can copy the spectrum and ignore the text, and a node without interactions is out of
            distribution: measured worse, kept to reproduce.
        noise: length of the spectrum's perturbation while training (E4).
    """

    def __init__(
        self,
        text_dim: int,
        rank: int,
        embedding_dim: int,
        spectrum_input: Literal["prior", "concat"] = "prior",
        noise: float = 0.01,
    ) -> None:
        super().__init__()
        self.spectrum_input = spectrum_input
        self.noise = noise
        hidden = (text_dim + embedding_dim) // 2
        encoder_dim = text_dim + (rank if spectrum_input == "concat" else 0)
        self.encoder = nn.Sequential(nn.Linear(encoder_dim, hidden), nn.LeakyReLU())
        self.encoder_mean = nn.Linear(hidden, embedding_dim)
        self.encoder_log_var = nn.Linear(hidden, embedding_dim)
        self.prior_mean = nn.Linear(rank, embedding_dim, bias=False)
        self.prior_log_var = nn.Sequential(
            nn.Linear(rank, embedding_dim), nn.LeakyReLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.decoder = nn.Sequential(nn.Linear(embedding_dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, text_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.eye_(self.prior_mean.weight)  # the spectrum itself is the prior mean to start with (E5)

    def posterior(self, text: Tensor, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | .) (E6), (num_nodes, dim) each."""
        seen = torch.cat([text, spectrum], dim=1) if self.spectrum_input == "concat" else text
        hidden = self.encoder(seen)
        return self.encoder_mean(hidden), self.encoder_log_var(hidden).clamp(-10.0, 10.0)

    def forward(self, text: Tensor, spectrum: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Training pass: perturbed spectrum, sampled z, and the loss of the three distributions (E4-E8).

        Args:
            text: text embeddings with unit rows, (num_nodes, text_dim).
            spectrum: (num_nodes, rank), scaled to mean row norm 1 (E3).
            generator: source of all noise, so that a step can be repeated.
        """
        noisy = perturb_spectrum(spectrum, self.noise, generator)
        mean_q, log_var_q = self.posterior(text, noisy)
        xi = torch.randn(mean_q.shape, generator=generator).to(mean_q)
        z = mean_q + (0.5 * log_var_q).exp() * xi
        log_var_p = self.prior_log_var(noisy).clamp(-10.0, 10.0)
        divergence = gaussian_kl(mean_q, log_var_q, self.prior_mean(noisy), log_var_p)
        reconstruction = ((text - self.decoder(z)) ** 2).sum(dim=1) / (2 * DECODER_VARIANCE)
        return Encoded(z, (reconstruction + divergence).mean())

    def encode(self, text: Tensor, spectrum: Tensor) -> Tensor:
        """Side representation without noise, for evaluation and serving: (num_nodes, dim)."""
        return self.posterior(text, spectrum)[0]

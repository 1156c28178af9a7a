"""Losses: ranking (BPR, sampled softmax), alignment of text and collaborative representations (InfoNCE)."""

import torch
from torch import Tensor
from torch.nn import functional


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking, mean of softplus(negative - positive): (batch,) x 2 -> scalar."""
    return functional.softplus(negative - positive).mean()


def sampled_softmax(positive: Tensor, negatives: Tensor, is_positive: Tensor) -> Tensor:
    """Cross-entropy of the true item against shared sampled ones: the scale of the scores is their 1/τ.

    Args:
        positive: score of each pair, (batch,).
        negatives: scores of the shared negatives for each user, (batch, num_negatives).
        is_positive: which of them the user has interacted with, left out of the sum, (batch, num_negatives) bool.
    """
    negatives = negatives.masked_fill(is_positive, -torch.inf)
    return (torch.logsumexp(torch.cat([positive[:, None], negatives], dim=1), dim=1) - positive).mean()


def info_nce(anchors: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Alignment (E9): every anchor must find its own target among the batch's, by cosine; (batch, dim) x 2 -> scalar."""
    similarity = functional.normalize(anchors, dim=1) @ functional.normalize(targets, dim=1).T / temperature
    return functional.cross_entropy(similarity, torch.arange(len(anchors), device=anchors.device))

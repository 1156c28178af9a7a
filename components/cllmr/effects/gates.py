"""Counterfactual inference: what part of a score is the side information speaking for itself, and scores without it.

Causal graph: side information X -> score Y directly (gates ``g_u``, ``g_i``), and X -> mediator M -> Y through the match of
user and item (``m_ui``). With ``m*`` the mediator's reference state (here each user's mean over all items):

    TE_ui  = m_ui  * g_u * g_i          total effect: the factual score                                  (E13)
    NDE_ui = m*_u  * g_u * g_i          natural direct effect: what X does with the match switched off    (E15)
    TNIE   = TE - NDE                   what is left: the match itself
    y_ui   = TE - λ NDE = (m_ui - λ m*_u) * g_u * g_i, λ the debias strength                              (E16)

The mediator is an inner product, m_ui = a_u . b_i, hence m*_u = a_u . mean_j b_j and y_ui = g_u * a_u . [g_i (b_i - λ b̄)]:
debiased scores are served by one matrix product or any index for inner products (`base.gated`).

Why the mediator has an offset: a match score that is centred at zero (cosine) has a reference state of about zero, which
makes the direct effect, and so the whole correction, vanish; and for a negative match a larger gate would lower the score.
``m_ui = (1 + cos(e_u, e_i)) / τ`` is never negative, so a gate is a propensity: more of it is more score.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class PropensityHeads(nn.Module):
    """Direct effect of the side information: g = σ(h(z)) / mean σ(h(z)), one linear head for users and one for items (E11).

    Relative to the mean because the loss can use a common factor as a temperature: absolute gates all saturate at 1 and say
    nothing (measured); relative ones can only say which node has more propensity than another.
    """

    def __init__(self, embedding_dim: int, initial_bias: float, user_gate: bool) -> None:
        super().__init__()
        self.item = nn.Linear(embedding_dim, 1)
        self.user = nn.Linear(embedding_dim, 1) if user_gate else None
        for head in (self.item, self.user):
            if head is not None:
                nn.init.zeros_(head.weight)
                nn.init.constant_(head.bias, initial_bias)

    @staticmethod
    def gate(head: nn.Linear, z: Tensor) -> Tensor:
        """Gates of a set of nodes relative to their mean: (num_nodes, dim) -> (num_nodes,)."""
        gate = torch.sigmoid(head(z).squeeze(-1))
        return gate / gate.mean()

    def item_logit(self, z: Tensor) -> Tensor:
        """h_I(z): (num_items, dim) -> (num_items,)."""
        return self.item(z).squeeze(-1)


class MediatorFactors(NamedTuple):
    """The mediator as an inner product with its offset as one more dimension."""

    users: Tensor
    """a_u = [e_u, 1], (num_users, dim + 1)."""
    items: Tensor
    """b_i = [scale * e_i, offset], (num_items, dim + 1)."""


def mediator_factors(users: Tensor, items: Tensor, *, cosine: bool, scale: float, offset: float) -> MediatorFactors:
    """Factors whose inner product is m_ui = scale * (match + offset), match = cosine or inner product (E12).

    Args:
        users: e_u, (num_users, dim).
        items: e_i, (num_items, dim).
        cosine: whether the match is the cosine (then `offset` 1 makes the mediator non-negative).
        scale: 1/τ of the softmax, or 1.
        offset: in units of the match.
    """
    if cosine:
        users, items = functional.normalize(users, dim=1), functional.normalize(items, dim=1)
    ones = torch.ones_like(users[:, :1])
    return MediatorFactors(
        torch.cat([users, ones], dim=1),
        torch.cat([scale * items, torch.full_like(items[:, :1], scale * offset)], dim=1),
    )

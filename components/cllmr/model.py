"""CLLMR: a backbone, the side-information encoder and the propensity heads, trained together."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from components.cllmr.backbone import LightGCN
from components.cllmr.config import ModelConfig
from components.cllmr.counterfactual import MediatorFactors, PropensityHeads, mediator_factors
from components.cllmr.objective import bpr, info_nce, sampled_softmax
from components.cllmr.sampling import Batch
from components.cllmr.side_encoder import SpectrumSideEncoder


@dataclass(frozen=True)
class SideInformation:
    """What is known of every node beside the graph, users first: see `components.cllmr.graph`."""

    text: Tensor
    """Text embeddings with unit rows, (num_nodes, text_dim); a zero row where there is no text."""
    spectrum: Tensor
    """Spectrum of the interactions, mean row norm 1, (num_nodes, rank) (E1-E3)."""


class Representations(NamedTuple):
    """All that scoring needs, without noise and without gradients."""

    mediator: MediatorFactors
    user_gate: Tensor
    """g_u, (num_users,); ones without the counterfactual part."""
    item_gate: Tensor
    """g_i, (num_items,); ones without the counterfactual part."""
    user_side: Tensor
    """z of the users, (num_users, dim); empty without a side encoder."""
    item_side: Tensor
    """z of the items, (num_items, dim)."""


class CLLMR(nn.Module):
    """Scores y_ui = m_ui * g_u * g_i and the loss that trains them (E13, E18).

    Args:
        adjacency: of the training graph, see `components.cllmr.graph.normalised_adjacency`.
        side: side information; None if and only if `config.side_encoder` is "none".
    """

    def __init__(
        self, config: ModelConfig, adjacency: Tensor, num_users: int, num_items: int, side: SideInformation | None
    ) -> None:
        super().__init__()
        assert (side is None) == (config.side_encoder == "none"), "side information and its encoder come together"
        self.config = config
        self.num_users = num_users
        self.backbone = LightGCN(adjacency, num_users, num_items, config.embedding_dim, config.num_layers)
        self.text: Tensor
        self.spectrum: Tensor
        if side is not None:
            self.register_buffer("text", side.text, persistent=False)  # inputs: not part of a checkpoint
            self.register_buffer("spectrum", side.spectrum, persistent=False)
            self.side_encoder = SpectrumSideEncoder(
                side.text.shape[1],
                side.spectrum.shape[1],
                config.embedding_dim,
                config.spectrum_input,
                config.spectrum_noise,
            )
            if config.counterfactual:
                self.heads = PropensityHeads(config.embedding_dim, config.gate_bias, config.user_gate)

    @property
    def has_side_information(self) -> bool:
        """Whether a side encoder is trained beside the backbone."""
        return self.config.side_encoder != "none"

    @property
    def has_gates(self) -> bool:
        """Whether the counterfactual part takes part in the score."""
        return self.has_side_information and self.config.counterfactual

    def mediator(self, users: Tensor, items: Tensor) -> MediatorFactors:
        """a_u and b_i of given collaborative representations."""
        softmax = self.config.loss == "softmax"
        return mediator_factors(
            users,
            items,
            cosine=softmax,
            scale=1 / self.config.temperature if softmax else 1.0,
            offset=self.config.mediator_offset if self.has_gates else 0.0,
        )

    def _gates(self, user_z: Tensor, item_z: Tensor) -> tuple[Tensor, Tensor]:
        """g_u (num_users,), ones if users have no gate, and g_i (num_items,), of given side representations."""
        heads = self.heads
        users = torch.ones_like(user_z[:, 0]) if heads.user is None else heads.gate(heads.user, user_z)
        return users, heads.gate(heads.item, item_z)

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one step, and its parts (detached) by name.

        Args:
            batch: see `components.cllmr.sampling`.
            generator: source of the encoder's noise, on the CPU.
        """
        config = self.config
        all_users, all_items = self.backbone()
        users, user_of_pair = torch.unique(batch.users, return_inverse=True)
        items, position = torch.unique(torch.cat([batch.items, batch.negatives]), return_inverse=True)
        item_of_pair, item_of_negative = position[: len(batch.items)], position[len(batch.items) :]
        factors = self.mediator(all_users[users], all_items[items])
        a = factors.users[user_of_pair]
        positive = (a * factors.items[item_of_pair]).sum(dim=1)
        if config.loss == "softmax":
            negative = a @ factors.items[item_of_negative].T
        else:
            negative = (a * factors.items[item_of_negative]).sum(dim=1)

        parts: dict[str, Tensor] = {}
        if self.has_side_information:
            nodes = torch.cat([users, items + self.num_users])
            z, parts["elbo"] = self.side_encoder(self.text[nodes], self.spectrum[nodes], generator)
            user_z, item_z = z[: len(users)], z[len(users) :]
            cap = config.max_aligned_nodes
            positives = torch.unique(item_of_pair)[:cap]
            parts["alignment"] = info_nce(all_users[users[:cap]], user_z[:cap], config.alignment_temperature) + info_nce(
                all_items[items[positives]], item_z[positives], config.alignment_temperature
            )
            if self.has_gates:
                # the heads read the side representation, they do not shape it: otherwise it fits popularity, and over-fits
                user_gate, item_gate = self._gates(user_z.detach(), item_z.detach())
                user_gate, item_logit = user_gate[user_of_pair], self.heads.item_logit(item_z.detach())
                positive = positive * user_gate * item_gate[item_of_pair]
                gate_of_negative = item_gate[item_of_negative]
                if config.loss == "softmax":
                    negative = negative * user_gate[:, None] * gate_of_negative
                    opponent = item_of_negative[torch.arange(len(item_of_pair), device=z.device) % len(item_of_negative)]
                else:
                    negative = negative * user_gate * gate_of_negative
                    opponent = item_of_negative
                parts["gate"] = bpr(item_logit[item_of_pair], item_logit[opponent])

        if config.loss == "softmax":
            parts["ranking"] = sampled_softmax(positive, negative, batch.is_positive)
        else:
            parts["ranking"] = bpr(positive, negative)
        weights = {
            "ranking": 1.0,
            "elbo": config.elbo_weight,
            "alignment": config.alignment_weight,
            "gate": config.gate_weight,
        }
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        if config.l2_weight:
            loss = loss + config.l2_weight * torch.stack([(p**2).sum() for p in self.parameters()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def representations(self) -> Representations:
        """Everything that is served, on the CPU."""
        users, items = self.backbone()
        factors = self.mediator(users, items)
        user_gate, item_gate = torch.ones(len(users)), torch.ones(len(items))
        z = torch.empty(len(users) + len(items), 0)
        if self.has_side_information:
            z = self.side_encoder.encode(self.text, self.spectrum)
        user_z, item_z = z[: self.num_users], z[self.num_users :]
        if self.has_gates:
            user_gate, item_gate = self._gates(user_z, item_z)
        factors = MediatorFactors(*(part.cpu() for part in factors))
        return Representations(factors, user_gate.cpu(), item_gate.cpu(), user_z.cpu(), item_z.cpu())

"""CLLMR: a backbone, a side-information encoder and the propensity heads, trained together."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from components.cllmr.backbones import BACKBONES
from components.cllmr.config import ModelConfig
from components.cllmr.effects.gates import MediatorFactors, PropensityHeads, mediator_factors
from components.cllmr.encoders import ENCODERS
from components.cllmr.graph import Graph
from components.cllmr.objective import bpr, sampled_softmax
from components.cllmr.sampling import Batch


@dataclass(frozen=True)
class SideInformation:
    """What is known of every node beside the graph, users first: see `components.cllmr.graph`."""

    text: Tensor
    """Text embeddings with unit rows, (num_nodes, text_dim); a zero row where there is no text, see `CLLMR.none_token`."""
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

    λ_reg ‖Θ‖² (E18) is the optimiser's weight decay, see `components.train.loop.make_optimizer`.

    Args:
        graph: of the training interactions.
        side: side information; None if and only if `config.side_encoder` is "none".
    """

    def __init__(self, config: ModelConfig, graph: Graph, side: SideInformation | None) -> None:
        super().__init__()
        assert (side is None) == (config.side_encoder == "none"), "side information and its encoder come together"
        self.config = config
        self.num_users = graph.num_users
        self.backbone = BACKBONES[config.backbone](graph, config)
        self.text: Tensor
        self.spectrum: Tensor
        self.no_text: Tensor
        self.none_token: nn.Parameter | None = None
        """What stands in for the text of nodes without any, (1, text_dim); where all have text there is none to learn."""
        if side is not None:
            self.register_buffer("text", side.text, persistent=False)  # inputs: not part of a checkpoint
            self.register_buffer("spectrum", side.spectrum, persistent=False)
            widths = side.text.shape[1], side.spectrum.shape[1], self.backbone.output_dim
            self.side_encoder = ENCODERS[config.side_encoder](*widths, config)
            self.side_encoder.prepare(side.text)
            if config.counterfactual:
                self.heads = PropensityHeads(self.backbone.output_dim, config.gate_bias, config.user_gate)
            no_text = side.text.norm(dim=1, keepdim=True) == 0
            self.register_buffer("no_text", no_text, persistent=False)
            if no_text.any():
                # drawn last, so that it changes no other initial value, and about as long as a text
                self.none_token = nn.Parameter(torch.randn(1, side.text.shape[1]) / side.text.shape[1] ** 0.5)

    @property
    def has_side_information(self) -> bool:
        """Whether a side encoder is trained beside the backbone."""
        return self.config.side_encoder != "none"

    @property
    def has_gates(self) -> bool:
        """Whether the counterfactual part takes part in the score."""
        return self.has_side_information and self.config.counterfactual

    def side_text(self, nodes: Tensor | slice) -> Tensor:
        """What the side encoder reads of `nodes`, (len(nodes), text_dim)."""
        text = self.text[nodes]
        return text if self.none_token is None else torch.where(self.no_text[nodes], self.none_token, text)

    def mediator(self, users: Tensor, items: Tensor) -> MediatorFactors:
        """a_u and b_i of given collaborative representations."""
        softmax = self.config.loss == "softmax"
        return mediator_factors(
            users,
            items,
            cosine=softmax and self.config.similarity == "cosine",
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
            generator: source of all noise, on the CPU.
        """
        config = self.config
        masked = self._masked_nodes(generator)
        all_users, all_items = self.backbone(generator, None if masked is None else self._masked_table(masked))
        users, user_of_pair = torch.unique(batch.users, return_inverse=True)
        items, position = torch.unique(torch.cat([batch.items, batch.negatives]), return_inverse=True)
        item_of_pair, item_of_negative = position[: len(batch.items)], position[len(batch.items) :]
        # rows are gathered by index_select: the gradient of fancy indexing takes twice as long
        user_rows, item_rows = all_users.index_select(0, users), all_items.index_select(0, items)
        factors = self.mediator(user_rows, item_rows)

        parts: dict[str, Tensor] = {}
        if self.has_side_information:
            nodes = torch.cat([users, items + self.num_users])
            if masked is None:
                # the batch is in random order, so its first pairs are a fair sample of its nodes
                first = slice(config.max_aligned_nodes)
                aligned = torch.unique(torch.cat([user_of_pair[first], len(users) + item_of_pair[first]]))
                z = self._add_alignment(parts, torch.cat([user_rows, item_rows]), nodes, aligned, generator)
            else:
                shown = masked[: config.max_aligned_nodes]
                self._add_reconstruction(parts, torch.cat([all_users, all_items]).index_select(0, shown), shown, generator)
                if self.has_gates:
                    z = self.side_encoder.encode(self.side_text(nodes), self.spectrum[nodes])
            if self.has_gates:
                # the heads read the side representation, they do not shape it: otherwise it fits popularity, and over-fits
                user_z, item_z = z[: len(users)].detach(), z[len(users) :].detach()
                user_gate, item_gate = self._gates(user_z, item_z)
                # (a g_u) . (b g_i): gated as factors, so that no matrix of scores is multiplied
                factors = MediatorFactors(factors.users * user_gate[:, None], factors.items * item_gate[:, None])
                logit, opponent = self.heads.item_logit(item_z), item_of_negative
                if config.loss == "softmax":
                    opponent = opponent[torch.arange(len(item_of_pair), device=z.device) % len(opponent)]
                parts["gate"] = bpr(logit[item_of_pair], logit[opponent])

        a = factors.users.index_select(0, user_of_pair)
        positive = (a * factors.items.index_select(0, item_of_pair)).sum(dim=1)
        opposing = factors.items.index_select(0, item_of_negative)
        if config.loss == "softmax":
            parts["ranking"] = sampled_softmax(positive, a, opposing, batch.false_negatives)
        else:
            parts["ranking"] = bpr(positive, (a * opposing).sum(dim=1))
        auxiliary = self.backbone.auxiliary_loss(batch, all_users, all_items, generator)
        if auxiliary is not None:
            parts["auxiliary"] = auxiliary
        weights = {
            "ranking": 1.0,
            "auxiliary": 1.0,  # weighted by the backbone itself
            "elbo": config.elbo_weight,
            "alignment": config.alignment_weight,
            "gate": config.gate_weight,
        }
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _add_alignment(
        self, parts: dict[str, Tensor], rows: Tensor, nodes: Tensor, aligned: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Encodes nodes of the batch and adds what they cost to `parts`; returns z of those that were encoded.

        Args:
            rows: collaborative representations of `nodes`, (num_nodes, output_dim).
            nodes: users first, (num_nodes,).
            aligned: which of them are aligned, ascending; without gates nothing reads the others, which are not encoded.
        """
        if not self.has_gates:
            rows, nodes = rows.index_select(0, aligned), nodes[aligned]
            aligned = torch.arange(len(aligned), device=nodes.device)
        text = self.side_text(nodes)
        z, parts["elbo"] = self.side_encoder(text, self.spectrum[nodes], generator)
        is_user = nodes[aligned] < self.num_users
        sides = [
            self.side_encoder.alignment(*(part.index_select(0, side) for part in (rows, z, text)))
            for side in (aligned[is_user], aligned[~is_user])
        ]
        parts["alignment"] = sides[0] + sides[1]
        return z

    def _add_reconstruction(self, parts: dict[str, Tensor], rows: Tensor, nodes: Tensor, generator: torch.Generator) -> None:
        """Adds to `parts` what it costs to tell the text of hidden `nodes` from their representations `rows` (RLMRec-Gen)."""
        text = self.side_text(nodes)
        z, parts["elbo"] = self.side_encoder(text, self.spectrum[nodes], generator)
        parts["alignment"] = self.side_encoder.alignment(rows, z, text)

    def _masked_nodes(self, generator: torch.Generator) -> Tensor | None:
        """Nodes whose ID embedding is hidden in this step (RLMRec-Gen), in random order; None where the encoder hides none."""
        ratio = self.side_encoder.mask_ratio if self.has_side_information else 0.0
        if not ratio:
            return None
        table = self.backbone.embedding
        return torch.randperm(len(table), generator=generator)[: max(1, int(ratio * len(table)))].to(table.device)

    def _masked_table(self, masked: Tensor) -> Tensor:
        """The ID table with the encoder's mask token in the rows of `masked`, (num_nodes, embedding_dim)."""
        table = self.backbone.embedding
        hidden = torch.zeros(len(table), 1, dtype=torch.bool, device=table.device)
        hidden[masked] = True
        return torch.where(hidden, self.side_encoder.mask_token, table)

    @torch.no_grad()
    def representations(self) -> Representations:
        """Everything that is served, on the CPU."""
        users, items = self.backbone()
        factors = self.mediator(users, items)
        user_gate, item_gate = torch.ones(len(users)), torch.ones(len(items))
        z = torch.empty(len(users) + len(items), 0)
        if self.has_side_information:
            z = self.side_encoder.encode(self.side_text(slice(None)), self.spectrum)
        user_z, item_z = z[: self.num_users], z[self.num_users :]
        if self.has_gates:
            user_gate, item_gate = self._gates(user_z, item_z)
        factors = MediatorFactors(*(part.cpu() for part in factors))
        return Representations(factors, user_gate.cpu(), item_gate.cpu(), user_z.cpu(), item_z.cpu())

"""Settings of the model; the optimiser's and the data's are elsewhere."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class ModelConfig(BaseModel):
    """CLLMR's shape and the weights of its losses (E18)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embedding_dim: PositiveInt = 64
    """Width of user, item and side representations. Published results on the common benchmarks use 32: always state it."""
    num_layers: NonNegativeInt = 2
    """Propagation steps of LightGCN; 0 is matrix factorisation."""
    loss: Literal["softmax", "bpr"] = "softmax"
    """Ranking loss: sampled softmax on the cosine, or BPR on the inner product (as published)."""
    temperature: PositiveFloat = 0.25
    """τ of the softmax loss; without effect for BPR."""
    num_negatives: PositiveInt = 512
    """Shared negatives per step of the softmax loss; all items where there are fewer. Without effect for BPR."""
    side_encoder: Literal["sse", "none"] = "sse"
    """"none" trains the bare backbone: no side information, no gates."""
    spectrum_input: Literal["prior", "concat"] = "prior"
    """Who sees the spectrum: the prior alone, or the encoder too (E5, E6)."""
    spectrum_noise: NonNegativeFloat = 0.01
    """ε, length of the perturbation of a spectrum row of length 1 (E4)."""
    elbo_weight: NonNegativeFloat = 1e-3
    """λ_sse, weight of the encoder's negative ELBO (E8)."""
    alignment_weight: NonNegativeFloat = 0.03
    """λ_con, weight of the alignment of text and collaborative representations (E9)."""
    alignment_temperature: PositiveFloat = 0.2
    """τ of the alignment."""
    max_aligned_nodes: PositiveInt = 1024
    """Users, and items, of a batch that are aligned at most: the cost is quadratic."""
    counterfactual: bool = True
    """Whether the gates take part; without them the factual score is the mediator and debiasing does nothing."""
    user_gate: bool = False
    """Whether users have a gate too. It cannot change a ranking, only how training weighs users; measured worse with it."""
    mediator_offset: NonNegativeFloat = 1.0
    """Added to the match, in units of the cosine, so that the mediator is not negative (E12)."""
    gate_weight: NonNegativeFloat = 1e-2
    """α, weight of the item head's own ranking loss (E17)."""
    gate_bias: float = 0.0
    """Initial bias of the heads. Gates are relative to their mean, so it sets how far they can rise, not where they start."""
    l2_weight: NonNegativeFloat = 0.0
    """λ_reg on all parameters (E18); published BPR settings use 1e-6 to 1e-5."""

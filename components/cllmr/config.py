"""Settings of the model; the optimiser's and the data's are elsewhere."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from components.cllmr.registry import names
from components.errors import did_you_mean

BACKBONE_NAMES = names("backbones")
ENCODER_NAMES = ("none", *names("encoders"))


def one_of(allowed: tuple[str, ...]) -> Callable[[str], str]:
    """A validator that lets these names through."""

    def checked(name: str) -> str:
        if name not in allowed:
            raise ValueError(did_you_mean(name, allowed).removesuffix("."))
        return name

    return checked


Kept = Annotated[float, Field(gt=0.0, le=1.0)]
Dropped = Annotated[float, Field(ge=0.0, lt=1.0)]


class ModelConfig(BaseModel):
    """CLLMR's shape and the weights of its losses (E18)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    backbone: Annotated[str, AfterValidator(one_of(BACKBONE_NAMES))] = "lightgcn"
    """How the graph makes representations: see `components.cllmr.backbones`."""
    embedding_dim: PositiveInt = 64
    """Width of the ID table; representations are as wide, those of "gccf" times `num_layers` + 1. Published results on the
    common benchmarks use 32: always state it."""
    embedding_std: PositiveFloat = 0.1
    """Standard deviation of the ID table's initial values; the published BPR settings' (Xavier) are near 0.01."""
    num_layers: NonNegativeInt = 2
    """Propagation steps; without effect for "mf"."""
    layer_combination: Literal["mean", "sum"] = "mean"
    """How layers become one; RLMRec sums. Without effect for "mf" and "gccf"."""
    edge_keep: Kept = 1.0
    """Share of edges that a training step propagates over, for "lightgcn", "gccf" and "dccf"; RLMRec keeps 0.8."""
    ssl_weight: NonNegativeFloat = 0.1
    """Weight of the backbone's self-supervised loss, for "sgl", "simgcl", "dccf" (published: 1e-3) and "autocf"."""
    ssl_temperature: PositiveFloat = 0.2
    """τ of its InfoNCE, for "sgl", "simgcl" and "dccf"."""
    ssl_candidates: Literal["all", "batch"] = "all"
    """Among whom a node must be found, for "sgl" and "simgcl": all of its kind, as published, or the batch's: cheaper."""
    ssl_edge_keep: Kept = 0.8
    """Share of edges of each of the two views of "sgl"."""
    ssl_noise: NonNegativeFloat = 0.1
    """ε of "simgcl", length of the noise after each layer; rows start at a length of embedding_std √embedding_dim."""
    num_intents: PositiveInt = 128
    """Intents of each side, for "dccf"."""
    mask_seeds: PositiveInt = 100
    """Nodes around which "autocf" hides the graph in a training step."""
    mask_depth: PositiveInt = 2
    """Hops around a seed whose edges "autocf" hides."""
    loss: Literal["softmax", "bpr"] = "softmax"
    """Ranking loss: sampled softmax, or BPR on the inner product (as published)."""
    similarity: Literal["cosine", "inner_product"] = "cosine"
    """Of the softmax loss, and then of the score; "autocf" was published with the inner product. BPR always has that."""
    temperature: PositiveFloat = 0.15
    """τ of the softmax loss; without effect for BPR."""
    num_negatives: PositiveInt = 512
    """Shared negatives per step of the softmax loss; all items where there are fewer. Without effect for BPR."""
    side_encoder: Annotated[str, AfterValidator(one_of(ENCODER_NAMES))] = "sse"
    """What turns text into side representations: see `components.cllmr.encoders`. "none" trains the bare backbone: no side
    information, no gates."""
    spectrum_input: Literal["prior", "concat"] = "prior"
    """Who sees the spectrum: the prior alone, or the encoder too (E5, E6)."""
    spectrum_dropout: Dropped = 0.0
    """Chance that the encoder does not see a node's spectrum in training; without effect but with "concat"."""
    prior_mean: Literal["learned", "zero"] = "learned"
    """Mean of the conditional prior: a linear map of the spectrum, the identity to start with, or zero as in iVAE (E5)."""
    spectrum_noise: NonNegativeFloat = 0.01
    """ε, length of the perturbation of a spectrum row of length 1 (E4)."""
    noise_sign: bool = True
    """Whether the perturbation stays in the row's own orthant (E4)."""
    elbo_weight: NonNegativeFloat = 1e-3
    """λ_sse, weight of the encoder's own loss: for "sse" the negative ELBO (E8)."""
    alignment_weight: NonNegativeFloat = 0.5
    """λ_con, weight of the alignment of text and collaborative representations (E9); with gates 0.03 was better."""
    alignment_temperature: PositiveFloat = 0.2
    """τ of the alignment."""
    max_aligned_nodes: PositiveInt = 1024
    """Users, and items, of a batch that are aligned at most: the cost is quadratic."""
    mask_ratio: Dropped = 0.1
    """Share of nodes whose ID embedding is hidden in a training step, for "generative"."""
    counterfactual: bool = False
    """Whether the gates take part (E11); without them the factual score is the mediator."""
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

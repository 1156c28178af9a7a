"""Counterfactual inference: how much of a score is the side information speaking for itself, and scores without it.

Causal graph, with X the language model's text of an item, T the users' taste, L the log of clicks, M the match, Y the score:

    T ------------------> L ------> M ------> Y
                          ^         ^         ^
                          |         |         |
    X --------------------+---------+---------+
       lures clicks         places    speaks
       (1)                  items (2) directly (3)

An item's text can raise its score without any taste for the item: it lures clicks that enter the log (1), it places the item
near others of the same praise (2), or it enters the score by a gate (3). What of it is wanted is the match with taste. With
X* the text without its propensity (the reference), every formulation answers the same question in its own way:

    TE   = Y(X,  M(X))                       the factual score
    NDE  = what of it X brings with the match with taste switched off
    TNIE = TE - NDE
    y    = TE - λ NDE                        served; λ = 0 is factual, λ = 1 the counterfactual one

Every TE and NDE is an inner product, so every y is (`base.EffectFactors.debiased`), and serving does not know the difference.

    formulation          NDE_ui                          path  the reference
    gates                m*_u g_u g_i                    3     each user's mean match (the paper's, E11-E16)
    text_reference       a_u . map(reference text)       2     generic, or identified, directions of the text
    reference_texts      a_u . map(reference text)       2     what the language model writes without evidence
    lift                 (a_u . v) h(text_i)             1     the score that text-borne popularity brings
    subspace             TE - a model on text without    2     generic, lifted or identified directions of the text
    exposure             spread_u d_i                    1     the exposure that the clicks of taste support
    click_share          share_i TE_ui                   1     clicks of taste
    counterfactual_log   TE - a model on the taste log   1, 2  clicks of taste, text without its direction

The identified ones rest on `click_propensity.estimate`, which tells lured clicks from clicks of taste by the rest of the
clickers' history. `reference_texts` rests on what the language model itself wrote, and takes out the score that it carries, not
the clicks that it lured. The others are kept as what they are compared with.

A new formulation is one file here, which names what it offers. One that takes an item's clicks for its propensity, and its
tests::

    # components/cllmr/effects/popular.py
    '''The direct effect is what an item's clicks bring it whatever the user: NDE_ui = log(1 + n_i).'''

    import numpy as np

    from components.cllmr.effects.base import Effect, EffectFactors, Evidence


    def popular(evidence: Evidence) -> EffectFactors:
        clicks = np.log1p(evidence.train.sum(axis=0)).astype(np.float32)
        users = np.ones((len(evidence.factual.users), 1), dtype=np.float32)
        return EffectFactors(*evidence.factual, users, clicks[:, None])


    FORMULATIONS: dict[str, Effect] = {"popular": popular}

    # tests/contract/test_effects.py
    class TestPopular(EffectContract):
        name = "popular"

Then ``cllmr experiment --suite bias --dataset DIR --set study.formulations=[popular]`` says what of a known propensity it
removes.
"""

from components.cllmr.effects.base import Effect
from components.cllmr.registry import mappings

# click_propensity is what others are made of; gates are heads of a model, and bring torch
EFFECTS: dict[str, Effect] = mappings("effects", "FORMULATIONS", but=("click_propensity", "gates"))
"""Formulations that are fitted to any model whose scores are inner products; `gates` belongs to a model with heads."""

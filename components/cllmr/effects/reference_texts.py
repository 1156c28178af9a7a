"""(a) The reference is what the language model writes when the evidence is withheld: its propensity, in plain text.

Asked about a class of items and about no item in it, the model writes what it would write anyway. The part of an item's text
along the text of its class is therefore not knowledge about the item. It is known from outside: no click has to tell it. The
clicks that it lured are still in the log, so a model that is fitted again without it gives little of the exposure back: what
goes is the score that it carries.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from components.cllmr.effects.base import (
    Effect,
    EffectFactors,
    Evidence,
    FloatArray,
    FloatMatrix,
    centred,
    contrast,
    ridge,
    ridge_map,
    unit_rows,
)
from components.cllmr.effects.text_reference import RIDGE, carried
from components.cllmr.linear.scores import LinearScores
from components.errors import DataError

SMALLEST_REST = 1e-3
"""Of a text's length: float16 embeddings leave as much where text and reference are the same, and that is noise."""


def written_anyway(text: npt.NDArray[np.floating], references: npt.NDArray[np.floating]) -> FloatArray:
    """The part of each text along its own reference: (n, dim).

    Args:
        text: less the mean of all texts, (n, dim).
        references: of each text, less the same mean, (n, dim); a row of zeros where none was written.
    """
    along = unit_rows(references)
    return np.asarray((text * along).sum(axis=1, keepdims=True) * along)


def share_written_anyway(text: npt.NDArray[np.floating], references: npt.NDArray[np.floating]) -> FloatMatrix:
    """How much of each text is along its reference, as a share of its squared length, 0 to 1: (n,). See above."""
    return np.square(written_anyway(unit_rows(text), references)).sum(axis=1).astype(np.float32)


def without_references(text: npt.NDArray[np.floating], references: npt.NDArray[np.floating]) -> FloatMatrix:
    """What each text says beyond its reference, as unit rows; nothing is left of one that is its reference. See above."""
    rest = text - written_anyway(text, references)
    nothing = np.linalg.norm(rest, axis=1) <= SMALLEST_REST * np.linalg.norm(text, axis=1)
    return unit_rows(np.where(nothing[:, None], 0.0, rest)).astype(np.float32)


def reference_texts(evidence: Evidence) -> EffectFactors:
    """The direct effect is the score that what was written anyway carries: NDE_ui = a_u . map(part along the reference)."""
    text = centred(evidence.text)
    return carried(evidence, written_anyway(text, _references(evidence)))


def without_carried(scores: LinearScores, text: npt.NDArray[np.floating], references: npt.NDArray[np.floating]) -> LinearScores:
    """`reference_texts` of a model with weights between items: TE - NDE, where NDE is linear in a_u and in the history.

    b_i and the weights W_ji towards item i are both regressed on the texts; what is predicted from the part along the
    reference goes. Of b_i it is taken out at once. Of W it is a matrix of the rank of the references alone, so W stays as it
    is and as sparse as it is: users and items get as many dimensions more.

    Args:
        scores: TE.
        text: of the items, less the mean of all texts, rows of zeros where there is none, (num_items, dim).
        references: of each text, less the same mean, as in `written_anyway`.
    """
    told = text.astype(np.float64)
    reference = written_anyway(told, references)
    axes = _axes(reference)  # (dim, rank)
    penalty = ridge(told, RIDGE)
    assert isinstance(scores.items, np.ndarray)  # compact ones are in endpoints alone
    items = np.asarray(scores.items - reference @ ridge_map(told, scores.items, penalty), dtype=np.float32)
    # `ridge_map` of W with the reference's axes: W less its rows' means is never made, as it would not be sparse
    means = np.asarray(scores.weights.mean(axis=1))
    moments = scores.weights @ told - np.outer(means, told.sum(axis=0))  # (m, dim)
    carried_by = (moments @ np.linalg.solve(told.T @ told + penalty, axes)).astype(np.float32)
    none = np.zeros((len(carried_by), items.shape[1]), dtype=np.float32)
    return replace(
        scores,
        users=np.hstack([scores.users, scores.history @ carried_by]).astype(np.float32),
        items=np.hstack([items, -(reference @ axes)]).astype(np.float32),
        folds=np.hstack([none, carried_by]),
    )


def _axes(rows: FloatArray) -> FloatArray:
    """An orthonormal basis of the rows' span, (dim, rank)."""
    _, size, axes = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(axes[size > SMALLEST_REST * size.max(initial=0.0)].T)


def refitted(evidence: Evidence) -> EffectFactors:
    """The model is fitted again on what the texts say beyond their references: NDE = TE - Y(text without)."""
    without = without_references(centred(evidence.text), _references(evidence))
    return contrast(evidence.factual, evidence.refit(evidence.train, without))


def _references(evidence: Evidence) -> FloatMatrix:
    if evidence.references is None:
        raise DataError(
            "there are no reference texts: nothing was written with the evidence withheld.",
            "Use another formulation, or texts that an LLM wrote.",
        )
    return evidence.references


FORMULATIONS: dict[str, Effect] = {"reference_texts": reference_texts, "reference_texts_refitted": refitted}

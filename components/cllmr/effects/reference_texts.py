"""(a) The reference is what the language model writes when the evidence is withheld: its propensity, in plain text.

Asked about a class of items and about no item in it, the model writes what it would write anyway. The part of an item's text
along the text of its class is therefore not knowledge about the item. It is known from outside: no click has to tell it.
"""

import numpy as np
import numpy.typing as npt

from components.cllmr.effects.base import Effect, EffectFactors, Evidence, FloatArray, FloatMatrix, centred, contrast, unit_rows
from components.cllmr.effects.text_reference import carried
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


def score(evidence: Evidence) -> EffectFactors:
    """The direct effect is the score that what was written anyway carries: NDE_ui = a_u . map(part along the reference)."""
    text = centred(evidence.text)
    return carried(evidence, written_anyway(text, _references(evidence)))


def reference_texts(evidence: Evidence) -> EffectFactors:
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


FORMULATIONS: dict[str, Effect] = {"reference_texts_score": score, "reference_texts": reference_texts}

"""(d) Directions of the text that carry no taste are projected out, and the model is fitted again: NDE = TE - Y(text without).

As preprocessing, `project_out` can be applied to the texts before anything is trained.
"""

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
from components.cllmr.effects.click_propensity import estimate
from components.cllmr.effects.lift import item_lift

RIDGE = 30.0


def generic_directions(text: npt.NDArray[np.floating], components: int = 1) -> FloatArray:
    """Orthonormal basis of the mean text and the first principal components: (text_dim, 1 + components)."""
    _, _, axes = np.linalg.svd(centred(text), full_matrices=False)
    return _basis(np.column_stack([text.mean(axis=0, dtype=np.float64), axes[:components].T]))


def project_out(text: npt.NDArray[np.floating], directions: npt.NDArray[np.floating]) -> FloatMatrix:
    """Texts (n, text_dim) without their part in the span of `directions` (text_dim, k), with unit rows; zero rows stay zero."""
    basis = _basis(directions)
    return unit_rows(text - text @ basis @ basis.T).astype(np.float32)


def without(evidence: Evidence, directions: npt.NDArray[np.floating]) -> EffectFactors:
    """The effect of what `directions` (text_dim, k) of the text do to the model."""
    return contrast(evidence.factual, evidence.refit(evidence.train, project_out(evidence.text, directions)))


def generic(evidence: Evidence) -> EffectFactors:
    """Without the mean text and the first principal component."""
    return without(evidence, generic_directions(evidence.text))


def lifted(evidence: Evidence) -> EffectFactors:
    """Without the direction of the text that explains how much the text lifts an item's mean score."""
    text = centred(evidence.text)
    return without(evidence, ridge_map(text, item_lift(evidence), ridge(text, RIDGE))[:, None])


def identified(evidence: Evidence) -> EffectFactors:
    """Without the direction along which texts lure clicks."""
    return without(evidence, estimate(evidence.train, evidence.text).direction[:, None])


def _basis(directions: npt.NDArray[np.floating]) -> FloatArray:
    left, singular, _ = np.linalg.svd(np.asarray(directions, dtype=np.float64), full_matrices=False)
    return np.asarray(left[:, singular > 1e-9])


FORMULATIONS: dict[str, Effect] = {"subspace_generic": generic, "subspace_lift": lifted, "subspace": identified}

"""Propensity benchmark: a known propensity of the text is put into real data, and what a debiased model removes is measured.

``inject`` picks a share of the items and makes a language model "praise" them: their text is pulled towards one direction.
Of kind ``inflated``, the praise also brought clicks, from users whose taste the item is not; of kind ``generic`` it did not.
Training and validation carry the propensity, as a real log would; the test interactions are left as they are: taste alone.

``measure`` compares three models of the same kind, by their top ten:

    clean       fitted on the untouched data: what the exposure should be
    inflated    fitted on the injected data
    debiased    fitted on the injected data, with the counterfactual part

    removed     = (inflated - debiased) / (inflated - clean) of the injected items' exposure share, in percent
    clean NDCG  = NDCG@10 on the test interactions with items that were not injected
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.effects.base import Effect, Evidence, Factors, Refit
from components.cllmr.linear.ease import Ease, EaseSettings
from components.errors import ConfigError
from components.evaluate import baselines
from components.evaluate.bias import exposure_share
from components.evaluate.metrics import PRIMARY, IntArray, ScoreBlock, rank
from components.experiment.dataset import unit_rows

FloatMatrix = npt.NDArray[np.float32]
Kind = Literal["inflated", "generic", "none"]
KINDS: tuple[Kind, ...] = ("inflated", "generic", "none")
TOP = 10
SMALLEST = 0.005
"""A smaller induced exposure is noise, and nothing to take a percentage of."""


@dataclass(frozen=True)
class Data:
    """Binary interactions, (num_users, num_items) each, and the items' text."""

    train: sp.csr_array
    validation: sp.csr_array
    test: sp.csr_array
    item_text: FloatMatrix
    """Unit rows, (num_items, dim); a zero row where there is no text."""


@dataclass(frozen=True)
class Injected:
    """Data that carry a known propensity."""

    data: Data
    items: npt.NDArray[np.bool_]
    """Which items were injected, (num_items,)."""
    direction: FloatMatrix
    """The unit direction of the praise, (dim,)."""
    num_lured: int
    """Clicks that were added to training."""


def inject(
    data: Data,
    kind: Kind,
    strength: float,
    seed: int,
    share: float = 0.1,
    lure: float = 4.0,
    direction: npt.NDArray[np.floating] | None = None,
) -> Injected:
    """Puts a propensity of known strength into a random share of the items.

    Args:
        data: the untouched data.
        kind: "inflated" (text and lured clicks), "generic" (text only), "none" (a copy, items chosen all the same).
        strength: length of the praise that is added to an injected item's unit text.
        seed: of the items, the direction and the clicks.
        share: of items to inject, in (0, 1).
        lure: of kind "inflated", expected lured clicks of an injected item at strength 1, in clicks of the mean item (of
            training, of validation); proportional to the strength.
        direction: of the praise, (dim,); by default one drawn with the covariance of the texts themselves, so that praise
            is made of the same words as everything else.

    Raises:
        ConfigError: an argument is out of range.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}, allowed are {', '.join(KINDS)}", "choose one of them")
    if strength < 0 or not 0 < share < 1:
        raise ConfigError(
            f"strength is {strength} and share {share}, allowed are strength >= 0 and 0 < share < 1",
            "change the benchmark's settings",
        )
    rng = np.random.default_rng(seed)
    num_items = len(data.item_text)
    items = np.zeros(num_items, dtype=bool)
    items[rng.choice(num_items, max(1, round(share * num_items)), replace=False)] = True
    if direction is None:
        centred = data.item_text - data.item_text.mean(axis=0)
        direction = rng.normal(size=num_items) @ centred
    praise = (direction / np.linalg.norm(direction)).astype(np.float32)
    if kind == "none":
        return Injected(data, items, praise, 0)
    text = unit_rows(data.item_text + strength * items[:, None] * praise)
    if kind == "generic":
        return Injected(Data(data.train, data.validation, data.test, text), items, praise, 0)
    taken = data.train + data.validation + data.test
    lured = [
        _lured(data, taken, items, lure * strength * split.nnz / num_items, rng) for split in (data.train, data.validation)
    ]
    lured[1] = lured[1] - lured[1].multiply(lured[0])  # a click is in one split
    train, validation = (sp.csr_array(split + extra) for split, extra in zip((data.train, data.validation), lured, strict=True))
    validation.eliminate_zeros()
    return Injected(Data(train, validation, data.test, text), items, praise, lured[0].nnz)


def _lured(
    data: Data, taken: sp.csr_array, items: npt.NDArray[np.bool_], rate: float, rng: np.random.Generator
) -> sp.csr_array:
    """Clicks of users on injected items that match their history less than the median user's: (num_users, num_items), binary.

    A user is lured in proportion to the number of his clicks: an active user sees more.
    """
    train = data.train
    activity = np.diff(train.indptr).astype(np.float64)
    profile = unit_rows(train @ data.item_text)
    rows: list[IntArray] = []
    columns: list[IntArray] = []
    by_item = sp.csc_array(taken)
    for item in np.flatnonzero(items):
        match = profile @ data.item_text[item]
        weight = np.where(match <= np.median(match), activity, 0.0)
        weight[by_item.indices[by_item.indptr[item] : by_item.indptr[item + 1]]] = 0.0
        count = min(int(rng.poisson(rate)), int(np.count_nonzero(weight)))
        chosen = rng.choice(len(weight), count, replace=False, p=weight / weight.sum()) if count else np.empty(0, np.int64)
        rows.append(chosen.astype(np.int64))
        columns.append(np.full(count, item, dtype=np.int64))
    row, column = np.concatenate(rows), np.concatenate(columns)
    return sp.csr_array((np.ones(len(row), dtype=np.float32), (row, column)), shape=train.shape)


@dataclass(frozen=True)
class Removal:
    """What debiasing did; shares in [0, 1]."""

    exposure_clean: float
    exposure_inflated: float
    exposure_debiased: float
    removed_percent: float | None
    """None where the injection induced no exposure that could be removed."""
    ndcg_inflated: float
    """NDCG@10 on clean items before debiasing."""
    ndcg_debiased: float
    ndcg_change_percent: float | None
    """None where it was 0 before."""


def measure(
    clean: ScoreBlock,
    inflated: ScoreBlock,
    debiased: ScoreBlock,
    injected: Injected,
    original: Data,
    smallest: float = SMALLEST,
) -> Removal:
    """Exposure that the injection induced and debiasing removed, and what that cost on the items that were not injected.

    Args:
        clean: scores of a model fitted on `original`.
        inflated, debiased: scores of models fitted on `injected.data`.
        smallest: see `removed_percent`.
    """
    exposure = [
        injected_share(score, train, original.test, injected.items)
        for score, train in (
            (clean, original.train),
            (inflated, injected.data.train),
            (debiased, injected.data.train),
        )
    ]
    on_clean = sp.csr_array(original.test.multiply(~injected.items[None, :]))
    on_clean.eliminate_zeros()
    before, after = (rank(score, injected.data.train, on_clean).mean()[PRIMARY] for score in (inflated, debiased))
    return Removal(
        exposure_clean=exposure[0],
        exposure_inflated=exposure[1],
        exposure_debiased=exposure[2],
        removed_percent=removed_percent(exposure[1] - exposure[0], exposure[2] - exposure[0], smallest),
        ndcg_inflated=before,
        ndcg_debiased=after,
        ndcg_change_percent=100 * (after / before - 1) if before else None,
    )


def injected_share(score: ScoreBlock, seen: sp.csr_array, test: sp.csr_array, items: npt.NDArray[np.bool_]) -> float:
    """Share of the top ten that `items` hold in the lists of the users with test interactions, 0 to 1."""
    return exposure_share(rank(score, seen, test).top_items[:, :TOP], items)


def removed_percent(induced: float, remaining: float, smallest: float = SMALLEST) -> float | None:
    """How much of an induced exposure share is gone where `remaining` of it is left; None where too little was induced."""
    return 100 * (1 - remaining / induced) if induced >= smallest else None


def study(original: Data, injected: Injected, effect: Effect, model: Refit) -> Removal:
    """Fits the clean, the inflated and the debiased model of one kind, and measures them.

    Args:
        effect: a formulation of `components.cllmr.effects.EFFECTS`; λ = 1.
        model: how a model of this kind is fitted, for example `ease`.
    """
    clean = model(original.train, original.item_text)
    factual = model(injected.data.train, injected.data.item_text)
    # a language model that praises does so where it knows nothing too: its reference text is the praise itself
    references = np.broadcast_to(injected.direction, injected.data.item_text.shape)
    found = effect(Evidence(factual, injected.data.train, injected.data.item_text, model, references))
    clean_scores, inflated, debiased = (baselines.Factors(*one).score for one in (clean, factual, found.debiased(1.0)))
    return measure(clean_scores, inflated, debiased, injected, original)


def ease(settings: EaseSettings) -> Refit:
    """EASE with text: a regression learnt from the log, asked with the log's histories (dense factors)."""

    def fit(log: sp.csr_array, text: FloatMatrix) -> Factors:
        return Factors(log.toarray().astype(np.float32), np.ascontiguousarray(Ease(log, text).fit(settings).weights.T))

    return fit

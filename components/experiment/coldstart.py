"""Cold start: items that nobody has chosen yet, ranked among themselves by what is known of their text.

A share of the items is taken out of training for the test, as many others for validation. All their interactions, of whatever
split, become held out; everything that is fitted or tuned sees the warm interactions and the validation items alone. A user's
side of a score comes from the warm training interactions, never from a text of his own, which may tell of cold items.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.linear.analytic import analytic_side_representation
from components.cllmr.linear.ease import centred_unit_rows
from components.cllmr.linear.ensemble import Candidates, Ensemble, Scores, choose_weights
from components.cllmr.linear.factors import side_map
from components.cllmr.linear.kernel import KernelScores
from components.cllmr.linear.words import ItemWords
from components.errors import DataError
from components.evaluate.baselines import Factors, RandomScores, ials
from components.evaluate.metrics import PRIMARY, Ranking, rank
from components.experiment.dataset import ExperimentData, unit_rows
from components.experiment.models import KINDS, Task, Tell, silent
from components.experiment.store import Outcome
from components.spectrum.decompose import inverse, spectrum

IntArray = npt.NDArray[np.int64]
FloatMatrix = npt.NDArray[np.float32]

L2 = (0.1, 1.0, 10.0, 100.0, 1000.0)
RANKS = (16, 32, 64, 128)
NUM_SHARED = (0, 32)
POWERS = (0.0, 1.0)
KERNEL_POWERS = (1.0, 2.0, 3.0, 4.0, 6.0)
WORD_SHARES = (0.3, 0.5)
LABELS = {
    "random": "Random",
    "text_cosine": "Text cosine",
    "text_cosine_centred": "Text cosine, centred",
    "kernel": "Text kernel",
    "words": "Text kernel with the words of the titles",
    "ridge": "Ridge, text to item factor",
    "encoder": "Encoder z (SSE)",
    "analytic": "Analytic SSE (closed form)",
    "combined": "Combined",
}


@dataclass(frozen=True)
class ColdSplit:
    """Warm data and two sets of cold items."""

    warm: ExperimentData
    """No interaction of a cold item in any split, and no text of a user's own; validation as it was, for early stopping."""
    validation_items: IntArray
    """Rows, ascending; disjoint from `test_items`."""
    test_items: IntArray
    held_out: sp.csr_array
    """All interactions of cold items, whatever split they came from, (num_users, num_items)."""

    def rank(self, scores: Scores, items: IntArray) -> Ranking:
        """Ranks `items` among themselves for every user who chose one of them."""
        held_out = sp.csr_array(self.held_out[:, items])
        return rank(lambda users: scores.score(users)[:, items], sp.csr_array(held_out.shape, dtype=np.float32), held_out)


def split(data: ExperimentData, share: float, seed: int) -> ColdSplit:
    """Takes `share` of the items out for the test and as many for validation, at least two of each.

    Drawn by `seed` from the items that have training interactions and text.

    Raises:
        DataError: there are too few.
    """
    known = (np.bincount(data.train.indices, minlength=data.num_items) > 0) & np.array(
        [text is not None for text in data.item_texts]
    )
    what = "items with training interactions and a text"
    validation_items, test_items = halves(data.name, np.flatnonzero(known), what, round(share * data.num_items), seed)
    cold = np.zeros(data.num_items, dtype=bool)
    cold[np.concatenate([validation_items, test_items])] = True

    def only(matrix: sp.csr_array, columns: npt.NDArray[np.bool_]) -> sp.csr_array:
        kept = sp.csr_array(matrix @ sp.diags_array(columns.astype(np.float32)))
        kept.eliminate_zeros()
        return sp.csr_array(kept, dtype=np.float32)

    held_out = only(sp.csr_array(data.train + data.validation + data.test), cold)
    assert data.own_user_text is not None, "texts are embedded before a study"
    warm = replace(
        data,
        **{name: only(getattr(data, name), ~cold) for name in ("train", "validation", "test")},
        own_user_text=0 * data.own_user_text,  # a profile tells of all training items, also those that are cold now
    )
    return ColdSplit(warm, validation_items, test_items, held_out)


def halves(name: str, eligible: IntArray, what: str, size: int, seed: int) -> tuple[IntArray, IntArray]:
    """Draws `size` rows for validation and as many for the test, at least two and at most half of those that are eligible.

    Args:
        name: of the data set.
        what: the eligible rows are, for the error.

    Raises:
        DataError: fewer than four are.
    """
    if len(eligible) < 4:
        raise DataError(
            f"'{name}' has {len(eligible)} {what}: too few for cold start.",
            "At least 4 are needed, half for the test and half for validation: give a larger data set.",
        )
    half = min(max(2, size), len(eligible) // 2)
    drawn = np.random.default_rng(seed).choice(eligible, 2 * half, replace=False)
    return np.sort(drawn[:half]), np.sort(drawn[half:])


Options = dict[str, list[tuple[dict[str, Any], Scores]]]
"""Scorer -> its settings to choose from, each with the scores that it gives."""


def scorers(cold: ColdSplit, graph: Mapping[str, Any], seed: int, tell: Tell = silent) -> Options:
    """Scorer -> its settings to choose from on the validation items; every score is defined for items without interactions."""
    data = cold.warm
    assert data.item_text is not None, "texts are embedded before a study"
    text = centred_unit_rows(data.item_text)
    degree = np.bincount(data.train.indices, minlength=data.num_items)
    found: Options = {
        "random": [({}, RandomScores(seed, data.num_items))],
        "text_cosine": [({}, Factors(data.user_text, data.item_text))],
        "text_cosine_centred": [({}, Factors(centred_unit_rows(np.asarray(data.train @ text, dtype=np.float32)), text))],
    }
    found["kernel"] = [({"power": power}, KernelScores(data.train, text, power)) for power in KERNEL_POWERS]
    words = ItemWords.of(data.item_texts, share=0.0).rows
    found["words"] = [
        ({"power": power, "words": share}, KernelScores(data.train, text, power, words, share))
        for share in WORD_SHARES
        for power in KERNEL_POWERS[1:]
    ]
    task = Task(data, {}, seed)
    factors = ials(task.inputs, factors=64, alpha=10.0, regularization=10.0, iterations=15, seed=seed)
    found["ridge"] = [({"l2": l2}, Factors(factors.users, text @ side_map(factors.items, text, degree, l2))) for l2 in L2]
    fitted = KINDS["graph"].fit(Task(data, dict(graph), seed, tell=tell))
    assert fitted.side is not None, "the study's graph model has a side encoder"
    assert fitted.factors is not None, "a graph model has factors"
    users, items = fitted.factors.users[:, :-1], fitted.side["items"]
    found["encoder"] = [
        ({"user": "collaborative"}, Factors(unit_rows(users), unit_rows(items))),
        ({"user": "side"}, Factors(unit_rows(fitted.side["users"]), unit_rows(items))),
    ]
    found["analytic"] = []
    for size in [size for size in RANKS if size < min(data.train.shape)] or [min(data.train.shape) - 1]:
        place = spectrum(data.train, size)
        for num_shared in NUM_SHARED:
            z = analytic_side_representation(data.item_text, place.items, degree, num_shared=num_shared).astype(np.float32)
            for power in POWERS:  # 1: the matrix that the spectrum is of, rebuilt; 0: large components count more
                users = (place.users * inverse(place.singular_values) ** power).astype(np.float32)
                found["analytic"].append(({"rank": size, "num_shared": num_shared, "power": power}, Factors(users, z)))
    return found


class Chosen(NamedTuple):
    """Of every scorer the settings that were best on validation."""

    scores: dict[str, Scores]
    settings: dict[str, dict[str, Any]]
    validation: dict[str, dict[str, float]]


def choose(options: Options, validated: Callable[[Scores], dict[str, float]]) -> Chosen:
    """The best of every scorer's `options` by the validation metrics of its scores; the first of equally good ones."""
    found = Chosen({}, {}, {})
    for name, tried in options.items():
        values = [validated(scores) for _, scores in tried]
        best = max(range(len(tried)), key=lambda number: values[number][PRIMARY])
        (found.settings[name], found.scores[name]), found.validation[name] = tried[best], values[best]
    return found


def measure(data: ExperimentData, settings: Mapping[str, Any], seed: int, tell: Tell = silent) -> Outcome:
    """Task "coldstart": NDCG@10 and Recall@10 of every scorer on the cold test items, settings chosen on the validation items.

    Args:
        settings: "share" of the items, and "graph", settings of the encoder's graph model.
    """
    cold = split(data, settings["share"], seed)
    options = scorers(cold, settings["graph"], seed, tell)
    chosen, used, validation = choose(options, lambda scores: cold.rank(scores, cold.validation_items).mean())
    parts = [name for name in chosen if name != "random"]
    held_out = sp.csr_array(cold.held_out[:, cold.validation_items])
    nothing = sp.csr_array(held_out.shape, dtype=np.float32)
    restricted = [Restricted(chosen[name], cold.validation_items) for name in parts]
    weights, _ = choose_weights(Candidates.collect(restricted, nothing, held_out))
    used["combined"] = dict(zip(parts, weights, strict=True))
    test = {name: cold.rank(scores, cold.test_items) for name, scores in chosen.items()}
    for split_name, items in (("validation", cold.validation_items), ("test", cold.test_items)):
        joined = Ensemble([Restricted(chosen[name], items) for name in parts], weights)
        held = sp.csr_array(cold.held_out[:, items])
        ranking = rank(joined.score, sp.csr_array(held.shape, dtype=np.float32), held)
        if split_name == "test":
            test["combined"] = ranking
        else:
            validation["combined"] = ranking.mean()
    users = len(test["combined"].users)
    return told(test, used, validation, cold_items=len(cold.test_items), users_evaluated=users)


def told(
    test: Mapping[str, Ranking],
    settings: Mapping[str, Mapping[str, Any]],
    validation: Mapping[str, Mapping[str, float]],
    **counts: int,
) -> Outcome:
    """What a study of cold start says of every scorer: its settings, its validation metrics, and the test's by user."""
    return Outcome(
        {
            **counts,
            "settings": settings,
            "val": validation,
            "test": {name: ranking.mean() for name, ranking in test.items()},
        },
        {f"{name}.{metric}": values for name, ranking in test.items() for metric, values in ranking.per_user.items()},
    )


@dataclass(frozen=True)
class Restricted:
    """Scores of some items alone: the standardisation of an ensemble is then over what is ranked."""

    scores: Scores
    items: IntArray

    def score(self, users: IntArray) -> FloatMatrix:
        """Rows of the users (n,) -> (n, len(items))."""
        return np.asarray(self.scores.score(users)[:, self.items], dtype=np.float32)

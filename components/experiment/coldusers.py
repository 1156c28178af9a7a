"""Cold start: users who have done nothing yet, to whom all items are ranked by what is known of the user's text.

A share of the users is taken out of training for the test, as many others for validation. None of their interactions is
learned from, in any split. What is known of such a user is a text: the user's own, or where there is none the mean of the texts
of the training items, which are shown with the question and hence not ranked. Held out are the rest of the interactions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.cllmr.linear.ease import centred_unit_rows
from components.cllmr.linear.ensemble import Candidates, Ensemble, Scores, choose_weights
from components.cllmr.linear.factors import side_map
from components.cllmr.linear.kernel import KernelScores
from components.evaluate.baselines import Factors, RandomScores, ials, popularity
from components.evaluate.metrics import Ranking, rank
from components.experiment.coldstart import KERNEL_POWERS, L2, Options, choose, halves, told
from components.experiment.dataset import ExperimentData, unit_rows
from components.experiment.models import KINDS, Task, Tell, silent
from components.experiment.store import Outcome

IntArray = npt.NDArray[np.int64]
FloatMatrix = npt.NDArray[np.float32]

LABELS = {
    "random": "Random",
    "popularity": "Popularity",
    "text_cosine": "Text cosine",
    "text_cosine_centred": "Text cosine, centred",
    "kernel": "Text kernel, by the items shown",
    "ridge": "Ridge, text to user factor",
    "encoder": "Encoder z (SSE)",
    "combined": "Combined",
}


@dataclass(frozen=True)
class ColdUsers:
    """Warm data and two sets of cold users."""

    warm: ExperimentData
    """No interaction of a cold user in any split; their texts are among the users' own."""
    shown: sp.csr_array
    """Training interactions of the cold users, which are not ranked, (num_users, num_items)."""
    held_out: sp.csr_array
    """Their other interactions."""
    validation_users: IntArray
    """Rows, ascending; disjoint from `test_users`."""
    test_users: IntArray

    def rank(self, scores: Scores, users: IntArray) -> Ranking:
        """Ranks all items but those shown, for `users`."""
        return rank(lambda rows: scores.score(users[rows]), sp.csr_array(self.shown[users]), sp.csr_array(self.held_out[users]))


def split(data: ExperimentData, share: float, seed: int) -> ColdUsers:
    """Takes `share` of the users out for the test and as many for validation, at least two of each.

    Drawn by `seed` from the users who have a text, and interactions both in training and beyond.

    Raises:
        DataError: there are too few.
    """
    later = sp.csr_array(data.validation + data.test)
    eligible = np.flatnonzero((np.diff(data.train.indptr) > 0) & (np.diff(later.indptr) > 0) & data.user_text.any(axis=1))
    what = "users with a text and interactions beyond training"
    validation_users, test_users = halves(data.name, eligible, what, round(share * data.num_users), seed)
    cold = np.zeros(data.num_users, dtype=bool)
    cold[np.concatenate([validation_users, test_users])] = True

    def only(matrix: sp.csr_array, rows: npt.NDArray[np.bool_]) -> sp.csr_array:
        kept = sp.csr_array(sp.diags_array(rows.astype(np.float32)) @ matrix)
        kept.eliminate_zeros()
        kept.sort_indices()
        return sp.csr_array(kept, dtype=np.float32)

    assert data.own_user_text is not None, "texts are embedded before a study"
    warm = {name: only(getattr(data, name), ~cold) for name in ("train", "validation", "test")}
    own = np.where(cold[:, None], data.user_text, data.own_user_text).astype(np.float32)
    return ColdUsers(
        replace(data, **warm, own_user_text=own),
        only(data.train, cold),
        only(later, cold),
        validation_users,
        test_users,
    )


def scorers(cold: ColdUsers, graph: Mapping[str, Any], seed: int, tell: Tell = silent) -> Options:
    """Scorer -> its settings to choose from on the validation users."""
    data = cold.warm
    assert data.item_text is not None, "texts are embedded before a study"
    items, users = centred_unit_rows(data.item_text), centred_unit_rows(data.user_text)
    task = Task(data, {}, seed)
    factors = ials(task.inputs, factors=64, alpha=10.0, regularization=10.0, iterations=15, seed=seed)
    degree = np.diff(data.train.indptr)
    fitted = KINDS["graph"].fit(Task(data, dict(graph), seed, tell=tell))
    assert fitted.side is not None, "the study's graph model has a side encoder"
    assert fitted.factors is not None, "a graph model has factors"
    z = unit_rows(fitted.side["users"])
    return {
        "random": [({}, RandomScores(seed, data.num_items))],
        "popularity": [({}, popularity(task.inputs))],
        "text_cosine": [({}, Factors(data.user_text, data.item_text))],
        "text_cosine_centred": [({}, Factors(users, items))],
        "kernel": [({"power": power}, KernelScores(cold.shown, items, power)) for power in KERNEL_POWERS],
        "ridge": [({"l2": l2}, Factors(users @ side_map(factors.users, users, degree, l2), factors.items)) for l2 in L2],
        "encoder": [
            ({"item": "collaborative"}, Factors(z, unit_rows(fitted.factors.items[:, :-1]))),
            ({"item": "side"}, Factors(z, unit_rows(fitted.side["items"]))),
        ],
    }


def measure(data: ExperimentData, settings: Mapping[str, Any], seed: int, tell: Tell = silent) -> Outcome:
    """Task "coldusers": metrics of every scorer for the cold test users, settings chosen on the validation users.

    Args:
        settings: "share" of the users, and "graph", settings of the encoder's graph model.
    """
    cold = split(data, settings["share"], seed)
    options = scorers(cold, settings["graph"], seed, tell)
    chosen, used, validation = choose(options, lambda scores: cold.rank(scores, cold.validation_users).mean())
    parts = [name for name in chosen if name != "random"]
    asked = [Asked(chosen[name], cold.validation_users) for name in parts]
    known = [sp.csr_array(matrix[cold.validation_users]) for matrix in (cold.shown, cold.held_out)]
    weights, _ = choose_weights(Candidates.collect(asked, *known))
    used["combined"] = dict(zip(parts, weights, strict=True))
    joined = Ensemble([chosen[name] for name in parts], weights)
    validation["combined"] = cold.rank(joined, cold.validation_users).mean()
    test = {name: cold.rank(scores, cold.test_users) for name, scores in {**chosen, "combined": joined}.items()}
    return told(test, used, validation, cold_users=len(cold.test_users))


@dataclass(frozen=True)
class Asked:
    """Scores for some users alone, by their place among them."""

    scores: Scores
    users: IntArray

    def score(self, rows: IntArray) -> FloatMatrix:
        """Places among the users (n,) -> (n, num_items)."""
        return self.scores.score(self.users[rows])

"""The gate: checks of a challenger, each with its numbers, its threshold and a sentence, and the verdict they give.

A bad model never raises here: it fails a check. What cannot be compared is passed over, and the check's sentence says why.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from safetensors.numpy import load_file

from components.artifacts import Manifest, Store, read_json
from components.errors import ArtifactError, UserError
from components.evaluate import metrics
from components.evaluate.metrics import Bootstrap
from components.ids import TEST, TRAIN, UNKNOWN
from components.ingest.dataset import Dataset
from components.promote.config import PromoteConfig
from components.registry import ModelVersion
from serving.bundle import evaluated_bundle
from serving.scorer import Scorer

Verdict = Literal["promoted", "kept", "unchanged"]
BOOTSTRAP_SAMPLES = 1000
SCORE = "debiased"
"""The score that is served, and so the one that is judged."""


@dataclass(frozen=True)
class Check:
    """One reason of the verdict."""

    check: str
    passed: bool
    challenger: float | None
    """The challenger's figure; None where there is none."""
    champion: float | None
    """The champion's figure on the same users, or what else the challenger is measured against."""
    threshold: float | None
    """What the challenger's figure had to reach, or must not pass."""
    text: str


def verdict(checks: list[Check], is_champion: bool) -> Verdict:
    """``unchanged`` for the champion itself, ``promoted`` when every check is passed, else ``kept``."""
    if is_champion:
        return "unchanged"
    return "promoted" if all(check.passed for check in checks) else "kept"


def run_checks(
    config: PromoteConfig, train: Manifest, evaluate: Manifest, champion: ModelVersion | None, withdrawn_at: str
) -> list[Check]:
    """All checks of a challenger, the cheap and absolute ones first.

    Args:
        config: thresholds.
        train: manifest of the challenger.
        evaluate: manifest of its evaluation.
        champion: the version it wants to replace; None or the challenger itself: the comparison is left out.
        withdrawn_at: when a rollback took the challenger out of service; empty if none did.
    """
    figures = read_json(evaluate.path() / "metrics.json")
    checks = [check_bundle(train), check_withdrawn(withdrawn_at)]
    if config.min_over_popularity > -1:
        checks.append(check_popularity(config, figures["results"]))
    exposure = figures["bias"]["exposure"][SCORE]
    checks += [check_head_exposure(config, exposure), check_coverage(config, exposure)]
    if champion is not None and champion.fingerprint != train.fingerprint:
        checks.append(check_champion(config, evaluate, champion))
    return checks


def check_bundle(train: Manifest) -> Check:
    """The bundle is what its manifest says, can be loaded, and answers its golden requests as recorded."""
    try:
        count = Scorer.load(train.path() / "bundle").replay_golden()
    except UserError as error:
        return Check("bundle", False, None, None, None, f"The bundle cannot be served: {error.message.rstrip('.')}.")
    text = f"The bundle is whole and answers its {count} golden requests as recorded."
    return Check("bundle", True, float(count), None, None, text)


def check_withdrawn(withdrawn_at: str) -> Check:
    """Nobody rolled this very bundle back: a person's decision is not undone by running the pipeline again."""
    if not withdrawn_at:
        return Check("not withdrawn", True, None, None, None, "It was not taken out of service by a rollback.")
    text = f"A rollback took it out of service on {withdrawn_at}; to serve it again: cllmr promote FINGERPRINT."
    return Check("not withdrawn", False, None, None, None, text)


def check_popularity(config: PromoteConfig, results: Mapping[str, Any]) -> Check:
    """It beats the popularity baseline: a personal ranking that does not is not worth serving."""
    name, metric = "better than popularity", config.primary_metric
    challenger = results[SCORE][metric]["mean"]
    if "popularity" not in results:
        text = (
            "The popularity baseline was not evaluated: add it to evaluate.baselines, or set promote.min_over_popularity to -1."
        )
        return Check(name, False, challenger, None, None, text)
    popularity = results["popularity"][metric]["mean"]
    threshold = popularity * (1 + config.min_over_popularity)
    passed = challenger > threshold
    text = f"{metric} is {challenger:.4f}; it must be above {threshold:.4f} (popularity has {popularity:.4f})."
    return Check(name, passed, challenger, popularity, threshold, text)


def check_head_exposure(config: PromoteConfig, exposure: Mapping[str, float]) -> Check:
    """It does not show the head of the catalogue only."""
    share, limit = exposure["head_share"], config.max_head_exposure
    text = f"The most popular 20 % of the items hold {share:.1%} of the top-10 places; at most {limit:.1%} are allowed."
    return Check("head exposure", share <= limit, share, None, limit, text)


def check_coverage(config: PromoteConfig, exposure: Mapping[str, float]) -> Check:
    """It shows enough of the catalogue."""
    share, limit = exposure["coverage"], config.min_coverage
    text = f"{share:.1%} of the items appear in some top 10; at least {limit:.1%} must."
    return Check("coverage", share >= limit, share, None, limit, text)


def check_champion(config: PromoteConfig, evaluate: Manifest, champion: ModelVersion) -> Check:
    """It does not lose more than `max_relative_loss` of the champion's primary metric, on the same users and items."""
    name, metric = "not worse than the champion", config.primary_metric
    try:
        found = compare(metric, evaluate, champion, config.min_common_users)
    except CannotCompare as reason:
        value = float(evaluate.facts[f"{SCORE}.{metric}"])
        text = f"Not compared with champion version {champion.version}: {reason}."
        if config.needs_comparison:
            text += " promote.needs_comparison keeps it back: cllmr promote makes it the champion all the same."
        return Check(name, not config.needs_comparison, value, None, None, text)
    threshold = found.champion * (1 - config.max_relative_loss)
    change = found.challenger / found.champion - 1 if found.champion else 0.0
    text = (
        f"{metric} is {found.challenger:.4f}, champion version {champion.version} has {found.champion:.4f} ({change:+.1%}); "
        f"at least {threshold:.4f} is needed."
    )
    if found.interval is not None:
        low, high = found.interval
        text += f" The difference lies in {low:+.4f} to {high:+.4f} (95 %)."
    text = f"{text} {found.remark}".strip()
    return Check(name, found.challenger >= threshold, found.challenger, found.champion, threshold, text)


class CannotCompare(Exception):
    """Champion and challenger have nothing in common to be compared on; the message is a clause that says why."""


@dataclass(frozen=True)
class Comparison:
    """One metric of both, over the same users."""

    challenger: float
    champion: float
    interval: tuple[float, float] | None
    """95 % interval of challenger - champion, paired over users; None when only the means are known."""
    remark: str = ""


def compare(metric: str, evaluate: Manifest, champion: ModelVersion, min_common_users: float) -> Comparison:
    """The debiased score of both on the data that the challenger was evaluated on.

    The same data: both evaluations are used as they are. Other data: the champion's bundle is scored again on the
    challenger's data, over the users that both know and of whose test interactions the champion has learned none, as another
    split of growing data lets it; items the champion does not know it cannot recommend.

    Raises:
        CannotCompare: the champion's bundle or the data are gone, or too few users are left.
    """
    own = _per_user(evaluate)
    users, values = own["users"], own[f"{SCORE}.{metric}"]
    if champion.tags.get("ingest") == evaluate.parents["ingest"]:
        return _compare_evaluations(metric, users, values, champion)
    rescored_users, rescored = _rescore(metric, evaluate, champion)
    common = np.isin(users, rescored_users)
    if not common.any() or common.mean() < min_common_users:
        raise CannotCompare(
            f"it was evaluated on other data and can be judged for {common.mean():.0%} of these users (the others it does not "
            f"know, or it has learned from what tests them), {min_common_users:.0%} are needed"
        )
    remark = (
        f"The champion was evaluated on other data and is scored again on these, over the {int(common.sum())} users "
        f"({common.mean():.0%}) whom it knows and of whose test interactions it has learned none."
    )
    return _paired(values[common], rescored[np.isin(rescored_users, users)], remark)


def _compare_evaluations(
    metric: str, users: npt.NDArray[np.int64], values: npt.NDArray[np.float64], champion: ModelVersion
) -> Comparison:
    manifest = Store(champion.storage_root).find("evaluate", champion.tags.get("evaluate", ""))
    try:
        theirs = _per_user(manifest) if manifest else None
    except ArtifactError:
        theirs = None  # the recorded means are enough for the verdict, and the sentence then has no interval
    if theirs is not None and np.array_equal(theirs["users"], users):
        return _paired(values, theirs[f"{SCORE}.{metric}"])
    recorded = champion.metrics.get(f"{SCORE}.{metric}")
    if recorded is None:
        raise CannotCompare(f"the registry has no {metric} of it")
    return Comparison(float(values.mean()), recorded, None)


def _rescore(metric: str, evaluate: Manifest, champion: ModelVersion) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows (of the challenger's data) of the users the champion can be judged for, and its metric for each."""
    data = Store(evaluate.storage_root).find("ingest", evaluate.parents["ingest"])
    bundle = Store(champion.storage_root).find("train", champion.fingerprint)
    if data is None or bundle is None:
        gone = "the data set" if data is None else "its bundle"
        raise CannotCompare(f"it was evaluated on other data, and {gone} is no longer in the store")
    try:
        scorer = Scorer.load(evaluated_bundle(bundle))
        dataset = Dataset.load(data.path())
    except UserError as error:
        raise CannotCompare(
            f"it was evaluated on other data, and cannot be scored again: {error.message}".rstrip(".")
        ) from None
    theirs = scorer.user_vocabulary.rows(dataset.users["user_id"])  # (num_users,) rows of the champion, UNKNOWN if none
    items = scorer.item_vocabulary.rows(dataset.items["item_id"])
    known_items = np.flatnonzero(items != UNKNOWN)
    test = dataset.matrix(TEST)
    own_rows = np.full(len(scorer.item_vocabulary), UNKNOWN)  # of the champion's items in the challenger's data
    own_rows[items[known_items]] = known_items
    known_users = np.flatnonzero(theirs != UNKNOWN)
    fair = [not np.isin(own_rows[scorer.seen(theirs[user])], _items(test, user)).any() for user in known_users]

    def score(users: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        scores = np.full((len(users), len(items)), -np.inf, dtype=np.float32)
        scores[:, known_items] = scorer.score_all(theirs[users])[:, items[known_items]]
        return scores

    try:
        ranking = metrics.rank(score, dataset.matrix(TRAIN), test, users=known_users[np.array(fair, dtype=bool)])
    except ValueError:  # nothing to evaluate
        raise CannotCompare("it was evaluated on other data and can be judged for none of these users") from None
    return ranking.users, ranking.per_user[metric]


def _items(matrix: sp.csr_array, row: int) -> npt.NDArray[np.integer]:
    columns: npt.NDArray[np.integer] = matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]
    return columns


def _paired(challenger: npt.NDArray[np.float64], champion: npt.NDArray[np.float64], remark: str = "") -> Comparison:
    (interval,) = Bootstrap(len(challenger), BOOTSTRAP_SAMPLES, seed=0).intervals((challenger - champion)[:, None])
    return Comparison(float(challenger.mean()), float(champion.mean()), interval, remark)


def _per_user(evaluate: Manifest) -> dict[str, npt.NDArray[Any]]:
    return load_file(evaluate.path() / "per_user.safetensors")


def as_json(checks: list[Check]) -> list[dict[str, Any]]:
    """The reasons of verdict.json."""
    return [asdict(check) for check in checks]

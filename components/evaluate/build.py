"""What the evaluate stage does: the bundle's scores and their rivals on held-out interactions, as figures and one page."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from safetensors.numpy import load_file, save_file

from components.artifacts import Manifest, read_json, write_json
from components.cllmr.linear.kernel import KernelScores, NewItems
from components.cllmr.linear.newcomers import CrossFits
from components.cllmr.linear.scores import mixtures
from components.cllmr.linear.words import ItemWords
from components.errors import ArtifactError
from components.evaluate import baselines, bias, collapse, metrics, profiles, summary
from components.evaluate.config import ACTIVITY, LABELS, NEW_USERS, SCORES, EvaluateConfig
from components.evaluate.metrics import METRICS, PRIMARY, Bootstrap, Ranking, ScoreBlock
from components.ids import TEST, TRAIN, VALIDATION
from components.ingest.dataset import Dataset
from components.progress import Progress, emit, progress
from components.sideinfo.evidence import item_groups
from components.sideinfo.reader import reference_embeddings, written_profiles
from serving.bundle import evaluated_bundle
from serving.scorer import Scorer

NEW_ITEMS_SHARE = 0.2
LAMBDAS = tuple(step / 10 for step in range(11))
MAX_SHIFT_USERS = 1000  # the rank shift sorts the whole catalogue for each of them, twice
PROTOCOL = (
    "All items are ranked for every user with held-out items; only training items are masked. Recall@k = hits / held-out "
    "items, NDCG@k is binary with the ideal over min(k, held-out items); means over users. Baselines are fitted on the "
    "training interactions, tuned on validation NDCG@10 and tested once. Intervals: 95 % percentile bootstrap over users, "
    "the same resamples for every model."
)


def build(built: Path, config: EvaluateConfig, ingest: Manifest, sideinfo: Manifest, train: Manifest) -> dict[str, Any]:
    from components.evaluate import report  # matplotlib and jinja2: only when there is something to draw

    dataset = Dataset.load(ingest.path())
    stored = load_file(sideinfo.path() / "embeddings.safetensors")
    text = {name: array.astype(np.float32) for name, array in stored.items()}
    scorer = Scorer.load(evaluated_bundle(train))
    _check_same_vocabulary(scorer, dataset)
    representations = load_file(train.path() / "side_representations.safetensors")
    written = Written(written_profiles(sideinfo.path(), "item"), reference_embeddings(sideinfo.path(), "item"))
    figures, per_user = evaluate(
        config, dataset, text, written, representations["items"], scorer, train.config, sideinfo.facts["llm"]
    )
    figures |= _collapse_report(representations, text)
    figures["summary"] = summary.sentences(figures)
    write_json(built / "metrics.json", figures)
    save_file(per_user, built / "per_user.safetensors")
    page = report.render(
        report.Facts(
            metrics=figures,
            data_card=read_json(ingest.path() / "data_card.json"),
            popularity=scorer.popularity,
            curve=read_json(train.path() / "curve.json"),
            bundle=scorer.bundle,
            training=read_json(train.path() / "training.json"),
            manifests={"ingest": ingest, "sideinfo": sideinfo, "train": train},
            settings=config.identity(),
        )
    )
    (built / "report.html").write_text(page, encoding="utf-8")
    return _facts(figures)


class Written(NamedTuple):
    """What the writer of the profiles said of the items."""

    profiles: list[str]
    """Without the items' own texts, which may be embedded in front of them; "" where there is none."""
    references: npt.NDArray[np.float32] | None
    """See `components.sideinfo.reader.reference_embeddings`."""


def evaluate(
    config: EvaluateConfig,
    dataset: Dataset,
    text: Mapping[str, npt.NDArray[np.float32]],
    written: Written,
    item_side: npt.NDArray[np.float32],
    scorer: Scorer,
    train_config: Mapping[str, Any],
    uses_llm: bool,
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """All figures of metrics.json but those of the representations, and the metrics of each user.

    Args:
        config: of this stage.
        dataset: the interactions.
        text: text embeddings, `users` (num_users, dim) and `items` (num_items, dim), unit rows.
        written: of the items.
        item_side: side representations of the items, (num_items, any), or (num_items, 0) without an encoder.
        scorer: of the bundle.
        train_config: of the train stage, for the bare backbone.
        uses_llm: whether an LLM wrote the profiles.

    Returns:
        The figures; and per-user arrays by "<model>.<metric>", (num_evaluated,), beside `users`, their rows.
    """
    dataset.check_held_out()
    seen, validation, test = (dataset.matrix(split) for split in (TRAIN, VALIDATION, TEST))
    rank = partial(metrics.rank, seen=seen, block_size=config.block_size)
    inputs = baselines.Inputs(seen, validation, text["users"], text["items"], train_config)
    labels = baselines.labels(config.baselines, train_config)
    with progress("evaluate", len(config.baselines) + len(SCORES) + len(LAMBDAS), "rankings") as bar:
        rivals = _rank_rivals(config, inputs, labels, rank, test, bar)
        tested, on_validation = dict(rivals.tested), dict(rivals.on_validation)
        for name in SCORES:
            score = partial(scorer.score_all, effect=name)
            tested[name], on_validation[name] = rank(score, held_out=test), rank(score, held_out=validation)
            bar.advance(model=labels[name])
        new_users = _new_users(config, dataset, text, scorer, rank, test, tested)
        curve = _lambda_curve(scorer, seen, validation, config.block_size, bar)
    tested = {name: tested[name] for name in LABELS if name in tested}  # the order of the result table
    users = tested["debiased"].users
    bootstrap = Bootstrap(len(users), config.bootstrap_samples, config.seed)
    activity = _activity(seen.indptr, users)
    per_user = {f"{name}.{metric}": values for name, found in tested.items() for metric, values in found.per_user.items()}
    figures = {
        "dataset": {
            "name": dataset.name,
            "num_users": dataset.num_users,
            "num_items": dataset.num_items,
            "num_interactions": {TRAIN: int(seen.nnz), VALIDATION: int(validation.nnz), TEST: int(test.nnz)},
        },
        "protocol": PROTOCOL,
        "users_evaluated": len(users),
        "debias_strength": scorer.debias_strength,
        "embedding_dim": int(scorer.bundle["embedding_dim"]),
        "labels": {name: labels[name] for name in [*tested, *rivals.skipped]},
        "results": {name: metrics.summarise(found, bootstrap) for name, found in tested.items()},
        "validation": {name: {key: round(value, 6) for key, value in on_validation[name].mean().items()} for name in tested},
        "comparison": _comparison(tested, bootstrap),
        "slices": {
            group: {"users": int(chosen.sum())}
            | {name: round(float(found.per_user[PRIMARY][chosen].mean()), 6) for name, found in tested.items()}
            for group, chosen in activity.items()
            if chosen.any()
        },
        "baselines_grid": rivals.grids,
        "baselines_skipped": rivals.skipped,
        "bias": _bias_report(config, dataset, text, written, item_side, scorer, tested, seen),
        "lambda_curve": curve,
        "new_users": {name: {key: round(value, 6) for key, value in mean.items()} for name, mean in new_users.items()},
        # an LLM's profile may rest on reviews by those who chose the item, and an item that is new has its own text alone
        "new_items": None if uses_llm else _new_items(config, scorer, text, seen, test),
    }
    return figures, {"users": users, **per_user}


class _Rivals(NamedTuple):
    """What the baselines came to, by name."""

    tested: dict[str, Ranking]
    on_validation: dict[str, Ranking]
    grids: dict[str, Any]
    skipped: dict[str, str]
    """Why those that are left out are."""


def _rank_rivals(
    config: EvaluateConfig,
    inputs: baselines.Inputs,
    labels: Mapping[str, str],
    rank: Callable[..., Ranking],
    test: sp.csr_array,
    bar: Progress,
) -> _Rivals:
    """Tunes every baseline on validation and tests it."""
    found = _Rivals({}, {}, {}, {})
    for name in config.baselines:
        if reason := baselines.skip_reason(name, inputs, config):
            emit("warning", stage="evaluate", message=f"{labels[name]} is left out: {reason}")
            found.skipped[name] = reason
        else:
            tuned = baselines.tune(name, inputs, config, partial(_tell_epoch, bar, labels[name]))
            found.tested[name], found.on_validation[name] = rank(tuned.baseline.score, held_out=test), tuned.validation
            at_edge = sorted(baselines.is_at_edge(tuned))
            found.grids[name] = {"tried": tuned.grid, "best": tuned.settings, "at_edge": at_edge}
        bar.advance(model=labels[name])
    return found


def _new_users(
    config: EvaluateConfig,
    dataset: Dataset,
    text: Mapping[str, npt.NDArray[np.float32]],
    scorer: Scorer,
    rank: Callable[..., Ranking],
    test: sp.csr_array,
    tested: Mapping[str, Ranking],
) -> dict[str, dict[str, float]]:
    """Mean metrics of the ways to answer users who are not in the training data."""
    found = {name: tested[name].mean() for name in NEW_USERS if name in tested}
    found["popularity"] = rank(lambda users: np.repeat(scorer.popular()[None], len(users), axis=0), held_out=test).mean()
    if scorer.folds_in:
        found["fold_in"] = rank(partial(_as_new, scorer), held_out=test).mean()
    if described := scorer.bundle.get("newcomers"):
        texts, strength = text["introductions"][: dataset.num_users], scorer.debias_strength
        models = (("factual", scorer.factual, 1 - strength), ("counterfactual", scorer.counterfactual, strength))
        parts = [
            (np.float32(share), CrossFits(texts, config.seed, model).fit(scorer.popularity_scores[name], **described))
            for name, model, share in models
            if share
        ]
        found["side_information"] = rank(lambda users: sum(w * fit.score(users) for w, fit in parts), held_out=test).mean()
    return found


def _lambda_curve(
    scorer: Scorer, seen: sp.csr_array, validation: sp.csr_array, block_size: int, bar: Progress
) -> list[dict[str, float]]:
    """Validation accuracy and exposure at each debias strength."""
    curve = []
    scores = partial(mixtures, scorer.factual, scorer.counterfactual, LAMBDAS)
    rankings = metrics.rank_several(scores, seen, validation, block_size)
    for debias, ranking in zip(LAMBDAS, rankings, strict=True):
        exposure = bias.exposure_summary(ranking.top_items[:, :10], scorer.popularity)
        curve.append({"debias": debias, PRIMARY: round(ranking.mean()[PRIMARY], 6), **exposure})
        bar.advance(debias=debias)
    return curve


def _bias_report(
    config: EvaluateConfig,
    dataset: Dataset,
    text: Mapping[str, npt.NDArray[np.float32]],
    written: Written,
    item_side: npt.NDArray[np.float32],
    scorer: Scorer,
    tested: Mapping[str, Ranking],
    seen: sp.csr_array,
) -> dict[str, Any]:
    """What the rankings show, by popularity and by propensity, and what debiasing moves."""
    tops = {name: found.top_items[:, :10] for name, found in tested.items()}
    ours: dict[str, npt.NDArray[np.int64]] = {name: tops[name] for name in SCORES}
    factual, debiased = (partial(scorer.score_all, effect=name) for name in SCORES)
    users = _some(tested["debiased"].users)
    return {
        "exposure": {name: bias.exposure_summary(top, scorer.popularity) for name, top in tops.items()},
        "exposure_by_popularity_decile": {name: bias.exposure_by_decile(top, scorer.popularity) for name, top in ours.items()},
        "propensity": bias.propensity_report(
            scorer.propensity, scorer.popularity, text["items"], ours["factual"], ours["debiased"]
        ),
        "profiles": _profiles_report(dataset.only(TRAIN), text["items"], written, item_side, scorer, ours),
        "rank_shift": bias.rank_shift(factual, debiased, seen, users, config.block_size),
    }


def _profiles_report(
    training: Dataset,
    text: npt.NDArray[np.float32],
    written: Written,
    side: npt.NDArray[np.float32],
    scorer: Scorer,
    tops: Mapping[str, npt.NDArray[np.int64]],
) -> dict[str, Any] | None:
    sources, groups = profiles.source_texts(training), list(item_groups(training))
    return profiles.report(written.profiles, sources, groups, text, written.references, side, scorer.popularity, tops)


def _as_new(scorer: Scorer, users: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Scores of the users as if they were not in the training data, from their histories: (n, num_items)."""
    return np.stack([scorer.fold_in(scorer.seen(user)) for user in users.tolist()])


def _new_items(
    config: EvaluateConfig,
    scorer: Scorer,
    text: Mapping[str, npt.NDArray[np.float32]],
    seen: sp.csr_array,
    test: sp.csr_array,
) -> dict[str, Any] | None:
    """A fifth of the items with text and test interactions, ranked among themselves as if nobody had chosen them; None where
    the model scores no new items. They are in no history, nor in the mean of the texts. Users are their histories alone: their
    own texts tell what they chose, the new items included."""
    described = scorer.bundle.get("text")
    eligible = np.flatnonzero((np.diff(test.T.tocsr().indptr) > 0) & text["items"].any(axis=1))
    size = round(NEW_ITEMS_SHARE * len(eligible))
    if described is None or size < 2:
        return None
    new = np.sort(np.random.default_rng(config.seed).choice(eligible, size, replace=False))
    is_new = np.isin(np.arange(seen.shape[1]), new)
    words = None
    if described.get("words"):
        told = (None if one else profile for profile, one in zip(scorer.profiles, is_new.tolist(), strict=True))
        words = ItemWords.of(told, described["words"])
    known = NewItems.of(np.where(is_new[:, None], 0.0, text["items"]), float(described["power"]), words)
    asked = known.rows(text["items"], scorer.profiles)
    side = np.where(is_new[:, None], asked.side, known.side)
    histories = sp.csr_array(seen @ sp.diags_array((~is_new).astype(np.float32)), dtype=np.float32)
    counts = scorer.popularity[:, None].astype(np.float32)
    scores: dict[str, ScoreBlock] = {
        "text_kernel": partial(KernelScores(histories, side, known.power, asked.words, asked.share).score, items=new),
        # but for the length of a user's mean: it ranks the same
        "text_cosine": baselines.Factors(histories @ side, side[new]).score,
        "popularity": baselines.Factors(np.ones((seen.shape[0], 1), np.float32), counts[new]).score,
    }
    held_out = sp.csr_array(test[:, new])
    nothing = sp.csr_array(held_out.shape, dtype=np.float32)

    def mean(score: ScoreBlock) -> dict[str, float]:
        ranking = metrics.rank(score, nothing, held_out, config.block_size)
        return {key: round(value, 6) for key, value in ranking.mean().items()}

    return {
        "items": len(new),
        "users": int((np.diff(held_out.indptr) > 0).sum()),
        "results": {name: mean(score) for name, score in scores.items()},
    }


def _tell_epoch(bar: Progress, model: str, **figures: Any) -> None:
    """Shows how far the training of a baseline is; the bar counts models, so it does not move."""
    bar.advance(0, model=model, **figures)


def _check_same_vocabulary(scorer: Scorer, dataset: Dataset) -> None:
    seen = (scorer.num_users, scorer.num_items)
    expected = (dataset.num_users, dataset.num_items)
    same_items = scorer.item_vocabulary.ids == dataset.items["item_id"].tolist()
    if seen != expected or not same_items or scorer.user_vocabulary.ids != dataset.users["user_id"].tolist():
        raise ArtifactError(
            f"the bundle's users and items {seen} are not those of data set '{dataset.name}' {expected}.",
            "Train on these data first: cllmr run --from train",
        )


def _comparison(tested: Mapping[str, Ranking], bootstrap: Bootstrap) -> dict[str, Any]:
    """The debiased score against its strongest rival on test (hard on us on purpose) and against its own variants."""
    rivals = [name for name in tested if name not in SCORES]
    strongest = max(rivals, key=lambda name: tested[name].mean()[PRIMARY], default=None)
    against = [name for name in tested if name in ("factual", "lightgcn", strongest)]
    debiased = tested["debiased"].per_user
    return {
        "strongest_baseline": strongest,
        "debiased_minus": {name: metrics.paired_difference(debiased, tested[name].per_user, bootstrap) for name in against},
    }


def _activity(indptr: npt.NDArray[np.integer], users: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.bool_]]:
    """Evaluated users in three groups of nearly equal size by their number of training interactions, ties by row."""
    order = np.argsort(np.diff(indptr)[users], kind="stable")
    third = np.empty(len(users), dtype=np.int64)
    third[order] = np.arange(len(users)) * 3 // len(users)
    return {name: third == number for number, name in enumerate(ACTIVITY)}


def _some(users: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """At most MAX_SHIFT_USERS of `users`, evenly spaced."""
    step = -(-len(users) // MAX_SHIFT_USERS)
    return users[::step]


def _collapse_report(
    representations: Mapping[str, npt.NDArray[np.float32]], text: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, Any]:
    """Of the users and items that have a text: others are zero, or what the model learnt to stand for a text."""
    told = {side: text[side].any(axis=1) for side in ("users", "items")}
    found = collapse.collapse(
        {
            f"{name}_{side}": rows[side][told[side]]
            for name, rows in (("side", representations), ("text", text))
            for side in told
        }
    )
    return {
        "effective_rank": {name: {key: value[key] for key in ("effective_rank", "dim")} for name, value in found.items()},
        "singular_values": {name: value["singular_values"] for name, value in found.items()},
    }


def _facts(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The main figures, flat, as the manifest carries them."""
    facts: dict[str, Any] = {
        f"{name}.{metric}": figures["results"][name][metric]["mean"] for name in figures["results"] for metric in METRICS
    }
    for name, value in figures["effective_rank"].items():
        facts[f"effective_rank.{name}"] = value["effective_rank"]
    for name in SCORES:
        for figure, value in figures["bias"]["exposure"][name].items():
            facts[f"{name}.{figure}"] = value
    facts["users_evaluated"] = figures["users_evaluated"]
    facts["debias_strength"] = figures["debias_strength"]
    facts["strongest_baseline"] = figures["comparison"]["strongest_baseline"]
    return facts

"""What the endpoint counts and times; Ray exports it for Prometheus, as ``ray_<name>``, counters with ``_total`` behind.

Ray Serve adds the labels deployment, replica and application. Ours are routes, stages, reasons and model versions: never a
user, an item or a text.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from opentelemetry import trace
from ray.serve.metrics import Counter, Histogram

from components.ids import Vocabulary
from serving.features import Age
from serving.gauges import LastingGauge
from serving.schemas import ExplainResponse, ItemsResponse, RecommendResponse, ScoreResponse

if TYPE_CHECKING:
    from serving.approximate import Exactness
    from serving.lifecycle import Target

_LATENCY_MS = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
_OVERLAPS = ("storage", "index", "lists")


def _tags_of(target: "Target") -> dict[str, str]:
    return {"model_version": target.model_version, "fingerprint": target.fingerprint}


def _labels(*names: str) -> Any:
    return names  # Serve's types say a tuple of one


class Mean:
    """Numbers, 0 or more, whose mean is wanted: two counters, ``<name>_sum`` by ``<name>_count``.

    No histogram: Ray makes a histogram's sum of the middles of its buckets, so that ones count as a half where 0 and 1 are the
    bounds. A counter is not raised by 0, so while there were zeros alone the sum is not there, and is to be read as 0.

    Args:
        name: of the metric, as of the others.
        description: of one number.
        tag_keys: see Ray.
    """

    def __init__(self, name: str, description: str, tag_keys: Any = ()) -> None:
        self.sum = Counter(f"{name}_sum", description=f"{description} Sum; by the count it is the mean.", tag_keys=tag_keys)
        self.count = Counter(f"{name}_count", description=f"{description} How many.", tag_keys=tag_keys)

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Counts a number."""
        if value:
            self.sum.inc(value, tags=dict(tags or {}))
        self.count.inc(tags=dict(tags or {}))


class StageTimer:
    """Milliseconds that requests spend in one stage, by route."""

    def __init__(self) -> None:
        self.latency = Histogram(
            "cllmr_stage_latency_ms",
            description="Time of a request in one stage: features (look-up), scorer (asked over its handle), encoder "
            "(likewise), model (the scorer's own work).",
            boundaries=_LATENCY_MS,
            tag_keys=_labels("route", "stage"),  # Serve fills in the route
        )

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times a block that ends without an error; a span of the request's trace, where it has one."""
        started = perf_counter()
        if trace.get_current_span() is trace.INVALID_SPAN:  # not traced: a span of nothing costs as much as a look-up
            yield
        else:
            with trace.get_tracer("cllmr").start_as_current_span(stage):
                yield
        self.latency.observe(1000 * (perf_counter() - started), tags={"stage": stage})


class GatewayMetrics:
    """Of a gateway replica."""

    def __init__(self) -> None:
        self.timed = StageTimer()
        self.degraded = Counter(
            "cllmr_degraded_answers",
            description="Answers given without the feature store, or without a scorer, by reason.",
            tag_keys=_labels("reason"),
        )
        self.refused = Counter(
            "cllmr_refused_requests",
            description="Requests refused with 503, as the gateway worked on as many as it takes on.",
        )
        self.room = LastingGauge(
            "cllmr_gateway_room",
            description="Requests that the gateway takes on at a time: fewer while some are refused and the others wait.",
        )
        self.last_good_histories = Counter(
            "cllmr_last_good_histories",
            description="Users whose history is the one last seen, as the feature store does not answer.",
        )
        self.features_circuit_open = LastingGauge(
            "cllmr_features_circuit_open",
            description="1 while the feature store is left alone after failures in a row, else 0.",
        )
        self.feature_rows = Counter(
            "cllmr_feature_rows",
            description="Rows looked up, by age: fresh (or without timestamps), stale (older than the view's ttl), missing.",
            tag_keys=_labels("view", "age"),
        )
        self.circuit(False)

    def circuit(self, is_open: bool) -> None:
        """See serving.features.Told."""
        self.features_circuit_open.set(int(is_open))

    def last_good(self, users: int) -> None:
        """See serving.features.Told."""
        self.last_good_histories.inc(users)

    def count_ages(self, view: str, ages: collections.Counter[Age]) -> None:
        """Counts rows that were looked up."""
        for age, number in ages.items():
            self.feature_rows.inc(number, tags={"view": view, "age": age})

    def count_degraded(self, reason: str | None) -> None:
        """Counts an answer that had to do without something."""
        if reason is not None:
            self.degraded.inc(tags={"reason": reason})


class ScorerMetrics:
    """Of a scorer replica; told by `serving.lifecycle` which model it serves."""

    def __init__(self) -> None:
        self.timed = StageTimer()
        self.batch_size = Mean("cllmr_batch_size", description="Requests that were ranked together.")
        self.answers = Counter(
            "cllmr_answers",
            description="Users answered, by how their ranking was made and why it is not personalised.",
            tag_keys=_labels("model_version", "method", "reason"),
        )
        self.unknown_ids = Counter(
            "cllmr_unknown_ids",
            description="Users asked for, and items to score, explain or of events, that the model does not know.",
            tag_keys=_labels("model_version", "kind"),
        )
        self.refused_profiles = Counter(
            "cllmr_refused_profiles",
            description="Users whose side information was not used, as it is of another feature set than the model's.",
            tag_keys=_labels("model_version"),
        )
        self.debias_strength = Mean(
            "cllmr_debias_strength",
            description="Debias strength of answers.",
            tag_keys=_labels("model_version"),
        )
        self.recommended_items = Counter(
            "cllmr_recommended_items",
            description="Places of rankings given to the most popular fifth of the items (head) and to the others (tail).",
            tag_keys=_labels("model_version", "group"),
        )
        self.new_items = Counter(
            "cllmr_new_items",
            description="Items scored from their text, as the model does not know them.",
            tag_keys=_labels("model_version"),
        )
        self.model_info = LastingGauge(
            "cllmr_model_info",
            description="1 for the model that a replica answers with, for some seconds 0 for the one before.",
            tag_keys=_labels("model_version", "fingerprint"),
        )
        self.challenger_info = LastingGauge(
            "cllmr_challenger_info",
            description="1 for the challenger that a replica tries, for some seconds 0 for the one before.",
            tag_keys=_labels("model_version", "fingerprint"),
        )
        self.shadow_overlap = Mean(
            "cllmr_shadow_overlap",
            description="Share of a ranking's items that the challenger ranks as high, by the challenger's version.",
            tag_keys=_labels("model_version"),
        )
        self.shadow_score_difference = Mean(
            "cllmr_shadow_score_difference",
            description="How far scores of items in both rankings lie apart, mean of a user, in standard deviations; only of "
            "users whom both models rank as personalised, both by folding in, or both by popularity.",
            tag_keys=_labels("model_version"),
        )
        self.shadow_left_out = Counter(
            "cllmr_shadow_left_out",
            description="Requests that a challenger on trial had no part in: too many comparisons waited, or its items do not "
            "have what was filtered by.",
            tag_keys=_labels("model_version"),
        )
        self.overlap = LastingGauge(
            "cllmr_ranking_overlap",
            description="Share of the twenty best items that compact item vectors keep (storage) and that the approximate "
            "index finds (index), measured when the model was loaded; 1 where neither is used. For some seconds 0 for "
            "the model before.",
            tag_keys=_labels("model_version", "by"),
        )
        self.off_champion = LastingGauge(
            "cllmr_off_champion", description="1 where a replica serves another model than the registry's champion, else 0."
        )
        self.swaps = Counter("cllmr_model_swaps", description="Models that a running replica has taken over.")
        self.refused_bundles = Counter(
            "cllmr_refused_bundles",
            description="Bundles that a replica could not load or whose golden requests it answered otherwise.",
            tag_keys=_labels("model_version"),
        )

    def swapped(self, before: "Target | None", now: "Target") -> None:
        """See serving.lifecycle.Events."""
        if before is not None:
            self.model_info.end(_tags_of(before))
            self.swaps.inc()
            if before.model_version != now.model_version:
                for by in _OVERLAPS:
                    self.overlap.end({"model_version": before.model_version, "by": by})
        self.model_info.set(1, _tags_of(now))

    def measured(self, target: "Target", exactness: "Exactness") -> None:
        """See serving.lifecycle.Events."""
        index = exactness.ann_recall if exactness.ann == "on" else None
        lists = exactness.lists_recall if exactness.lists == "on" else None
        for by, share in zip(_OVERLAPS, (exactness.storage_overlap, index, lists), strict=True):
            self.overlap.set(1.0 if share is None else share, tags={"model_version": target.model_version, "by": by})

    def refused(self, target: "Target") -> None:
        """See serving.lifecycle.Events."""
        self.refused_bundles.inc(tags={"model_version": target.model_version})

    def tried(self, before: "Target | None", now: "Target | None") -> None:
        """See serving.lifecycle.Events."""
        if before is not None:
            self.challenger_info.end(_tags_of(before))
        if now is not None:
            self.challenger_info.set(1, _tags_of(now))

    def compared(self, model_version: str, overlap: float, difference: float | None) -> None:
        """See serving.trial.Told."""
        tags = {"model_version": model_version}
        self.shadow_overlap.observe(overlap, tags=tags)
        if difference is not None:
            self.shadow_score_difference.observe(difference, tags=tags)

    def left_out(self, model_version: str) -> None:
        """See serving.trial.Told."""
        self.shadow_left_out.inc(tags={"model_version": model_version})

    def settled(self, on_champion: bool) -> None:
        """See serving.lifecycle.Events."""
        self.off_champion.set(0 if on_champion else 1)

    def profiles_refused(self, users: int, model_version: str) -> None:
        """Counts users whose side information a model does not understand."""
        if users:
            self.refused_profiles.inc(users, tags={"model_version": model_version})

    def recommended(self, answers: Sequence[RecommendResponse], items: Vocabulary, head: npt.NDArray[np.bool_]) -> None:
        """Counts rankings of one model, of items with these rows; at once, as one by one took a third of the ranking."""
        version = {"model_version": answers[0].model_version}
        results = [result for answer in answers for result in answer.results]
        for (method, reason), number in collections.Counter((result.method, result.reason) for result in results).items():
            self.answers.inc(number, tags={**version, "method": method, "reason": reason or "none"})
        self._unknown("user", sum(result.cold for result in results), version)
        rows = items.rows([item.item_id for result in results for item in result.items])
        in_head = int(head[rows].sum())
        for group, places in (("head", in_head), ("tail", len(rows) - in_head)):
            if places:
                self.recommended_items.inc(places, tags={**version, "group": group})
        for answer in answers:
            self.debias_strength.observe(answer.debias, tags=version)

    def scored(self, answer: ScoreResponse) -> None:
        """Counts scores of given items."""
        version = {"model_version": answer.model_version}
        self._unknown("user", int(answer.cold), version)
        self._unknown("item", len(answer.unknown_items), version)
        self.debias_strength.observe(answer.debias, tags=version)

    def explained(self, answer: ExplainResponse) -> None:
        """Counts an explanation."""
        version = {"model_version": answer.model_version}
        self._unknown("user", int(answer.cold), version)
        self._unknown("item", int(answer.title is None), version)
        self.debias_strength.observe(answer.debias, tags=version)

    def new_items_scored(self, answer: ItemsResponse) -> None:
        """Counts new items."""
        self.new_items.inc(len(answer.results), tags={"model_version": answer.model_version})

    def told(self, unknown_items: int, model_version: str) -> None:
        """Counts unknown items of events."""
        self._unknown("item", unknown_items, {"model_version": model_version})

    def _unknown(self, kind: str, number: int, version: dict[str, str]) -> None:
        if number:
            self.unknown_ids.inc(number, tags={**version, "kind": kind})


class HistoryMetrics:
    """Of the replica that writes the online history."""

    def __init__(self) -> None:
        self.events = Counter(
            "cllmr_events",
            description="Events of users, by what became of them: stored, duplicate, too_old, in_the_future, or failed.",
            tag_keys=_labels("status"),
        )

    def count(self, statuses: Iterable[str]) -> None:
        """Counts events."""
        for status, number in collections.Counter(statuses).items():
            self.events.inc(number, tags={"status": status})


class RegistryMetrics:
    """Of the replica that asks the registry."""

    def __init__(self) -> None:
        self.registry_up = LastingGauge(
            "cllmr_registry_up", description="1 if the model registry answered when last asked, else 0."
        )


class LogMetrics:
    """Of every replica."""

    def __init__(self) -> None:
        self.lost = Counter("cllmr_lost_log_lines", description="Log lines that could not be written, as on a full disk.")

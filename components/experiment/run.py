"""Runs experiments: units of work that are kept by content, here or on Ray, and what they say when put together.

A unit is one model, one seed, one data set (or one such piece of a study). Its outcome is a file named by the hash of all that
decides it, so that a killed run goes on with what is missing, and two experiments share what they have in common.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import ConfigError, DataError, UserError
from components.evaluate.metrics import METRICS
from components.experiment import statistics
from components.experiment.code import CODE
from components.experiment.config import LABELS, ExperimentConfig, ModelSpec, refuse_twins
from components.experiment.dataset import ExperimentData, read
from components.experiment.models import KINDS, check, silent, skip_reason
from components.experiment.store import Outcome, Results
from components.experiment.tasks import TASKS
from components.memory import peak_memory
from components.sideinfo.config import SideinfoConfig
from components.stages import Stage, fingerprint

STAGE = Stage("experiment", version=9)
"""Its version is part of what a finished unit is: another one where figures change though `CODE` does not."""
METRICS_ARE = "Recall@k = hits / held-out items, NDCG@k is binary with the ideal over min(k, held-out items); means over users."
RANKING = f"All items are ranked for every user with held-out items; only training items are masked. {METRICS_ARE}"
PAIRED = "Paired tests: per user, averaged over seeds, two-sided."
PROTOCOL = (
    f"{RANKING} Every model is fitted on the training interactions, tuned on validation NDCG@10 with the first seed, and ranks "
    "the test interactions with the chosen settings only. What the recipe joins its members with and how strongly a model is "
    f"debiased are chosen on validation with every seed. {PAIRED}"
)
"""Of the comparison; studies have their own."""
Tell = Callable[[Mapping[str, Any]], None]


class Progress:
    """Counts work and tells it as an event that the command line draws."""

    def __init__(self, tell: Tell, total: int, unit: str) -> None:
        self._tell, self.total, self.unit, self.done = tell, total, unit, 0

    def advance(self, data: str, model: str, count: int = 1, /, **figures: Any) -> None:
        """`count` more units are done; which data set and model it is about, and the figures of a fit that goes on."""
        self.done += count
        event = {"event": "progress", "stage": "experiment", "done": self.done, "total": self.total, "unit": self.unit}
        about = {"data": data, "model": model}
        self._tell({**about, **figures, **event, **about})  # figures may have settings of any name


@dataclass(frozen=True)
class Source:
    """Where a worker finds a data set, and which one it is."""

    name: str
    path: str
    fingerprint: str
    encoder: str
    encoder_identity: str
    """Version of the encoder, or hash of its files, as the cache of embeddings knows it: a folder may be written anew."""
    work: str

    @classmethod
    def open(cls, path: str | Path, encoder: str, work: str | Path, tell: Tell = lambda event: None) -> "Source":
        """Reads and embeds the data set once, so that workers find the embeddings.

        Raises:
            DataError: it cannot be used.
            ConfigError: the encoder cannot be loaded.
        """
        data = read(path)
        if data.identifiers:
            fields = ", ".join(f"'{name}'" for name in data.identifiers)
            message = f"'{data.name}': no text has {fields}, whose values look like identifiers"
            tell({"event": "warning", "stage": "experiment", "message": message})
        absolute = str(Path(path).resolve())
        identity = SideinfoConfig(encoder=encoder).identity()["encoder"]
        source = cls(data.name, absolute, data.fingerprint(), encoder, identity, str(Path(work).resolve()))
        told = sum(text is not None for text in (*data.item_texts, *data.user_texts))
        texts = Progress(tell, told, "texts")
        data.embedded(
            encoder, Path(source.work) / "embeddings", lambda count: texts.advance(data.name, "embedding texts", count)
        )
        return source


@lru_cache(maxsize=2)
def load(source: Source) -> ExperimentData:
    """The data set with embeddings.

    Raises:
        DataError: it is not what was opened.
    """
    data = read(source.path)
    if (seen := data.fingerprint()) != source.fingerprint:
        raise DataError(
            f"'{source.path}' changed since the run began: its fingerprint was {source.fingerprint} and is {seen}.",
            "Start the run again, and leave the data as they are until it ends.",
        )
    return data.embedded(source.encoder, Path(source.work) / "embeddings")


@dataclass(frozen=True)
class Unit:
    """One piece of work."""

    source: Source
    task: str
    """Name in `TASKS`."""
    settings: Mapping[str, Any]
    """What the task needs, as JSON knows it."""
    seed: int
    label: str
    """For people; not part of what the unit is."""

    @property
    def key(self) -> str:
        """Name of the outcome."""
        identity = {"task": self.task, "settings": self.settings, "seed": self.seed, "encoder": self.source.encoder_identity}
        return fingerprint(STAGE, {**identity, "code": CODE}, {"dataset": self.source.fingerprint})


def execute(unit: Unit, tell: Callable[..., None] = silent) -> Outcome:
    """Does the work of one unit; the outcome's facts hold seconds, CPU seconds and peak memory (MiB) as well.

    Args:
        tell: told the figures of a fit while it goes on.
    """
    data = load(unit.source)
    started, cpu = time.monotonic(), time.process_time()
    with peak_memory() as memory, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")  # torch's, once per process; nothing to do about it
        outcome = TASKS[unit.task](data, unit.settings, unit.seed, tell)
        measured = {
            "seconds": round(time.monotonic() - started, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "peak_memory_mb": memory(),
        }
    return Outcome({**outcome.facts, **measured}, outcome.arrays)


class Runner:
    """Does the units that are not done yet, in this process or on Ray's workers, and tells how far it is.

    Args:
        environment: what is measured with, as section -> name -> value; kept with every unit that is done.
    """

    def __init__(
        self,
        results: Results,
        parallel: int = 1,
        tell: Tell = lambda event: None,
        environment: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.results, self.parallel, self._environment = results, parallel, environment or {}
        self._environments: list[Mapping[str, Mapping[str, Any]]] = []
        self._progress = Progress(tell, 0, "units")
        self.executed: list[str] = []
        """Keys of the units that were done by this runner, not found."""

    @contextmanager
    def workers(self) -> Iterator["Runner"]:
        """Ray for the length of the block when more than one unit may run at once."""
        if self.parallel == 1:
            yield self
            return
        from components.local_ray import ray_session

        with ray_session(self.parallel):
            yield self

    def run(self, units: Sequence[Unit]) -> list[Outcome]:
        """Outcomes of all units, in their order.

        Raises:
            UserError: what a unit finds wrong with settings or data; units that were done stay done.
        """
        found = {unit.key: self.results.find(unit.key) for unit in units}
        missing = list({unit.key: unit for unit in units if found[unit.key] is None}.values())
        self._progress.total += len(missing)
        for unit, done in self._on_ray(missing) if self.parallel > 1 else self._here(missing):
            found[unit.key] = self._keep(unit, done)
            self._progress.advance(unit.source.name, unit.label)
        return self._noted([outcome for unit in units if (outcome := found[unit.key]) is not None])

    def search(self, searches: Sequence[Unit]) -> list[Outcome]:
        """Outcomes of units of task "search": the whole grid of a model, fits beside each other on Ray's workers.

        Raises:
            UserError: what a fit finds wrong with settings or data; searches that were done stay done.
        """
        from components.experiment.search import search
        from components.local_ray import ray_session

        missing = [unit for unit in searches if self.results.find(unit.key) is None]
        with ray_session(1) if missing and self.parallel == 1 else nullcontext():
            for unit in missing:
                spec = ModelSpec.model_validate({"name": "model", **unit.settings["spec"]})
                self._progress.total += math.prod(len(values) for values in spec.grid.values())
                advance = partial(self._progress.advance, unit.source.name, unit.label)
                best, tried = search(partial(load, unit.source), spec, unit.seed, self.parallel, advance)
                self._keep(unit, Outcome({"settings": best, "tried": tried}, {}))
        return self._noted([outcome for unit in searches if (outcome := self.results.find(unit.key)) is not None])

    def measured_with(self) -> dict[str, dict[str, Any]]:
        """The environment of all outcomes so far, also of those that were found; values that differ stand beside each other."""
        told: dict[str, dict[str, Any]] = {section: {} for section in self._environment}
        for section, known in told.items():
            for name in dict.fromkeys(name for one in self._environments for name in one[section]):
                values = list(dict.fromkeys(one[section][name] for one in self._environments if name in one[section]))
                known[name] = values[0] if len(values) == 1 else " and ".join(map(str, values))
        return told

    def _keep(self, unit: Unit, outcome: Outcome) -> Outcome:
        kept = Outcome({**outcome.facts, "environment": self._environment}, outcome.arrays)
        self.results.keep(unit.key, kept)
        self.executed.append(unit.key)
        return kept

    def _noted(self, outcomes: list[Outcome]) -> list[Outcome]:
        self._environments += [one.facts["environment"] for one in outcomes]
        return outcomes

    def _here(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Outcome]]:
        for unit in units:
            tell = partial(self._progress.advance, unit.source.name, unit.label, 0)
            tell()
            yield unit, execute(unit, tell)

    def _on_ray(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Outcome]]:
        import ray

        # one core a unit: threads of units beside each other would only fight
        remote = ray.remote(num_cpus=1, max_retries=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})(_execute_told)
        pending = {remote.remote(unit): unit for unit in units}
        while pending:
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            unit = pending.pop(ready)
            outcome = ray.get(ready)
            if isinstance(outcome, UserError):
                for other in pending:
                    ray.cancel(other)
                raise outcome
            yield unit, outcome


def _execute_told(unit: Unit) -> Outcome | UserError:
    """`execute` with the user's mistakes as a value: Ray wraps what is raised."""
    try:
        return execute(unit)
    except UserError as error:
        return error


# -- models over seeds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One model on one data set over all seeds."""

    spec: ModelSpec
    outcomes: list[Outcome]
    """Of each seed; one for a model without chance."""
    num_seeds: int

    def per_user(self, split: str) -> dict[str, Any]:
        """Metric -> value of each user, averaged over seeds."""
        return statistics.means([{name: one.arrays[f"{split}.{name}"] for name in METRICS} for one in self.outcomes])

    def summary(self) -> dict[str, Any]:
        """What a result says of a model."""
        facts = [one.facts for one in self.outcomes]
        repeat = self.num_seeds if len(facts) == 1 else 1  # without chance every seed gives the same
        first = facts[0]
        told = {"effective_rank": "effective_rank", "bias": "bias"}
        return {
            "label": label_of(self.spec.name),
            "kind": self.spec.kind,
            "settings": first["chosen"]["inner"] or first["chosen"]["settings"],
            "tried": first.get("members_tried") or first["tried"],
            **{
                split: {name: statistics.spread([one[split][name] for one in facts] * repeat) for name in METRICS}
                for split in ("val", "test")
            },
            "seconds": round(sum(one["seconds"] for one in facts), 3),
            "cpu_seconds": round(sum(one["cpu_seconds"] for one in facts), 3),
            "seconds_per_seed": [one["seconds"] for one in facts],
            "peak_memory_mb": max(one["peak_memory_mb"] for one in facts),
            "dim": first.get("dim"),
            **({"effect": first["effect"]} if "effect" in first else {}),
            **{key: _averaged([one[name] for one in facts]) for key, name in told.items() if first.get(name)},
            **{
                f"{name}_per_seed": [one[name] for one in facts]
                for name in ("weights", "debias", "best_epoch", "members_validation", "members_left_out")
                if name in first
            },
        }


def _averaged(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([row[name] for row in rows])), 6) for name in rows[0]}


def label_of(name: str) -> str:
    """A model's name as people read it."""
    return LABELS.get(name, name)


def measure_models(
    source: Source, specs: Sequence[ModelSpec], config: ExperimentConfig, runner: Runner
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Tunes every model with the first seed, then fits the others: name -> what was measured, and name -> why it was not.

    Raises:
        ConfigError: a setting is not allowed, or two models have the same name.
    """
    refuse_twins(specs)
    for spec in specs:
        check(spec)
    data = load(source)
    skipped = {spec.name: reason for spec in specs if (reason := skip_reason(spec, data, config.ease_max_items))}
    wanted = [spec for spec in specs if spec.name not in skipped]
    first, *others = config.all_seeds()

    def unit(spec: ModelSpec, seed: int, chosen: Any) -> Unit:
        return Unit(source, "model", {"spec": spec.identity(), "chosen": chosen}, seed, f"{label_of(spec.name)}, seed {seed}")

    searched = [spec for spec in wanted if spec.grid and config.search == "grid"]
    searches = [Unit(source, "search", {"spec": spec.identity()}, first, f"{label_of(spec.name)}, search") for spec in searched]
    best = {
        spec.name: {"settings": found.facts["settings"], "inner": None, "tried": found.facts["tried"]}
        for spec, found in zip(searched, runner.search(searches), strict=True)
    }
    firsts = [unit(spec, first, best.get(spec.name)) for spec in wanted]
    tuned = dict(zip([spec.name for spec in wanted], runner.run(firsts), strict=True))
    rest = [
        (spec.name, unit(spec, seed, tuned[spec.name].facts["chosen"]))
        for spec in wanted
        for seed in others
        if KINDS[spec.kind].uses_chance
    ]
    outcomes = {name: [outcome] for name, outcome in tuned.items()}
    for (name, _), outcome in zip(rest, runner.run([one for _, one in rest]), strict=True):
        outcomes[name].append(outcome)
    return {spec.name: Measured(spec, outcomes[spec.name], config.seeds) for spec in wanted}, skipped


def experiment(source: Source, config: ExperimentConfig, runner: Runner) -> dict[str, Any]:
    """Our model and its rivals on one data set, as the result file says it.

    Raises:
        ConfigError: our model cannot be fitted on these data, or see `measure_models`.
    """
    measured, skipped = measure_models(source, [config.model, *config.rivals()], config, runner)
    if reason := skipped.get(config.model.name):
        raise ConfigError(
            f"{label_of(config.model.name)} cannot be fitted on '{source.name}': {reason}.",
            "Choose another model or --encoder none.",
        )
    ours = measured.pop(config.model.name)
    baselines = {}
    for name, other in measured.items():
        against = {split: (ours.per_user(split), other.per_user(split)) for split in ("val", "test")}
        baselines[name] = {
            **other.summary(),
            "ours_minus": {metric: statistics.paired(*(side[metric] for side in against["test"])) for metric in METRICS},
        }
    strongest = max(baselines, key=lambda name: baselines[name]["val"]["ndcg@10"]["mean"], default=None)
    summary = ours.summary()
    return {
        "dataset": source.name,
        "data": load(source).facts(),
        "recipe": {
            "name": config.model.name,
            "label": summary.pop("label"),
            "kind": summary.pop("kind"),
            "settings": summary.pop("settings"),
            "tried": summary.pop("tried"),
            "grid": {name: list(values) for name, values in config.model.grid.items()},
        },
        "seeds": config.all_seeds(),
        **summary,
        "users_evaluated": ours.outcomes[0].facts["users_evaluated"],
        "baselines": baselines,
        "strongest_baseline": strongest,
        "rival": config.rival,
        "skipped": skipped,
        "text_encoder": config.text_encoder,
        "protocol": PROTOCOL,
    }

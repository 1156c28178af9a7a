"""Experiment tracking on MLflow: parameters, metrics and curves, for the people who look at them later.

When the tracker is down, work goes on after one warning: `open_run` gives a `Run` that notes nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from components.mlflow_client import connect, reason, safe_name, tracker_errors
from components.progress import emit
from components.settings import flat

_RUN_KEY_TAG = "cllmr.key"
_BATCH = 100  # the tracking API takes at most 100 parameters and 1,000 metrics a call
_MAX_VALUE = 500  # characters of a parameter that every MLflow backend takes


class Run:
    """Where parameters and metrics of one piece of work are noted; this one notes nothing, as when the tracker is down."""

    run_id: str | None = None
    """The tracker's id; None when nothing is tracked."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Notes settings; nested mappings become dotted names."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Notes figures, at one step of a curve."""

    def curve(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Notes a learning curve: one mapping per epoch, which it names; values that are no numbers are left out."""


class MlflowRun(Run):
    """A run of an MLflow experiment. The first failure is told once, and nothing is noted after it."""

    def __init__(self, client: Any, run_id: str, start_time: int, stage: str = "") -> None:
        self.run_id = run_id
        self._client = client
        self._start_time = start_time
        self._stage = stage
        self._is_up = True

    def params(self, values: Mapping[str, Any]) -> None:
        """See Run.params; a parameter noted before keeps its value, as MLflow does not change parameters."""

        def note() -> None:
            from mlflow.entities import Param

            known = self._client.get_run(self.run_id).data.params
            named = {safe_name(name): str(value)[:_MAX_VALUE] for name, value in flat(values).items()}
            new = [Param(name, value) for name, value in named.items() if name not in known]
            for start in range(0, len(new), _BATCH):
                self._client.log_batch(self.run_id, params=new[start : start + _BATCH])

        self._attempt(note)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """See Run.metrics."""
        self._note([(name, value, step) for name, value in flat(values).items()])

    def curve(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Run.curve."""
        self._note(
            [
                (name, value, int(row.get("epoch", number)))
                for number, row in enumerate(rows)
                for name, value in flat(row).items()
                if name != "epoch"
            ]
        )

    def finish(self, status: str) -> None:
        """Ends the run: FINISHED or FAILED."""
        self._attempt(lambda: self._client.set_terminated(self.run_id, status))

    def _note(self, entries: list[tuple[str, Any, int]]) -> None:
        def note() -> None:
            from mlflow.entities import Metric

            # One time stamp for the whole run: a resumed run that notes a point again writes the same row, not a second one.
            metrics = [
                Metric(safe_name(name), float(value), self._start_time, step)
                for name, value, step in entries
                if isinstance(value, int | float) and not isinstance(value, bool)
            ]
            for start in range(0, len(metrics), _BATCH):
                self._client.log_batch(self.run_id, metrics=metrics[start : start + _BATCH])

        self._attempt(note)

    def _attempt(self, action: Callable[[], None]) -> None:
        if not self._is_up:
            return
        try:
            action()
        except tracker_errors() as error:
            self._is_up = False
            _warn(error, self._stage)


@contextmanager
def open_run(tracking_uri: str, experiment: str, key: str, stage: str = "") -> Iterator[Run]:
    """A run to note things in; the same `key` (a stage's fingerprint) resumes the same run, in this process or another.

    When the tracker cannot be reached, one warning is told and the run notes nothing. The run ends as FINISHED, or as FAILED
    when the block raises; what the block raises goes on.

    Args:
        tracking_uri: of MLflow.
        experiment: name of the experiment, created on first use.
        key: what makes this run the same one, and its name in the tracker.
        stage: named in the warning.
    """
    run: MlflowRun | None = None
    try:
        run = _start_run(tracking_uri, experiment, key, stage)
    except ImportError as error:
        _warn(error, stage)
    except tracker_errors() as error:
        _warn(error, stage)
    if run is None:
        yield Run()
        return
    try:
        yield run
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


def _start_run(tracking_uri: str, experiment: str, key: str, stage: str) -> MlflowRun:
    client = connect(tracking_uri)
    known = client.get_experiment_by_name(experiment)
    experiment_id = known.experiment_id if known else client.create_experiment(experiment)
    found = client.search_runs([experiment_id], f"tags.`{_RUN_KEY_TAG}` = '{key}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return MlflowRun(client, found[0].info.run_id, found[0].info.start_time, stage)
    created = client.create_run(experiment_id, run_name=key, tags={_RUN_KEY_TAG: key})
    return MlflowRun(client, created.info.run_id, created.info.start_time, stage)


def _warn(error: Exception, stage: str) -> None:
    emit("warning", stage=stage, message=f"tracking is off, the work goes on: {reason(error)}")

"""Experiment tracking on a real MLflow on SQLite, and on one that is down."""

import json

import pytest

from components.mlflow_client import connect
from components.tracking import Run, open_run


@pytest.fixture
def warnings(tmp_path, monkeypatch):
    """Gives the warnings told so far."""
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("CLLMR_EVENTS", str(path))

    def told() -> list[str]:
        events = [json.loads(line) for line in path.read_text().splitlines()]
        return [event["message"] for event in events if event["event"] == "warning"]

    return told


def test_tracking_goes_on_after_one_warning_when_the_tracker_is_down(monkeypatch, warnings):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with open_run("http://127.0.0.1:9", "cllmr", "aaaa", stage="train") as run:
        run.params({"lr": 0.1})
        run.metrics({"loss": 1.0})
        run.curve([{"epoch": 0, "loss": 1.0}])
    assert type(run) is Run
    assert run.run_id is None
    told = warnings()
    assert len(told) == 1
    assert told[0].startswith("tracking is off, the work goes on: ")


def test_tracking_goes_on_after_one_warning_when_the_tracker_dies_in_the_middle(uri, monkeypatch, warnings):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def down(*args, **kwargs):
        raise MlflowException("server is gone")

    with open_run(uri, "cllmr", "aaaa") as run:
        for call in ("log_batch", "get_run", "set_terminated"):
            monkeypatch.setattr(MlflowClient, call, down)
        run.params({"lr": 0.1})
        run.metrics({"loss": 1.0})
        run.metrics({"loss": 0.5}, step=1)
    assert warnings() == ["tracking is off, the work goes on: server is gone"]


def test_a_run_is_resumed_by_its_key_and_notes_a_point_once(uri):
    curve = [{"epoch": 0, "loss": 1.0, "note": "text"}, {"epoch": 1, "loss": 0.5, "validation": {"ndcg@10": 0.2}}]
    with open_run(uri, "cllmr", "aaaa") as first:
        first.params({"train": {"lr": 0.1}})
        first.curve(curve)
    with open_run(uri, "cllmr", "aaaa") as second:
        second.params({"train": {"lr": 0.3}, "seed": 1})
        second.curve([*curve, {"epoch": 2, "loss": 0.25}])
    with open_run(uri, "cllmr", "bbbb") as other:
        pass
    assert second.run_id == first.run_id != other.run_id
    client = connect(uri)
    noted = client.get_run(first.run_id)
    assert [(point.step, point.value) for point in client.get_metric_history(first.run_id, "loss")] == [
        (0, 1.0),
        (1, 0.5),
        (2, 0.25),
    ]
    assert noted.data.metrics == {"loss": 0.25, "validation.ndcg_at_10": 0.2}
    assert noted.data.params == {"train.lr": "0.1", "seed": "1"}
    assert noted.info.status == "FINISHED"


def test_a_run_whose_work_fails_is_marked_and_the_error_goes_on(uri):
    with pytest.raises(RuntimeError, match="boom"), open_run(uri, "cllmr", "aaaa") as run:
        raise RuntimeError("boom")
    assert connect(uri).get_run(run.run_id).info.status == "FAILED"

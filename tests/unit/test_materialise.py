"""Online features that were lost come back for what is served, whatever today's data are: real stages, a real registry."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from components.artifacts import MANIFEST, Manifest, Store
from components.errors import ArtifactError
from components.features import stage
from components.registry import Registry
from components.settings import StageConfig
from components.stages import Stage, run_stage
from feature_repo.store import sqlite_path
from pipelines import cli
from tests.features_parents import Small


@pytest.fixture(autouse=True)
def _events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLMR_EVENTS", str(tmp_path / "events.jsonl"))  # the log would go to a runner's closed output


def feature_set(root: str, name: str) -> Manifest:
    return stage.run({}, root, **Small(root, name=name).write().as_arguments())


def model(root: str, features: Manifest) -> str:
    """Fingerprint of a model that reads a feature set."""
    return run_stage(Stage("train", 1), StageConfig(), root, {"features": features}, lambda built: {}).fingerprint


def rows_of(features: Manifest) -> Path:
    """The file with a feature set's online rows."""
    return sqlite_path(features.storage_root, features.facts["project"])


def forget(root: str, spectrum: str) -> None:
    """Makes an output of the spectrum stage one that does not exist."""
    found = Store(root).find("spectrum", spectrum)
    assert found is not None
    (found.path() / MANIFEST).unlink()


def materialise(root: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["materialise", "--storage", root, *arguments])


def test_the_rows_of_the_served_models_come_back_and_not_those_of_todays_data(tmp_path: Path) -> None:
    root, file = str(tmp_path / "root"), tmp_path / "result.json"
    champion, challenger, deployed, unused = (feature_set(root, name) for name in ("a", "b", "c", "today's"))
    models = {model(root, features): features for features in (champion, challenger)}
    registry = Registry(f"sqlite:///{root}/mlflow.db", "cllmr")
    for fingerprint in models:
        registry.register(fingerprint, root, f"train/{fingerprint}/bundle", {})
    registry.promote(next(iter(models)))
    serve = tmp_path / "serve.yaml"
    args = {"storage_root": root, "train": model(root, deployed), "model_version": "1"}
    serve.write_text(json.dumps({"applications": [{"args": args}]}))

    for lost in (champion, deployed, unused):
        rows_of(lost).unlink()
    done = materialise(root, "--deployed", str(serve), "--json", str(file))
    assert done.exit_code == 0, done.output
    states = {champion.fingerprint: "written", challenger.fingerprint: "in place", deployed.fingerprint: "written"}
    assert json.loads(file.read_text())["feature_sets"] == states
    assert stage.is_live(champion)
    assert stage.is_live(deployed)
    assert not rows_of(unused).exists()
    assert materialise(root).output.splitlines() == [
        f"feature set {models[fingerprint].fingerprint}: in place" for fingerprint in sorted(models)
    ]

    for lost in (champion, challenger):
        rows_of(lost).unlink()
    forget(root, champion.parents["spectrum"])
    done = materialise(root)
    assert done.exit_code == 1, "one is missing"
    assert f"feature set {champion.fingerprint} cannot be written again" in done.output
    assert f"feature set {challenger.fingerprint}: written" in done.output, "and the other is not"


def test_before_the_first_model_there_is_nothing_to_do(tmp_path: Path) -> None:
    done = materialise(str(tmp_path))
    assert (done.exit_code, done.output) == (0, f"no model below '{tmp_path}' is served yet\n")


@pytest.mark.parametrize("change", ["inputs", "code"])
def test_rows_that_cannot_be_written_as_they_were_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    features = feature_set(str(tmp_path), "a")
    rows_of(features).unlink()
    if change == "inputs":
        forget(str(tmp_path), features.parents["spectrum"])
    else:
        monkeypatch.setattr(stage, "STAGE", Stage("features", version=stage.STAGE.version + 1))
    told = rf"feature set {features.fingerprint} cannot be written again: .* Run the pipeline"
    with pytest.raises(ArtifactError, match=told):
        stage.put_back(features)

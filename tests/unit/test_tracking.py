"""Model registry and experiment tracking against a real MLflow on SQLite, and against one that is down."""

import json
import shutil
import subprocess
import sys

import pytest

from components import tracking
from components.errors import ConfigError
from components.tracking import NullRun, Registry, RegistryError, default_tracking_uri, open_run


@pytest.fixture
def uri(empty_database, tmp_path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def registry(uri) -> Registry:
    return Registry(uri, "cllmr")


def register(registry: Registry, *fingerprints: str) -> None:
    for fingerprint in fingerprints:
        registry.register(fingerprint, "/store", f"train/{fingerprint}/bundle", {"debiased.ndcg@10": 0.25})


@pytest.fixture
def warnings(tmp_path, monkeypatch):
    """Gives the warnings told so far."""
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("CLLMR_EVENTS", str(path))

    def told() -> list[str]:
        events = [json.loads(line) for line in path.read_text().splitlines()]
        return [event["message"] for event in events if event["event"] == "warning"]

    return told


def test_looking_for_a_champion_creates_no_database_and_no_import_of_mlflow(tmp_path):
    code = (
        "import sys; from components.tracking import Registry\n"
        f"r = Registry('sqlite:///{tmp_path}/deep/mlflow.db', 'cllmr')\n"
        "assert r.champion() is None and r.versions() == [] and r.find('x') is None\n"
        "assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (tmp_path / "deep").exists()


def test_a_registered_version_carries_all_that_serving_and_people_need(registry):
    found = registry.register("aaaa", "/store", "train/aaaa/bundle", {"debiased.ndcg@10": 0.25}, {"ingest": "1234"})
    assert (found.version, found.fingerprint, found.aliases) == ("1", "aaaa", ("challenger",))
    assert found.bundle_uri == "/store/train/aaaa/bundle"
    assert found.metrics == {"debiased.ndcg@10": 0.25}
    assert found.tags == {"ingest": "1234"}
    assert found.created_at.endswith("+00:00")
    assert registry.versions() == [found]
    assert registry.champion() is None


def test_registering_the_same_bundle_twice_keeps_one_version_and_takes_the_new_figures(registry):
    register(registry, "aaaa")
    again = registry.register("aaaa", "/store", "train/aaaa/bundle", {"debiased.ndcg@10": 0.5})
    assert len(registry.versions()) == 1
    assert again.metrics == {"debiased.ndcg@10": 0.5}


def test_a_relative_storage_root_is_registered_as_the_place_it_is_now(registry, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert registry.register("aaaa", ".cllmr", "b", {}).storage_root == str(tmp_path / ".cllmr")


def test_promotion_moves_the_aliases_and_rollback_moves_them_back_one_champion_at_a_time(registry):
    register(registry, "aaaa", "bbbb", "cccc")
    for fingerprint in ("aaaa", "bbbb", "cccc"):
        assert registry.promote(fingerprint).fingerprint == fingerprint
    by_fingerprint = {version.fingerprint: version for version in registry.versions()}
    assert by_fingerprint["cccc"].aliases == ("challenger", "champion")
    assert by_fingerprint["bbbb"].aliases == ("previous",)
    assert by_fingerprint["cccc"].promoted_over == "bbbb"
    assert by_fingerprint["aaaa"].promoted_over == ""
    assert registry.rollback().fingerprint == "bbbb"
    assert registry.champion().aliases == ("champion",)
    assert registry.find("aaaa").aliases == ("previous",)
    assert registry.find("cccc").withdrawn_at
    assert registry.rollback().fingerprint == "aaaa"
    with pytest.raises(RegistryError, match="has had only one champion: there is nothing to roll back to"):
        registry.rollback()
    assert registry.champion().fingerprint == "aaaa"


def test_promoting_by_hand_what_was_rolled_back_clears_the_mark(registry):
    register(registry, "aaaa", "bbbb")
    registry.promote("aaaa")
    registry.promote("bbbb")
    registry.rollback()
    assert registry.promote("bbbb").withdrawn_at == ""
    assert registry.rollback().fingerprint == "aaaa"


def test_promoting_the_champion_again_does_not_make_it_its_own_predecessor(registry):
    register(registry, "aaaa", "bbbb")
    registry.promote("aaaa")
    registry.promote("bbbb")
    registry.promote("bbbb")
    assert registry.rollback().fingerprint == "aaaa"


def test_a_version_is_told_where_its_bundle_lies_now_and_no_alias_moves(registry):
    register(registry, "a" * 16, "b" * 16)
    registry.promote("a" * 16)
    before = registry.versions()
    assert registry.relocate("a" * 16, "s3://other/cllmr/").storage_root == "s3://other/cllmr"
    after = registry.versions()
    assert [version.aliases for version in after] == [version.aliases for version in before]
    assert after[0] == before[0]
    with pytest.raises(RegistryError, match="has no version with fingerprint 'cccccccccccccccc'"):
        registry.relocate("c" * 16, "s3://other/cllmr")


def test_an_unknown_fingerprint_is_refused_with_the_known_ones(registry):
    register(registry, "aaaa", "bbbb")
    with pytest.raises(RegistryError, match=r"no version with fingerprint 'zzzz'. Registered, newest first: bbbb, aaaa"):
        registry.promote("zzzz")


def test_rollback_without_a_champion_is_refused(registry):
    with pytest.raises(RegistryError, match="'cllmr' has no champion: there is nothing to roll back to"):
        registry.rollback()


def test_a_promotion_that_broke_off_before_the_alias_moved_leaves_the_old_champion_in_place(registry, monkeypatch):
    register(registry, "aaaa", "bbbb")
    registry.promote("aaaa")
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "_point", lambda *args: (_ for _ in ()).throw(OSError("connection lost")))
        with pytest.raises(RegistryError, match="does not answer: connection lost"):
            registry.promote("bbbb")
    assert registry.champion().fingerprint == "aaaa"
    with pytest.raises(RegistryError, match="only one champion"):
        registry.rollback()
    registry.promote("bbbb")
    assert registry.rollback().fingerprint == "aaaa"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:///{tmp}/a-file/mlflow.db", "does not answer"),
        ("nonsense", "does not answer: Could not parse"),
        ("sqlite:///{tmp}/broken.db", "does not answer: .*file is not a database"),
    ],
)
def test_a_registry_that_is_down_is_named_with_the_reason(uri, reason, tmp_path):
    (tmp_path / "a-file").write_text("")
    (tmp_path / "broken.db").write_bytes(b"not a database " * 1000)
    with pytest.raises(RegistryError, match=reason):
        Registry(uri.format(tmp=tmp_path), "cllmr").register("aaaa", "/store", "b", {})


def test_versions_of_another_team_are_passed_over_whatever_their_tags_mean(uri, registry):
    register(registry, "aaaa")
    client = tracking._connect(uri)
    client.create_registered_model("fraud")
    client.create_model_version("fraud", "s3://bucket/fraud", tags={"metric.auc": "high", "metric.recall": "0.5"})
    client.set_registered_model_alias("fraud", "champion", "1")
    assert tracking.pointed_at(uri) == {"aaaa"}
    theirs = Registry(uri, "fraud").champion()
    assert (theirs.metrics, theirs.tags) == ({"recall": 0.5}, {"metric.auc": "high"})


def test_passwords_do_not_show_in_messages():
    uri = "http://me:secret@example.test/"
    assert str(tracking._unreachable(uri, OSError(f"cannot reach {uri}"))).count("http://me:***@example.test/") == 2


def test_tracking_goes_on_after_one_warning_when_the_tracker_is_down(monkeypatch, warnings):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with open_run("http://127.0.0.1:9", "cllmr", "aaaa", stage="train") as run:
        run.params({"lr": 0.1})
        run.metrics({"loss": 1.0})
        run.curve([{"epoch": 0, "loss": 1.0}])
    assert isinstance(run, NullRun)
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
    client = tracking._connect(uri)
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
    assert tracking._connect(uri).get_run(run.run_id).info.status == "FAILED"


def test_the_default_tracker_lies_below_a_local_storage_root_and_a_remote_root_needs_a_server(tmp_path):
    assert default_tracking_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert default_tracking_uri(f"file://{tmp_path}") == f"sqlite:///{tmp_path}/mlflow.db"
    assert default_tracking_uri("s3://bucket/prefix", "http://mlflow:5000") == "http://mlflow:5000"
    with pytest.raises(
        ConfigError, match=r"'promote.tracking_uri' is empty, and the storage root 's3://bucket' is not a local"
    ):
        default_tracking_uri("s3://bucket")


@pytest.mark.parametrize("name", ["a?b", "a%20b"])
def test_a_storage_root_whose_sqlite_address_would_name_another_file_needs_a_server(tmp_path, name):
    root = str(tmp_path / name)
    with pytest.raises(ConfigError, match=r"may not hold \? or %\. Choose another with --storage, or name an MLflow server"):
        default_tracking_uri(root)
    assert default_tracking_uri(root, "http://mlflow:5000") == "http://mlflow:5000"

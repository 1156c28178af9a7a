"""The model registry on a real MLflow on SQLite, and on one that is down."""

import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any

import pytest
from mlflow import MlflowClient

from components import mlflow_client
from components import registry as registries
from components.errors import ConfigError
from components.mlflow_client import connect
from components.registry import Registry, RegistryError, default_tracking_uri, pointed_at


@pytest.fixture
def registry(uri) -> Registry:
    return Registry(uri, "cllmr")


def register(registry: Registry, *fingerprints: str) -> None:
    for fingerprint in fingerprints:
        registry.register(fingerprint, "/store", f"train/{fingerprint}/bundle", {"debiased.ndcg@10": 0.25})


def test_looking_for_a_champion_creates_no_database_and_no_import_of_mlflow(tmp_path):
    code = (
        "import sys; from components.registry import Registry\n"
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
    moved = registry.relocate("a" * 16, "s3://other/cllmr/", "train/there/bundle")
    assert moved.bundle_uri == "s3://other/cllmr/train/there/bundle"
    after = registry.versions()
    assert [version.aliases for version in after] == [version.aliases for version in before]
    assert after[0] == before[0]
    with pytest.raises(RegistryError, match="has no version with fingerprint 'cccccccccccccccc'"):
        registry.relocate("c" * 16, "s3://other/cllmr", "train/there/bundle")


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


def broken_at(call: int) -> Callable[..., None]:
    """In place of the client's method that moves an alias: the call of this number, from 1, fails."""
    move, calls = MlflowClient.set_registered_model_alias, itertools.count(1)

    def moved(*args: Any) -> None:
        if next(calls) == call:
            raise OSError("connection lost")
        move(*args)

    return moved


@pytest.mark.parametrize("call", [1, 2])
def test_a_promotion_that_broke_off_between_the_aliases_is_made_by_the_next_try(registry, monkeypatch, call):
    register(registry, "aaaa", "bbbb", "cccc")
    registry.promote("aaaa")
    registry.promote("bbbb")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", broken_at(call))
        with pytest.raises(RegistryError, match="does not answer: connection lost"):
            registry.promote("cccc")
    assert registry.champion().fingerprint == "bbbb", "or the next try would find nothing to do"
    assert registry.forget(["aaaa"], "/store") == [], "a clean-up in between"
    registry.promote("cccc", over="bbbb")
    assert (registry.champion().fingerprint, registry.previous().fingerprint) == ("cccc", "bbbb")
    registry.forget(["aaaa", "bbbb"], "/store")
    assert registry.rollback().fingerprint == "bbbb"


@pytest.mark.parametrize("call", [1, 2])
def test_a_rollback_that_broke_off_between_the_aliases_is_made_by_the_next_try_and_not_made_twice(registry, monkeypatch, call):
    register(registry, "aaaa", "bbbb", "cccc")
    for fingerprint in ("aaaa", "bbbb", "cccc"):
        registry.promote(fingerprint)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", broken_at(call))
        with pytest.raises(RegistryError, match="does not answer: connection lost"):
            registry.rollback()
    assert registry.champion().fingerprint == "cccc"
    assert registry.forget(["bbbb"], "/store") == [], "a clean-up in between"
    assert registry.rollback().fingerprint == "bbbb"
    assert registry.previous().fingerprint == "aaaa"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:///{tmp}/a-file/mlflow.db", "does not answer"),
        ("nonsense", "does not answer: Could not parse"),
        ("sqlite:///{tmp}/broken.db", "does not answer: .*file is not a database"),
        (
            "sqlite:///{tmp}/half.db",
            r"half\.db' is not whole: .* made \(.*table experiment_tags already exists\)\. Put back a copy .* move it away",
        ),
    ],
)
def test_a_registry_that_is_down_is_named_with_the_reason(uri, reason, tmp_path):
    with closing(sqlite3.connect(tmp_path / "half.db")) as half:
        half.execute("CREATE TABLE experiment_tags (key TEXT)")  # by one of the first of MLflow's migrations
    (tmp_path / "a-file").write_text("")
    (tmp_path / "broken.db").write_bytes(b"not a database " * 1000)
    with pytest.raises(RegistryError, match=reason):
        Registry(uri.format(tmp=tmp_path), "cllmr").register("aaaa", "/store", "b", {})


@pytest.mark.parametrize("what", ["is broken off", "finds another process's", "finds no links"])
def test_a_database_is_whole_when_it_is_there(what, empty_database, tmp_path, monkeypatch):
    path = tmp_path / "root" / "mlflow.db"
    whole = empty_database.read_bytes()

    def make(uri: str) -> None:
        made = mlflow_client.sqlite_file(uri)
        made.write_bytes(whole[: len(whole) // 2])
        if what == "is broken off":
            raise KeyboardInterrupt
        made.write_bytes(whole)
        if what == "finds another process's":
            register(Registry(f"sqlite:///{shutil.copy(empty_database, path)}", "cllmr"), "aaaa")

    def link(source: str, target: str) -> None:
        raise PermissionError

    monkeypatch.setattr(mlflow_client, "_make_tables", make)
    if what == "finds no links":
        monkeypatch.setattr(os, "link", link)
    with pytest.raises(KeyboardInterrupt) if what == "is broken off" else nullcontext():
        connect(f"sqlite:///{path}?timeout=9")
    assert [file.name for file in path.parent.iterdir()] == ([] if what == "is broken off" else ["mlflow.db"])
    assert pointed_at(f"sqlite:///{path}") == ({"aaaa"} if "another" in what else set())


def test_what_a_killed_process_has_left_of_a_database_is_taken_away_and_what_another_makes_is_not(uri, tmp_path):
    making = mlflow_client._MAKING
    for name, age in ((f"{making}killed", 7200), (f"{making}at_work", 60), (".mlflow-somebody's", 7200)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mlflow.db").write_bytes(b"half")
        os.utime(folder, (time.time() - age,) * 2)
    connect(uri)
    assert {folder.name for folder in tmp_path.glob(".*mlflow-*")} == {f"{making}at_work", ".mlflow-somebody's"}


def test_versions_of_another_team_are_passed_over_whatever_their_tags_mean(uri, registry):
    register(registry, "aaaa")
    client = connect(uri)
    client.create_registered_model("fraud")
    client.create_model_version("fraud", "s3://bucket/fraud", tags={"metric.auc": "high", "metric.recall": "0.5"})
    client.set_registered_model_alias("fraud", "champion", "1")
    assert pointed_at(uri) == {"aaaa"}
    theirs = Registry(uri, "fraud").champion()
    assert (theirs.metrics, theirs.tags) == ({"recall": 0.5}, {"metric.auc": "high"})


def test_passwords_do_not_show_in_messages():
    uri = "http://me:secret@example.test/"
    assert str(registries._unreachable(uri, OSError(f"cannot reach {uri}"))).count("http://me:***@example.test/") == 2


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

"""The features stage with Feast on SQLite: what is written, read back, reused, and noticed when it is gone."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.artifacts import Manifest, Store
from components.errors import ArtifactError, StorageError
from components.features import repository, stage
from components.features.reader import _entity_features, training_features
from components.features.repository import check_view
from components.features.stage import is_live, run
from feature_repo.store import FeatureStoreError, feature_refs, open_store, sqlite_path
from serving.features import Age, open_history_reader
from tests import REPOSITORY
from tests.features_parents import EVENTS, ITEMS, USERS, Event, Small, embeddings, spectrum

VIEWS = {
    "item_side_information": 4,
    "item_spectrum": 4,
    "item_counts": 4,
    "user_side_information": 3,
    "user_spectrum": 3,
    "user_counts": 3,
    "user_history": 3,
}


def build(root: Path, events: list[Event] = EVENTS, name: str = "small") -> Manifest:
    return run({"history_length": 2}, str(root), **Small(str(root), name=name, events=events).write().as_arguments())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A feature set that no test changes."""
    return build(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copied(finished: Manifest, tmp_path: Path) -> Manifest:
    """A feature set that a test may damage, under another storage root than it was built in."""
    shutil.copytree(finished.storage_root, tmp_path / "copy")
    found = Store(str(tmp_path / "copy")).find("features", finished.fingerprint)
    assert found is not None
    return found


def database(manifest: Manifest) -> Path:
    return sqlite_path(manifest.storage_root, manifest.facts["project"])


def execute(manifest: Manifest, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(database(manifest))) as connection, connection:
        connection.execute(statement.replace("PROJECT", manifest.facts["project"]), values)


def test_the_manifest_tells_project_views_window_and_store(finished: Manifest) -> None:
    assert finished.facts == {
        "project": f"cllmr_{finished.fingerprint}",
        "online_store": "sqlite",
        "views": VIEWS,
        "window": {"start": "2001-09-09T01:48:20+00:00", "end": "2001-09-09T02:01:40+00:00"},
        "snapshot": "2001-09-09T01:55:00+00:00",
        "users": 3,
        "items": 4,
    }


def test_training_reads_every_feature_in_vocabulary_order(finished: Manifest) -> None:
    features = training_features(finished)
    np.testing.assert_array_equal(features.item_embeddings, embeddings(4))
    np.testing.assert_array_equal(features.user_embeddings, embeddings(3))
    np.testing.assert_array_equal(features.item_spectrum, -spectrum(4))
    np.testing.assert_array_equal(features.user_spectrum, spectrum(3))
    assert features.item_embeddings.dtype == features.user_spectrum.dtype == np.float32


def test_serving_reads_histories_and_introductions_online(finished: Manifest) -> None:
    store = open_store(finished.path(), finished.storage_root)
    refs = feature_refs(store, "serving", "user_id")
    assert refs == ["user_history:item_ids", "user_side_information:introduction"]
    found = store.get_online_features(refs, [{"user_id": "7"}, {"user_id": "nobody"}]).to_dict()
    assert found["item_ids"] == [["5", "31"], None]
    assert found["introduction"] == [[], None]
    assert feature_refs(store, "serving", "item_id") == []


def test_the_training_service_has_no_history_and_both_entities_at_once_are_refused_by_feast(finished: Manifest) -> None:
    import pandas as pd

    store = open_store(finished.path(), finished.storage_root)
    views = {projection.name for projection in store.get_feature_service("training").feature_view_projections}
    assert views == set(VIEWS) - {"user_history", "item_counts", "user_counts"}
    users = pd.DataFrame({"user_id": USERS, "event_timestamp": pd.Timestamp(finished.facts["snapshot"])})
    with pytest.raises(KeyError, match="item_id"):  # why a service's features are read one entity at a time
        store.get_historical_features(users, store.get_feature_service("training"), full_feature_names=True).to_df()


def test_held_out_interactions_reach_serving_and_never_training(finished: Manifest, tmp_path: Path) -> None:
    changed = [
        (user, item, time, split) if split == "train" else (user, 2, time + 77, split) for user, item, time, split in EVENTS
    ]
    other = build(tmp_path, changed, "changed")
    assert other.fingerprint != finished.fingerprint
    before, after = training_features(finished), training_features(other)
    for feature in vars(before):
        np.testing.assert_array_equal(getattr(before, feature), getattr(after, feature), err_msg=feature)
    history = open_store(other.path(), other.storage_root).get_online_features(["user_history:item_ids"], [{"user_id": "10"}])
    assert history.to_dict()["item_ids"] == [["5", "30"]]


def test_two_runs_write_the_same_bytes_in_different_places(finished: Manifest, tmp_path: Path) -> None:
    # a process of its own: Feast keeps sets of definitions, whose order differs from process to process
    script = f"from tests.unit.test_features_stage import *; print(build(Path({str(tmp_path)!r})).model_dump_json())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": "4"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    other = Manifest.model_validate_json(done.stdout.splitlines()[-1])
    assert other.fingerprint == finished.fingerprint
    assert other.files == finished.files
    assert {"registry.db", "feature_store.yaml"} < set(other.files)
    assert other.facts == finished.facts


def test_nothing_that_changes_lies_in_the_artifact(finished: Manifest) -> None:
    directory = finished.path()
    training_features(finished)
    store = open_store(directory, finished.storage_root)
    store.get_online_features(feature_refs(store, "serving", "user_id"), [{"user_id": "7"}])
    store.list_feature_views()
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert present == {*finished.files, "manifest.json"}
    assert finished.path() == directory  # every sha256 still holds
    assert finished.storage_root not in (directory / "registry.db").read_bytes().decode("latin-1")
    assert database(finished).parent == Path(finished.storage_root) / "online_store"


def test_a_feature_set_is_read_after_its_storage_root_has_moved(copied: Manifest) -> None:
    np.testing.assert_array_equal(training_features(copied).user_spectrum, spectrum(3))
    store = open_store(copied.path(), copied.storage_root)
    assert store.get_online_features(["user_counts:train_interactions"], [{"user_id": "9"}]).to_dict()[
        "train_interactions"
    ] == [1]


def test_a_storage_root_that_is_a_uri_is_read_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLMR_CACHE", str(tmp_path / "cache"))
    root = f"file://{tmp_path / 'root'}"
    manifest = run({}, root, **Small(root).write().as_arguments())
    assert manifest.path().is_relative_to(tmp_path / "cache")
    np.testing.assert_array_equal(training_features(manifest).user_spectrum, spectrum(3))
    store = open_store(manifest.path(), root)
    assert store.get_online_features(["item_counts:train_interactions"], [{"item_id": "2"}]).to_dict()[
        "train_interactions"
    ] == [1]
    assert is_live(manifest)


def test_a_second_run_is_reused(copied: Manifest) -> None:
    filled = database(copied).stat().st_mtime_ns
    again = build(Path(copied.storage_root))
    assert again == copied
    assert database(copied).stat().st_mtime_ns == filled


def test_an_emptied_online_store_is_noticed_and_filled_again(copied: Manifest) -> None:
    def profile() -> list[str]:
        store = open_store(copied.path(), copied.storage_root)
        return store.get_online_features(["item_side_information:profile"], [{"item_id": "31"}]).to_dict()["profile"]

    def remove() -> None:
        database(copied).unlink()

    def delete_rows() -> None:
        execute(copied, 'DELETE FROM "PROJECT_item_side_information"')

    def overwrite_with_garbage() -> None:
        database(copied).write_bytes(b"not a database " * 1000)

    for damage in (remove, delete_rows, overwrite_with_garbage):
        assert is_live(copied)
        damage()
        again = build(Path(copied.storage_root))
        assert again.files == copied.files
        assert is_live(copied), damage.__name__
        assert profile() == ["profile of item 31"], damage.__name__


def test_a_damaged_page_of_the_online_store_counts_as_lost(copied: Manifest) -> None:
    whole = database(copied).read_bytes()
    database(copied).write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    assert not is_live(copied)


def test_rows_of_a_build_that_fails_go_but_not_those_of_a_finished_feature_set(
    tmp_path: Path, copied: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*of: object) -> None:
        raise StorageError("the online store holds 2 rows.", "Run again.")

    monkeypatch.setattr(repository, "check_view", refuse)
    with pytest.raises(StorageError, match="holds 2 rows"):
        build(tmp_path / "new")
    assert list((tmp_path / "new/online_store").iterdir()) == []
    assert list((tmp_path / "new/features").iterdir()) == [], "nor the note of them"
    execute(copied, 'DELETE FROM "PROJECT_item_side_information"')
    with pytest.raises(StorageError, match="holds 2 rows"):
        build(Path(copied.storage_root))
    assert database(copied).exists(), "an endpoint may read the others"
    assert not list(Path(copied.storage_root, "features").glob(".work-*"))


@pytest.mark.parametrize("began", ["before", "after"])
def test_a_build_that_fails_leaves_the_rows_to_another_run_that_writes_the_same(
    tmp_path: Path, copied: Manifest, monkeypatch: pytest.MonkeyPatch, began: str
) -> None:
    def another_begins() -> None:
        Store(f"{tmp_path}/new").write_note("sqlite of another run", *stage.rows_note(copied.fingerprint))

    def refuse(*of: object) -> None:
        if began == "after":
            another_begins()
        raise StorageError("the online store holds 2 rows.", "Run again.")

    if began == "before":
        another_begins()
    monkeypatch.setattr(repository, "check_view", refuse)
    with pytest.raises(StorageError, match="holds 2 rows"):
        build(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new/online_store").iterdir()] == [database(copied).name]
    assert Store(f"{tmp_path}/new").read_note(*stage.rows_note(copied.fingerprint)), "a clean-up finds them, should both fail"


def test_rows_missing_online_are_an_error_naming_view_and_counts(copied: Manifest) -> None:
    store, table = open_store(copied.path(), copied.storage_root), pq.read_table(copied.path() / "data/user_counts.parquet")
    check_view(store, "user_counts", table)
    execute(copied, 'DELETE FROM "PROJECT_user_counts" WHERE entity_key = (SELECT MAX(entity_key) FROM "PROJECT_user_counts")')
    with pytest.raises(StorageError, match=r"the online store holds 2 rows of user_counts, the offline table 3\."):
        check_view(store, "user_counts", table)


def test_a_value_that_changed_online_is_an_error_naming_it(copied: Manifest) -> None:
    store, table = open_store(copied.path(), copied.storage_root), pq.read_table(copied.path() / "data/item_counts.parquet")
    wrong = table.set_column(2, "train_interactions", pa.array([1, 1, 8, 1]))
    with pytest.raises(
        StorageError, match=r"item_counts:train_interactions of item_id '30' is 1 in the online store, 8 offline"
    ):
        check_view(store, "item_counts", wrong)


def test_an_entity_that_the_offline_table_lost_is_named(copied: Manifest) -> None:
    directory = copied.path()
    table = pq.read_table(directory / "data/item_spectrum.parquet")
    pq.write_table(table.take([0, 2, 3]), directory / "data/item_spectrum.parquet")
    store = open_store(directory, copied.storage_root, online=False)
    with pytest.raises(ArtifactError, match=r"4 items; 1 lack features: '5'"):
        _entity_features(
            store,
            directory,
            "items",
            "item_id",
            pq.read_table(directory / "data/item_spectrum.parquet")["event_timestamp"][0].as_py(),
        )
    with pytest.raises(ArtifactError, match=r"item_spectrum.parquet is not what its manifest says"):
        training_features(copied)


def test_untimed_data_and_a_user_without_interactions_are_materialised(tmp_path: Path) -> None:
    untimed = [(user, item, 0, split) for user, item, _, split in EVENTS if user != 1]
    manifest = build(tmp_path, untimed, "untimed")
    assert manifest.facts["views"] == VIEWS
    assert manifest.facts["window"] == {"start": "2000-01-01T00:00:00+00:00", "end": "2000-01-01T00:00:00+00:00"}
    np.testing.assert_array_equal(training_features(manifest).user_spectrum, spectrum(3))
    store = open_store(manifest.path(), manifest.storage_root)
    refs = ["user_history:item_ids", "user_counts:train_interactions"]
    found = store.get_online_features(refs, [{"user_id": raw_id} for raw_id in USERS]).to_dict()
    assert found["train_interactions"] == [2, 0, 1]
    assert found["item_ids"] == [["5", "31"], [], ["5", "31"]]
    ages: dict[str, Counter[Age]] = {}
    open_history_reader(manifest.storage_root, manifest.fingerprint, ages.__setitem__)(USERS)
    assert ages == {"user_history": {"fresh": 3}, "user_side_information": {"fresh": 3}}


def test_a_directory_that_is_no_feature_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FeatureStoreError, match=r"is not a feature set: feature_store.yaml cannot be read .*cllmr run --from features"
    ):
        open_store(tmp_path, str(tmp_path))


def test_the_vocabularies_travel_with_the_feature_set(finished: Manifest) -> None:
    directory = finished.path()
    assert pq.read_table(directory / "entities/users.parquet")["user_id"].to_pylist() == USERS
    assert pq.read_table(directory / "entities/items.parquet")["item_id"].to_pylist() == ITEMS

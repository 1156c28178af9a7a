"""The features stage with a real Redis server: filled, read back, emptied, stopped."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from components.artifacts import Manifest
from components.errors import ConfigError, StorageError
from components.features import online
from components.features.reader import training_features
from components.features.stage import is_live, put_back, run
from feature_repo.store import open_store
from tests.features_parents import Small, spectrum
from tests.stores import PASSWORD, RedisServer

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path)
    running.start()
    monkeypatch.setenv("CLLMR_ONLINE_STORE", running.address)
    yield running
    running.stop()


@pytest.fixture
def build(tmp_path: Path) -> Callable[[], Manifest]:
    parents = Small(str(tmp_path / "root")).write().as_arguments()
    return lambda: run({"online_store": "redis"}, str(tmp_path / "root"), **parents)


def test_redis_is_filled_and_gives_back_what_training_wrote(server: RedisServer, build: Callable[[], Manifest]) -> None:
    manifest = build()
    assert manifest.facts["online_store"] == "redis"
    assert manifest.facts["views"]["user_history"] == 3
    store = open_store(manifest.path(), manifest.storage_root)
    refs = ["user_history:item_ids", "user_counts:train_interactions", "user_side_information:embedding"]
    found = store.get_online_features(refs, [{"user_id": "7"}, {"user_id": "nobody"}]).to_dict()
    assert found["item_ids"] == [["2", "5", "31"], None]
    assert found["train_interactions"] == [2, None]
    np.testing.assert_array_equal(np.float32(found["embedding"][0]), training_features(manifest).user_embeddings[0])


def test_an_emptied_redis_is_noticed_and_filled_again(server: RedisServer, build: Callable[[], Manifest]) -> None:
    first = build()
    assert is_live(first)
    assert build().created_at == first.created_at
    client = online.redis_client()
    whole = client.dbsize()
    assert whole == 7  # one hash per user and item
    client.flushall()
    assert not is_live(first)
    again = build()
    assert again.files == first.files
    assert client.dbsize() == whole
    client.delete(next(iter(client.scan_iter())))  # one entity evicted
    assert put_back(first), "from the manifest alone, as the job materialise does"
    assert client.dbsize() == whole
    assert not put_back(first)


def test_a_row_that_changed_in_redis_is_overwritten_by_a_refill(server: RedisServer, build: Callable[[], Manifest]) -> None:
    manifest = build()
    client = online.redis_client()
    for key in client.scan_iter():
        client.hset(key, mapping={field: b"\x20\x63" for field in client.hkeys(key) if not field.startswith(b"_ts:")})
    client.delete(next(iter(client.scan_iter())))
    build()
    store = open_store(manifest.path(), manifest.storage_root)
    counts = store.get_online_features(["user_counts:train_interactions"], [{"user_id": raw_id} for raw_id in ("7", "9", "10")])
    assert counts.to_dict()["train_interactions"] == [2, 1, 1]


def test_a_stopped_redis_is_an_error_with_the_next_action_and_training_can_still_read(
    server: RedisServer, build: Callable[[], Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build()
    server.stop()
    assert not is_live(manifest)
    with pytest.raises(
        StorageError, match=r"the online store 'redis' cannot be used: .*Start Redis or correct CLLMR_ONLINE_STORE"
    ):
        build()
    monkeypatch.delenv("CLLMR_ONLINE_STORE")
    np.testing.assert_array_equal(training_features(manifest).user_spectrum, spectrum(3))
    with pytest.raises(ConfigError, match=r"CLLMR_ONLINE_STORE is not set"):
        build()
    monkeypatch.setenv("CLLMR_ONLINE_STORE", server.address)
    server.start()
    assert build().files == manifest.files
    assert is_live(manifest)


def test_a_redis_that_dies_while_it_is_filled_leaves_no_artifact(
    server: RedisServer, build: Callable[[], Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from feast import FeatureStore

    materialize = FeatureStore.materialize

    def die_at_the_third_view(store: FeatureStore, *window: object, feature_views: list[str]) -> None:
        if feature_views == ["item_counts"]:
            server.stop()
        materialize(store, *window, feature_views=feature_views)

    monkeypatch.setattr(FeatureStore, "materialize", die_at_the_third_view)
    with pytest.raises(StorageError, match="the online store 'redis' cannot be used"):
        build()
    (note,) = (tmp_path / "root/features").iterdir()
    assert note.name.startswith(".work-"), "by which a clean-up finds the rows"


def test_rows_of_one_feature_set_are_removed_by_its_name_and_those_of_others_stay(
    server: RedisServer, build: Callable[[], Manifest], tmp_path: Path
) -> None:
    root = str(tmp_path / "root")
    first = build()
    other = run({"online_store": "redis"}, root, **Small(root, name="other").write().as_arguments())
    online.redis_client().set("events", "nowhere else")
    online.remove_rows("redis", root, first.facts["project"])
    assert (is_live(first), is_live(other)) == (False, True)
    assert online.redis_client().dbsize() == 7 + 1, "every row of the one"
    assert list(online.projects("redis", root)) == [other.facts["project"]]


def test_the_password_is_written_nowhere(
    server: RedisServer, build: Callable[[], Manifest], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build()
    monkeypatch.setenv("CLLMR_ONLINE_STORE", server.address.replace(PASSWORD, f"{PASSWORD}-wrong"))
    with pytest.raises(StorageError, match="invalid username-password pair") as refused:
        build()
    monkeypatch.setenv("CLLMR_ONLINE_STORE", server.address)
    server.stop()
    with pytest.raises(StorageError) as stopped:
        build()
    told = "".join(capfd.readouterr()) + str(refused.value) + str(stopped.value)
    assert "online store" in told
    assert PASSWORD not in told
    for path in Path(manifest.storage_root).rglob("*"):
        assert path.is_dir() or PASSWORD.encode() not in path.read_bytes(), path

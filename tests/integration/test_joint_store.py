"""Views of two Feast projects read together: the same as Feast gives one by one, and one round trip to a real Redis."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.artifacts import Manifest
from components.features.stage import run
from feature_repo.joint import JointStore, Row, open_joint_store
from feature_repo.store import open_shared_store, open_store
from serving.events import open_history
from serving.features import open_history_reader
from serving.schemas import Event
from tests.features_parents import EVENTS, Small, embeddings
from tests.stores import RedisServer

OWN = {"user_history": ["item_ids"], "user_side_information": ["embedding", "profile"]}
SHARED = {"user_events": ["item_ids", "timestamps"]}
ASKED = ["9", "nobody", "told", "7"]


@pytest.fixture(params=["sqlite", "redis"])
def features(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manifest]:
    """A feature set, and events of a user that it has and of one that it has not."""
    root = str(tmp_path / "root")
    server = None
    if request.param == "redis":
        if shutil.which("redis-server") is None:
            pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
        server = RedisServer(tmp_path)
        server.start()
        monkeypatch.setenv("CLLMR_ONLINE_STORE", server.address)
    try:
        features = run({"online_store": request.param}, root, **Small(root, newcomers=["new"]).write().as_arguments())
        now = int(time.time())
        told = [Event(user_id=user, item_id=item, timestamp=now) for user, item in (("7", "30"), ("told", "31"))]
        open_history(root, features.fingerprint).write(told)
        yield features
    finally:
        if server is not None:
            server.stop()


def opened(features: Manifest) -> JointStore:
    return open_joint_store(features.path(), features.storage_root, "user_id", OWN, SHARED)


def values(rows: list[Row], names: list[str]) -> list[tuple[float, Any]]:
    return [(row.event_time, {name: row[name] for name in names}) for row in rows]


def by_feast(features: Manifest) -> dict[str, list[tuple[float, Any]]]:
    """One look-up per view, through Feast's own API."""
    found = {}
    for store, views in (
        (open_store(features.path(), features.storage_root), OWN),
        (open_shared_store(features.path(), features.storage_root), SHARED),
    ):
        for view, names in views.items():
            answer = store.get_online_features([f"{view}:{name}" for name in names], [{"user_id": user} for user in ASKED])
            column = list(answer.proto.metadata.feature_names.val).index(names[0])
            times = [stamp.seconds for stamp in answer.proto.results[column].event_timestamps]
            told = answer.to_dict()
            found[view] = [(float(at), {name: told[name][row] for name in names}) for row, at in enumerate(times)]
    return found


def test_rows_are_those_that_feast_gives_and_none_of_whom_a_view_does_not_know(features: Manifest) -> None:
    found = opened(features).read(ASKED)
    assert {view: values(found[view], names) for view, names in (OWN | SHARED).items()} == by_feast(features)
    assert [row["item_ids"] for row in found["user_history"]] == [["2", "30"], None, None, ["2", "5", "31"]]
    assert [row["item_ids"] for row in found["user_events"]] == [None, None, ["31"], ["30"]]
    assert [row["profile"] for row in found["user_side_information"]] == [
        "profile of user 9",
        None,
        None,
        "profile of user 7",
    ]
    assert found["user_history"][3].event_time == 1_000_000_300


def test_one_reader_gives_histories_events_and_the_side_information_of_whom_has_neither(features: Manifest) -> None:
    counted: dict[str, Any] = {}
    read = open_history_reader(features.storage_root, features.fingerprint, counted.__setitem__)
    found = read(["7", "told", "new", "nobody"])
    assert (found.item_ids, found.events) == ([["2", "5", "31"], [], [], []], [["30"], ["31"], [], []])
    assert (found.degraded, found.ages) == (None, ["stale", "fresh", None, None])
    assert found.profiles is not None
    assert (found.profiles.feature_set, list(found.profiles.embeddings)) == (features.fingerprint, ["new"])
    np.testing.assert_array_equal(found.profiles.embeddings["new"], embeddings(4)[0])
    assert counted == {
        "user_history": {"stale": 1, "missing": 3},
        "user_side_information": {"stale": 2, "missing": 2},
    }
    assert read(["9", "told"]).profiles is None


@pytest.mark.parametrize("features", ["sqlite"], indirect=True)
def test_endpoints_on_one_sqlite_store_lose_no_event_of_each_other(features: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    from feast import FeatureStore

    one, other = (open_history(features.storage_root, features.fingerprint) for _ in range(2))
    now, push = int(time.time()), FeatureStore.push
    told = [Event(user_id="7", item_id=item, timestamp=now + 1) for item in ("2", "5")]
    meanwhile = threading.Thread(target=lambda: other.write(told[1:]))

    def slow(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(FeatureStore, "push", push)
        meanwhile.start()
        meanwhile.join(0.2)  # after `one` has read the list, and before it writes it
        push(*arguments, **options)

    monkeypatch.setattr(FeatureStore, "push", slow)
    assert one.write(told[:1]) == ["stored"]
    meanwhile.join()
    assert one.read(["7"]) == [["30", "2", "5"]]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
def test_data_without_timestamps_have_no_age_in_another_time_zone_than_the_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    root = str(tmp_path)
    untimed = Small(root, events=[(user, item, 0, split) for user, item, _, split in EVENTS]).write()
    try:
        with monkeypatch.context() as patched:
            patched.setenv("TZ", "UTC")
            time.tzset()
            features = run({"online_store": "sqlite"}, root, **untimed.as_arguments())
            patched.setenv("TZ", zone)
            time.tzset()
            found = open_history_reader(root, features.fingerprint)(["7"])
    finally:
        time.tzset()
    assert (found.item_ids, found.ages) == ([["2", "5", "31"]], ["fresh"])


@pytest.mark.parametrize("features", ["redis"], indirect=True)
def test_redis_is_asked_once_for_all_users_and_views(features: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    from redis import Connection

    store = opened(features)
    store.read(ASKED)  # connects
    sent: list[Any] = []
    send = Connection.send_packed_command
    monkeypatch.setattr(
        Connection,
        "send_packed_command",
        lambda self, command, **options: (sent.append(command), send(self, command, **options)),
    )
    store.read(ASKED)
    (packed,) = sent
    assert b"".join(packed).count(b"HMGET") == 2 * len(ASKED), "of every user, one hash per project"

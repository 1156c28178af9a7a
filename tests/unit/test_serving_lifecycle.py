"""Which bundle is served: what is swapped in, what is refused, what is told, and what a new replica begins with."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from components.artifacts import read_json, write_json
from components.errors import ArtifactError
from components.registry import Registry, default_tracking_uri
from serving import deployments, lifecycle
from serving.approximate import Exactness
from serving.deployments import RegistryReplica
from serving.lifecycle import Follower, Live, Target
from serving.metrics import ScorerMetrics
from serving.settings import Scoring
from tests.bundles import stored_bundle, write_bundle
from tests.waiting import wait_until


class Told:
    """Remembers what happened."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.on_champion: bool | None = None

    def swapped(self, before: Target | None, now: Target) -> None:
        self.events.append(("swapped", now.model_version))

    def measured(self, target: Target, exactness: Exactness) -> None:
        assert self.events[-1] == ("swapped", target.model_version)
        self.exactness = exactness

    def refused(self, target: Target) -> None:
        self.events.append(("refused", target.model_version))

    def tried(self, before: Target | None, now: Target | None) -> None:
        self.events.append(("tried", "nobody" if now is None else now.model_version))

    def settled(self, on_champion: bool) -> None:
        self.on_champion = on_champion


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture
def make(root: str) -> Callable[[str], Target]:
    """Trains the bundle of a model version, once."""

    def made(version: str) -> Target:
        trained = stored_bundle(root, partial(write_bundle, header={"name": version}), version)
        return Target(version, trained.fingerprint, root)

    return made


@pytest.fixture
def damaged(make: Callable[[str], Target], root: str) -> Iterator[Target]:
    """A bundle with a changed byte; mended afterwards."""
    target = make("damaged")
    file = Path(root) / "train" / target.fingerprint / "bundle" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    yield target
    file.write_bytes(whole)


class Registered:
    """A champion that a test moves; or an error."""

    def __init__(self) -> None:
        self.champion: Target | None = None
        self.error: Exception | None = None

    def __call__(self) -> Target | None:
        if self.error:
            raise self.error
        return self.champion


def test_another_champion_is_swapped_in_and_the_one_before_is_kept_by_requests_that_hold_it(
    make: Callable[[str], Target],
) -> None:
    told, registered = Told(), Registered()
    follower = Follower([make("1")], registered, told, interval=1)
    held = follower.live
    follower.look()
    assert follower.live is held  # no champion: what was deployed is served
    registered.champion = make("2")
    follower.look()
    assert (held.recommender.model_version, held.target) == ("1", make("1"))
    assert (follower.live.recommender.model_version, follower.live.recommender.scorer.name) == ("2", "2")
    follower.look()
    assert told.events == [("swapped", "1"), ("swapped", "2")]
    assert told.on_champion


def test_a_refused_champion_is_told_once_and_tried_again_after_a_while(
    make: Callable[[str], Target], damaged: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []
    real = lifecycle.load
    monkeypatch.setattr(lifecycle, "load", lambda target, scoring: tries.append(target) or real(target, scoring))
    told, registered = Told(), Registered()
    follower = Follower([make("1")], registered, told, interval=1)
    registered.champion = damaged
    with capture_logs() as logs:
        for _ in range(5):
            follower.look()
        assert tries[1:] == [damaged]
        assert follower.live.target == make("1")
        assert told.on_champion is False
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + lifecycle.RETRY_SECONDS[0] + 1)
        follower.look()
    assert tries[1:] == [damaged, damaged]
    assert told.events == [("swapped", "1"), ("refused", "damaged")]
    (line,) = [entry for entry in logs if entry["event"] == "bundle refused"]
    assert "model.safetensors is not what its manifest says" in line["reason"]


def test_a_bundle_that_is_whole_and_answers_otherwise_than_when_it_was_trained_is_refused(
    make: Callable[[str], Target], root: str
) -> None:
    def write(directory: Path) -> None:
        golden = directory / "golden.json"
        write_bundle(directory)
        recorded = read_json(golden)
        recorded[0]["scores"][0] += 0.01
        write_json(golden, recorded)

    told, registered = Told(), Registered()
    follower = Follower([make("1")], registered, told, interval=1)
    registered.champion = Target("2", stored_bundle(root, write, "skewed").fingerprint, root)
    with capture_logs() as logs:
        follower.look()
    assert (follower.live.target, told.events) == (make("1"), [("swapped", "1"), ("refused", "2")])
    assert "golden request 0" in logs[0]["reason"]


def test_a_rollback_from_a_refused_champion_settles_and_the_refused_one_promoted_again_is_told_again(
    make: Callable[[str], Target], damaged: Target
) -> None:
    told, registered = Told(), Registered()
    follower = Follower([make("1")], registered, told, interval=1)
    for champion in (damaged, make("1"), damaged):
        registered.champion = champion
        follower.look()
        assert told.on_champion == (champion == make("1"))
    assert told.events == [("swapped", "1"), ("refused", "damaged"), ("refused", "damaged")]


def test_a_bundle_that_was_mended_is_served(make: Callable[[str], Target], root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "RETRY_SECONDS", (0.0,))
    told, registered = Told(), Registered()
    follower = Follower([make("1")], registered, told, interval=1)
    registered.champion = Target("9", make("mended").fingerprint, root)
    file = Path(root) / "train" / registered.champion.fingerprint / "bundle" / "users.json"
    whole = file.read_bytes()
    file.write_bytes(b"{")
    follower.look()
    file.write_bytes(whole)
    follower.look()
    assert told.events == [("swapped", "1"), ("refused", "9"), ("swapped", "9")]


def test_a_registry_that_fails_changes_nothing_and_is_told_once_each_time_it_goes_away(make: Callable[[str], Target]) -> None:
    told, registered = Told(), Registered()
    follower = Follower([make("1")], registered, told, interval=1)
    with capture_logs() as logs:
        for error in (OSError("down"), TimeoutError(), None, OSError("down")):
            registered.error = error
            follower.look()
    assert follower.live.target == make("1")
    assert [entry["error"] for entry in logs if entry["event"] == "champion cannot be asked for"] == ["OSError", "OSError"]
    registered.error, registered.champion = None, make("2")
    follower.look()
    assert follower.live.target == make("2")


def test_a_replica_begins_with_the_first_bundle_that_loads(make: Callable[[str], Target], damaged: Target) -> None:
    told = Told()
    assert Follower([damaged, make("2"), make("1")], Registered(), told, interval=1).live.target == make("2")
    assert told.events == [("refused", "damaged"), ("swapped", "2")]


def test_the_only_bundle_there_is_is_told_of_before_a_replica_that_cannot_load_it_fails(damaged: Target) -> None:
    told = Told()
    with capture_logs() as logs, pytest.raises(ArtifactError, match=r"model.safetensors is not what its manifest says"):
        Follower([damaged], Registered(), told, interval=1)
    assert told.events == [("refused", "damaged")]
    assert [(line["event"], line["model_version"]) for line in logs] == [("bundle refused", "damaged")]


def test_what_was_refused_at_the_start_is_not_refused_again_at_once(make: Callable[[str], Target], damaged: Target) -> None:
    told, registered = Told(), Registered()
    follower = Follower([damaged, make("1")], registered, told, interval=1)
    registered.champion = damaged
    follower.look()
    assert told.events == [("refused", "damaged"), ("swapped", "1")]
    assert told.on_champion is False


def test_the_copy_of_a_model_that_is_served_is_held_and_those_of_earlier_ones_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A champion stays for days, and challengers come and go; a champion's texts are read when they are asked for."""
    monkeypatch.setenv("CLLMR_CACHE", str(tmp_path / "cache"))
    root = f"file://{tmp_path}/bucket"

    def made(version: str) -> Target:
        def write(bundle: Path) -> None:
            write_bundle(bundle, header={"name": version})
            (bundle.parent / "warm_start.safetensors").write_bytes(b"for training")

        return Target(version, stored_bundle(root, write, version).fingerprint, root)

    def copies() -> set[str]:
        return {path.name.split("-")[0] for path in tmp_path.glob("cache/*/train/*-bundle")}

    champion, *challengers = (made(version) for version in "1234")
    told = Told()
    follower = Follower([champion], lambda: champion, told, 60.0, lambda: challengers[0])
    follower.tries = True
    while len(challengers) > 1:
        follower.look()
        for path in tmp_path.glob("cache/*/train/*"):
            os.utime(path, (0, 0))
        before = challengers.pop(0)
    follower.look()
    assert told.events[-1] == ("tried", "4")
    assert copies() == {one.fingerprint for one in (champion, before, challengers[0])}, "the one before was held till it left"
    assert not list(tmp_path.glob("cache/**/warm_start.safetensors"))


def test_it_follows_by_itself_until_it_is_closed(make: Callable[[str], Target]) -> None:
    registered = Registered()
    follower = Follower([make("1")], registered, Told(), interval=0.05)
    registered.champion = make("2")
    follower.start()
    wait_until("the new champion", lambda: follower.live.target, lambda target: target == make("2"))
    follower.close()
    time.sleep(0.2)
    registered.champion = make("1")
    time.sleep(0.3)
    assert follower.live.target == make("2")


def test_there_are_never_three_models_when_the_champion_changes_during_a_trial(
    make: Callable[[str], Target], damaged: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    real = lifecycle.load

    def load(target: Target, scoring: Scoring) -> Live:
        held.append(sum(model is not None for model in (follower.live, follower.challenger)))
        return real(target, scoring)

    told, registered = Told(), Registered()
    follower = Follower([make("1")], registered, told, 1, lambda: make("2"))
    follower.tries = True
    monkeypatch.setattr(lifecycle, "load", load)
    follower.look()
    registered.champion = make("3")
    follower.look()  # another champion, the challenger stays the same
    registered.champion = damaged
    follower.look()
    registered.champion = make("2")
    follower.look()  # the challenger is promoted: it is here already
    assert told.events == [
        ("swapped", "1"),
        *[("tried", "2"), ("tried", "nobody"), ("swapped", "3"), ("tried", "2")],
        *[("tried", "nobody"), ("refused", "damaged"), ("tried", "2")],
        *[("swapped", "2"), ("tried", "nobody")],
    ]
    assert held == [1, 1, 1, 1, 1]


# -- the registry -------------------------------------------------------------------------------------------------------


def test_the_registry_is_asked_at_most_once_in_an_age_and_remembered_while_it_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(deployments, "time", SimpleNamespace(monotonic=lambda: now))
    registry = Registry(default_tracking_uri(str(tmp_path)), "cllmr")
    for name in ("a", "b"):
        registry.register(name * 16, "/store", f"train/{name * 16}/bundle", {})
        registry.promote(name * 16)
    champions = [Target("2", "b" * 16, "/store"), Target("1", "a" * 16, "/store")]
    replica = RegistryReplica(registry.tracking_uri, "cllmr", max_age_s=0.5)

    async def asked_at_once() -> list[list[Target]]:
        return await asyncio.gather(*(replica.champions() for _ in range(20)))

    assert asyncio.run(asked_at_once()) == [champions] * 20
    registry.rollback()
    assert asyncio.run(replica.champions()) == champions
    now = 0.6
    assert asyncio.run(replica.champions()) == [Target("1", "a" * 16, "/store")]
    (tmp_path / "mlflow.db").write_bytes(b"no database")
    now = 1.2
    down = RegistryReplica(registry.tracking_uri, "cllmr", max_age_s=0)
    with capture_logs() as logs:
        assert asyncio.run(replica.champions()) == [Target("1", "a" * 16, "/store")]
        assert [asyncio.run(down.champions()) for _ in range(3)] == [[]] * 3
    assert [entry["event"] for entry in logs] == ["registry does not answer"] * 2


def test_a_registry_that_hangs_keeps_nobody_from_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "REGISTRY_PATIENCE_SECONDS", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    async def ask() -> list[list[Target]]:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers; its end ends them
            replica = RegistryReplica(f"http://127.0.0.1:{silent.getsockname()[1]}", "cllmr", max_age_s=0)
            replica._champions = [Target("1", "a" * 16, "/store")]  # of earlier
            return [await asyncio.wait_for(replica.champions(), 5) for _ in range(3)]

    assert asyncio.run(ask()) == [[Target("1", "a" * 16, "/store")]] * 3


def test_what_was_measured_of_a_model_is_told_until_another_version_answers() -> None:
    metrics, before = ScorerMetrics(), None
    for version, fingerprint in (("1", "a"), ("2", "b"), ("2", "c")):
        now = Target(version, fingerprint, "/store")
        metrics.swapped(before, now)
        metrics.measured(now, Exactness())
        told = sorted(dict(tags)["by"] for tags in metrics.overlap._values if dict(tags)["model_version"] == version)
        assert (len(metrics.overlap._values), told) == (3, ["index", "lists", "storage"])
        before = now

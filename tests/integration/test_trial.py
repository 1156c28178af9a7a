"""A challenger on trial as it is deployed: from a Serve configuration, changed while it runs, with a real registry.

Canary and shadow, a challenger that is refused, and replicas that are the same before and after every change.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import ray
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from components.artifacts import Manifest
from components.registry import Registry, default_tracking_uri
from components.serve.config import ServeConfig
from components.serve.stage import serve_document
from serving.client import Client
from serving.run import prepare_endpoint, stop_endpoint, wait_until_ready
from serving.scorer import Scorer
from serving.settings import Trial, place
from tests.load import Load, metric, train
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

USERS = [f"u{row}" for row in range(50)]
SHARE = 0.4


@dataclass(frozen=True)
class World:
    root: str
    registry: Registry
    trained: list[Manifest]
    url: str

    def deploy(self, mode: str, share: float) -> None:
        """As ``serve deploy`` does it."""
        settings = ServeConfig(trial=Trial.model_validate({"mode": mode, "share": share}), poll_interval_s=0.5)
        champion = {"version": "1", "fingerprint": self.trained[0].fingerprint, "storage_root": self.root, "bundle": ""}
        document = serve_document(settings, champion, None, self.registry.tracking_uri, self.registry.model_name)
        client: Any = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(document))

    def versions(self) -> dict[str, str]:
        """Which model answers which user, each asked together with all others."""
        with Client(self.url, timeout=60) as client:
            return {result.user_id: result.model_version for result in client.recommend(USERS, 5).results}

    def wait_for(self, version: str) -> None:
        """Until one model answers every user."""
        wait_until(f"version {version} for everybody", lambda: set(self.versions().values()), lambda seen: seen == {version})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = str(tmp_path_factory.mktemp("store"))
    registry = Registry(default_tracking_uri(root), "cllmr")
    trained = [train(root, seed) for seed in range(3)]
    for manifest in trained[:2]:
        registry.register(manifest.fingerprint, root, f"train/{manifest.fingerprint}/bundle", {})
    registry.promote(trained[0].fingerprint)
    damaged = trained[2].path() / "bundle" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    try:
        found = World(root, registry, trained, f"http://127.0.0.1:{prepare_endpoint(port=0).result()}")
        found.deploy("off", 0.0)
        wait_until_ready(found.url)
        yield found
    finally:
        stop_endpoint()


def replicas() -> set[str]:
    return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "#Scorer#" in actor["name"]}


def test_a_challenger_is_tried_compared_and_dropped_without_a_restart_or_a_failed_request(world: World) -> None:
    before, challenger = replicas(), world.trained[1].fingerprint
    assert len(before) == 1
    with Load(world.url) as load:
        load.wait_for("1")
        assert set(world.versions().values()) == {"1"}
        world.deploy("canary", SHARE)
        tried = {user: "2" if place(user, challenger) < SHARE else "1" for user in USERS}
        assert set(tried.values()) == {"1", "2"}
        wait_until("the trial", world.versions, lambda versions: versions == tried)
        assert world.versions() == tried  # and they stay where they are
        scorers = {str(number): Scorer.load(world.trained[number - 1].path() / "bundle") for number in (1, 2)}
        with Client(world.url, timeout=60) as client:
            for user in USERS[:10]:
                assert client.recommend([user], 5).model_version == tried[user]
                scored = client.score(user, ["i3"], debias=0.5)
                assert scored.model_version == tried[user]
                expected = scorers[tried[user]].score_all([int(user[1:])], 0.5)[0][3]
                assert scored.scores[0].score == pytest.approx(expected, abs=1e-5)
        ours = {"model_version": "2", "method": "personalised", "reason": "none"}
        wait_until("counted answers", lambda: metric("cllmr_answers_total", **ours))
        assert metric("cllmr_challenger_info", model_version="2") == 1
        world.deploy("shadow", 1.0)
        world.wait_for("1")
        compared = metric("cllmr_shadow_overlap_count_total", model_version="2")
        wait_until(
            "comparisons",
            lambda: metric("cllmr_shadow_overlap_count_total", model_version="2"),
            lambda count: count > compared + 50,
        )
        assert metric("cllmr_shadow_score_difference_count_total", model_version="2") > 0
        world.deploy("canary", 0.0)
        wait_until("the end of the trial", lambda: metric("cllmr_challenger_info", model_version="2"), lambda info: info == 0)
        assert set(world.versions().values()) == {"1"}
    assert {status for answers in load.answers for status, *_ in answers} == {200}
    assert replicas() == before


def test_a_refused_challenger_leaves_the_champion_to_everybody(world: World) -> None:
    fingerprint = world.trained[2].fingerprint
    world.registry.register(fingerprint, world.root, f"train/{fingerprint}/bundle", {})
    world.deploy("canary", 1.0)
    wait_until("the refusal", lambda: metric("cllmr_refused_bundles_total", model_version="3"), lambda count: count == 1)
    assert set(world.versions().values()) == {"1"}
    assert metric("cllmr_off_champion") == 0


def test_a_challenger_that_a_rollback_withdrew_is_not_tried_again(world: World) -> None:
    world.registry.register(world.trained[1].fingerprint, world.root, f"train/{world.trained[1].fingerprint}/bundle", {})
    world.wait_for("2")  # tried on everybody
    world.registry.promote(world.trained[1].fingerprint)
    wait_until(
        "the new champion",
        lambda: httpx.get(f"{world.url}/v1/model", timeout=60).json()["model_version"],
        lambda version: version == "2",
    )
    world.registry.rollback()
    world.wait_for("1")
    assert world.registry.challenger() is None

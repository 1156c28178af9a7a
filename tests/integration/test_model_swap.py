"""Another champion under load: served without a restart and without a failed request, refused when it is damaged, rolled back.

One endpoint as it is deployed, a real registry, and clients that never pause.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import httpx
import pytest
import ray
import yaml

from components.artifacts import Manifest
from components.registry import Registry, default_tracking_uri
from components.serve.config import ServeConfig
from components.serve.stage import serve_document
from serving.client import Client
from serving.run import running_endpoint
from tests.load import Load, metric, metrics, train
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

SEEN_WITHIN = 60.0  # seconds from a command to answers of the other model, on a busy machine


@dataclass(frozen=True)
class World:
    root: str
    registry: Registry
    trained: list[Manifest]

    def cllmr(self, *command: str) -> None:
        subprocess.run([sys.executable, "-m", "pipelines.cli", *command, "--storage", self.root], check=True, timeout=300)


@pytest.fixture(scope="module", params=["apart", "together"])
def composition(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def world(composition: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = str(tmp_path_factory.mktemp("store"))
    registry = Registry(default_tracking_uri(root), "cllmr")
    trained = [train(root, seed) for seed in range(3)]
    for manifest in trained:
        registry.register(manifest.fingerprint, root, f"train/{manifest.fingerprint}/bundle", {})
    registry.promote(trained[0].fingerprint)
    damaged = trained[2].path() / "bundle" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # the last number is now NaN
    return World(root, registry, trained)


@pytest.fixture(scope="module")
def url(composition: Any, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Together with Serve's options for throughput, as far as it offers them without HAProxy."""
    settings = ServeConfig(composition=composition)
    champion = {"version": "1", "fingerprint": world.trained[0].fingerprint, "storage_root": world.root, "bundle": ""}
    document = serve_document(settings, champion, None, world.registry.tracking_uri, world.registry.model_name)
    config = tmp_path_factory.mktemp("serve") / "serve.yaml"
    config.write_text(yaml.safe_dump(document))
    with pytest.MonkeyPatch.context() as patch:
        if composition == "together":
            patch.setenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
        with running_endpoint(config, port=0) as url:
            yield url


def test_models_are_swapped_refused_and_rolled_back_under_load_without_a_failed_request(url: str, world: World) -> None:
    with Load(url) as load:
        load.wait_for("1")
        world.registry.promote(world.trained[1].fingerprint)
        load.wait_for("2", SEEN_WITHIN)
        world.registry.promote(world.trained[2].fingerprint)
        wait_until("the refusal", lambda: metric("cllmr_refused_bundles_total", model_version="3"), lambda count: count == 1)
        assert metric("cllmr_off_champion") == 1
        time.sleep(5)  # it is asked for again and again, and neither served nor told again
        world.cllmr("rollback")
        wait_until("the champion", lambda: metric("cllmr_off_champion"), lambda off: off == 0)
        world.cllmr("rollback")
        load.wait_for("1", SEEN_WITHIN)
        time.sleep(1)
    answers = [answer for client in load.answers for answer in client]
    assert {status for status, *_ in answers} == {200}
    assert all(header == body for _, header, body, _ in answers)
    for client in load.answers:
        assert [version for version, _ in groupby(header for _, header, _, _ in client)] == ["1", "2", "1"]
    assert max(seconds for *_, seconds in answers) < SEEN_WITHIN
    wait_until("both swaps", lambda: metric("cllmr_model_swaps_total"), lambda count: count == 2)
    assert metric("cllmr_refused_bundles_total", model_version="3") == 1  # counted once, though asked for many times
    given = {version: sum(body == version for _, _, body, _ in answers) for version in "12"}

    def counted() -> dict[str, float]:
        ours = {"method": "personalised", "reason": "none"}
        return {version: metric("cllmr_answers_total", model_version=version, **ours) for version in "12"}

    wait_until("all answers", counted, lambda counts: counts == given)  # Ray exports them some seconds later
    assert [metric("cllmr_model_info", model_version=version) for version in "12"] == [1, 0]


def test_the_model_route_tells_what_is_deployed_from_what_is_served(url: str, world: World) -> None:
    with Client(url, timeout=60) as client:
        world.registry.promote(world.trained[1].fingerprint)
        wait_until("the swap", lambda: client.model().model_version, lambda seen: seen == "2", SEEN_WITHIN)
        answer = client.model()
    assert (answer.deployed_version, answer.model.name) == ("1", "random")


def test_requests_are_counted_by_what_they_met(url: str) -> None:
    with Client(url, timeout=60) as client:
        version = client.model().model_version
        before = metrics()
        client.recommend(["nobody"], 5)
        client.score("u1", ["what", "i1"])
        client.explain("nobody", "what")

    def grown(name: str, **labels: str) -> float:
        return metric(name, **labels) - before.get((name, frozenset(labels.items())), 0.0)

    def counted() -> dict[str, float]:
        of = {"model_version": version}
        return {
            "unknown items": grown("cllmr_unknown_ids_total", **of, kind="item"),
            "unknown users": grown("cllmr_unknown_ids_total", **of, kind="user"),
            "popular": grown("cllmr_answers_total", **of, method="popularity", reason="unknown_user"),
            "head": grown("cllmr_recommended_items_total", **of, group="head"),
            "tail": grown("cllmr_recommended_items_total", **of, group="tail"),
        }

    # popularity shows nothing but the head; every process exports its own counts, and at its own time
    expected = {"unknown items": 2, "unknown users": 2, "popular": 1, "head": 5, "tail": 0}
    wait_until("all counts", counted, lambda counts: all(counts[name] >= number for name, number in expected.items()))
    assert counted() == expected
    for stage, route in (("model", "/v1/score"), ("scorer", "/v1/explain"), ("features", "/v1/recommend")):
        assert metric("cllmr_stage_latency_ms_count", stage=stage, route=route) > 0, (stage, route)


def test_labels_hold_no_user_and_no_item(url: str) -> None:
    (node,) = ray.nodes()
    with Client(url, timeout=60) as client:
        client.recommend(["somebody-private"], 5, recent={"somebody-private": ["an-item-of-theirs"]})
    text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60).text
    assert "ray_cllmr_answers_total" in text
    assert "somebody-private" not in text
    assert "an-item-of-theirs" not in text


def kill(deployment: str) -> None:
    """Kills every replica of a deployment; Serve starts others."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if f"#{deployment}#" in actor["name"]:
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


def test_the_replica_that_asks_the_registry_may_die_and_no_request_notices(url: str, world: World) -> None:
    with Client(url, timeout=60) as client, Load(url) as load:
        load.wait_for(client.model().model_version)
        kill("Registry")
        world.registry.promote(world.trained[0].fingerprint)
        load.wait_for("1")
        world.registry.promote(world.trained[1].fingerprint)
        load.wait_for("2", SEEN_WITHIN)
    assert {status for answers in load.answers for status, *_ in answers} == {200}


def test_a_replica_that_starts_late_begins_with_the_champion_and_not_with_what_was_deployed(
    url: str, world: World, composition: str
) -> None:
    """Serve starts another replica for one that died; the registry's champion is 2, the configuration names 1."""
    kill("Scorer" if composition == "apart" else "Gateway")
    versions = []

    def ask() -> list[str]:
        response = httpx.post(f"{url}/v1/recommend", json={"users": ["u1"]}, timeout=60)
        if response.headers.get("x-degraded") in ("scorer_unavailable", "scorer_timeout"):
            assert {result["method"] for result in response.json()["results"]} == {"static"}
        elif response.status_code == 200:
            versions.append(response.headers["x-model-version"])
        return versions

    wait_until("answers of a model", ask, lambda answered: len(answered) == 20)
    assert set(versions) == {"2"}

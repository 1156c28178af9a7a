"""From promote's verdict to an endpoint that uses the feature store: the serve stage, and what it wrote, run."""

import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from components.artifacts import Manifest, Store, write_json
from components.errors import ArtifactError, ConfigError
from components.features import stage as features_stage
from components.promote.config import PromoteConfig
from components.registry import Registry, default_tracking_uri
from components.serve import stage
from components.serve.config import ServeConfig
from components.stages import Stage, run_stage
from feature_repo.store import sqlite_path
from serving.client import Client
from serving.run import running_endpoint
from serving.schemas import Event
from tests.bundles import stored_bundle, write_bundle
from tests.features_parents import EVENTS, ITEMS, USERS, Small
from tests.waiting import wait_until

REGISTRY = "http://mlflow:5000"
KEPT = {
    "verdict": "kept",
    "reasons": [
        {"check": "coverage", "passed": False, "text": "coverage 0.004 is below 0.01"},
        {"check": "popularity", "passed": True, "text": "better than popularity"},
    ],
    "challenger": "0" * 16,
    "champion": None,
}


class Verdict(PromoteConfig):
    """A stand-in for the promote stage."""

    name: str
    """So that others have other fingerprints."""


@dataclass(frozen=True)
class World:
    """A storage root with everything that the serve stage reads."""

    root: str
    features: Manifest
    train: Manifest
    promote: Manifest

    def serve(self, **config: Any) -> Manifest:
        """Runs the stage."""
        return stage.run(config, self.root, features=self.features, promote=self.promote)


def promoted(root: str, train: Manifest) -> dict[str, Any]:
    champion = {
        "version": "3",
        "fingerprint": train.fingerprint,
        "storage_root": root,
        "bundle": f"train/{train.fingerprint}/bundle",
    }
    return {"verdict": "promoted", "reasons": [], "challenger": train.fingerprint, "champion": champion}


def decide(root: str, verdict: dict[str, Any], name: str) -> Manifest:
    def build(directory: Path) -> dict[str, Any]:
        write_json(directory / "verdict.json", verdict)
        return {}

    return run_stage(Stage("promote", 1), Verdict(name=name), root, {}, build)


def train(root: str, features: Manifest, name: str, feature_fingerprint: str | None = None) -> Manifest:
    """The tiny bundle for the users "7", "9", "10"; bob's row, which saw items 1 and 2 in training, is "9"."""
    items = [{"item_id": item, "title": f"Film {item}", "profile": ""} for item in ITEMS]
    header = {"feature_fingerprint": feature_fingerprint or features.fingerprint, "feature_project": "small"}
    write = partial(write_bundle, header=header, users=USERS, items=items)
    return stored_bundle(root, write, name, {"features": features})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = str(tmp_path_factory.mktemp("store"))
    features = features_stage.run({}, root, **Small(root).write().as_arguments())
    trained = train(root, features, "champion")
    return World(root, features, trained, decide(root, promoted(root, trained), "promoted"))


def test_the_configuration_names_the_champion_and_its_feature_set(world: World) -> None:
    manifest = world.serve(scorer={"num_replicas": 3}, feature_deadline_ms=50)
    assert manifest.facts == {
        "model_version": "3",
        "bundle": f"{world.root}/train/{world.train.fingerprint}/bundle",
        "train": world.train.fingerprint,
        "features": world.features.fingerprint,
        "golden_requests": 3,
        "endpoint": "/v1/recommend",
    }
    document = yaml.safe_load((manifest.path() / "serve.yaml").read_text())
    (application,) = document["applications"]
    assert (application["import_path"], application["route_prefix"]) == ("serving.app:build_app", "/")
    args = application["args"]
    assert (args["storage_root"], args["train"], args["features"], args["model_version"]) == (
        world.root,
        world.train.fingerprint,
        world.features.fingerprint,
        "3",
    )
    assert args["registry"] == {
        "tracking_uri": f"sqlite:///{world.root}/mlflow.db",
        "model_name": "cllmr",
        "poll_interval_s": 2.0,
    }
    assert (args["scorer"]["num_replicas"], args["gateway"]["num_replicas"], args["feature_deadline_ms"]) == (3, 1, 50)


def test_a_champion_that_lies_elsewhere_now_is_configured_anew(world: World, tmp_path: Path) -> None:
    before, root = world.serve(), str(tmp_path / "renamed")
    shutil.copytree(world.root, root)

    def again(directory: Path) -> dict[str, Any]:
        write_json(directory / "verdict.json", promoted(root, world.train))
        return {}

    promote = run_stage(Stage("promote", 1), Verdict(name="promoted"), root, {}, again, lambda made: False)
    features = Store(root).find("features", world.features.fingerprint)
    assert features is not None
    moved = stage.run({}, root, features=features, promote=promote)
    assert moved.fingerprint == before.fingerprint
    assert moved.facts["bundle"] == before.facts["bundle"].replace(world.root, root)


def test_no_champion_is_followed_where_that_is_set() -> None:
    champion = {"version": "1", "fingerprint": "0" * 16, "storage_root": "/store", "bundle": "b"}
    document = stage.serve_document(ServeConfig(poll_interval_s=0), champion, None, "http://mlflow:5000", "cllmr")
    assert document["applications"][0]["args"]["registry"] is None


@pytest.mark.parametrize(
    ("mode", "share", "is_half"), [("canary", 0.0, True), ("off", 0.5, True), ("off", 0.0, False), ("shadow", 0.5, False)]
)
def test_half_a_trial_is_told_of(
    mode: str, share: float, is_half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLLMR_EVENTS", str(events := tmp_path / "events.jsonl"))
    champion = {"version": "1", "fingerprint": "0" * 16, "storage_root": "/store", "bundle": "b"}
    config = ServeConfig.parse({"trial": {"mode": mode, "share": share}}, "serve")
    document = stage.serve_document(config, champion, None, "http://mlflow:5000", "cllmr")
    assert document["applications"][0]["deployments"][0]["user_config"] == {"mode": mode, "share": share}
    told = f"serve.trial.mode = '{mode}' with serve.trial.share = {share:g} tries nobody: set both, or neither"
    assert (events.exists() and told in events.read_text()) == is_half


def test_host_and_port_decide_nothing_that_the_stage_writes(world: World) -> None:
    assert world.serve(host="0.0.0.0", port=9000).fingerprint == world.serve().fingerprint
    assert world.serve(feature_deadline_ms=51).fingerprint != world.serve().fingerprint


def test_a_challenger_that_was_kept_back_and_no_champion_before_it_is_an_error_with_the_reason(world: World) -> None:
    promote = decide(world.root, KEPT, "kept")
    told = r"there is no model to serve: .*\(coverage 0.004 is below 0.01\).*--set promote"
    with pytest.raises(ArtifactError, match=told):
        stage.run({}, world.root, features=world.features, promote=promote)


def test_a_champion_whose_feature_set_is_gone_is_refused(world: World) -> None:
    trained = train(world.root, world.features, "orphan", feature_fingerprint="f" * 16)
    promote = decide(world.root, promoted(world.root, trained), "orphan")
    with pytest.raises(ArtifactError, match=f"feature set {'f' * 16} of bundle .*cllmr run --from features"):
        stage.run({}, world.root, features=world.features, promote=promote)


def test_a_damaged_champion_is_refused(world: World) -> None:
    trained = train(world.root, world.features, "damaged")
    file = trained.path() / "bundle" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # the last number is now NaN
    promote = decide(world.root, promoted(world.root, trained), "damaged")
    with pytest.raises(ArtifactError, match=r"model.safetensors is not what its manifest says"):
        stage.run({}, world.root, features=world.features, promote=promote)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"composition": "alone"}, "setting 'serve.composition' = 'alone': Input should be 'apart' or 'together'"),
        ({"prt": 1}, r"unknown setting 'serve.prt'\. Did you mean 'port'\?"),
        ({"scorer": {"replicas": 2}}, r"unknown setting 'serve.scorer.replicas'\. Did you mean 'num_replicas'\?"),
        ({"port": 70000}, "setting 'serve.port' = 70000"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(world: World, config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        world.serve(**config)


def test_a_field_that_ray_serve_does_not_know_is_not_written() -> None:
    document = stage.serve_document(
        ServeConfig(),
        {"version": "1", "fingerprint": "0" * 16, "storage_root": "/store", "bundle": "b"},
        None,
        REGISTRY,
        "cllmr",
    )
    stage.check_document(document)
    document["applications"][0]["route_prefx"] = "/"
    with pytest.raises(ValueError, match="ServeApplicationSchema has no field route_prefx"):
        stage.check_document(document)


# -- the written configuration, run; the last tests take the feature store away and bring another ---------------------


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    # a generous deadline: these tests are about what is answered, on a machine that may be busy
    config = world.serve(feature_deadline_ms=10_000).path() / "serve.yaml"
    with running_endpoint(config, port=0) as url:
        yield url


@pytest.mark.ray
def test_the_first_answer_already_leaves_out_the_online_history(url: str) -> None:
    response = httpx.post(f"{url}/v1/recommend", json={"users": ["9", "7", "nobody"], "k": 4}, timeout=60)
    assert "x-degraded" not in response.headers
    nine, seven, nobody = response.json()["results"]
    # "9" saw rows 1, 2 in training by the bundle, and rows 2, 0 by its online history: only row 3 is left
    assert [item["item_id"] for item in nine["items"]] == [ITEMS[3]]
    # "7" saw row 0 by the bundle and rows 3, 0, 1 (the last one a test interaction) by its online history
    assert [item["item_id"] for item in seven["items"]] == [ITEMS[2]]
    assert (nobody["method"], len(nobody["items"])) == ("popularity", 4)
    # the interactions are of 2001
    assert [result["history"] for result in (nine, seven, nobody)] == ["stale", "stale", None]


@pytest.mark.ray
def test_the_model_route_says_that_features_are_ready(url: str) -> None:
    with Client(url, timeout=60) as client:
        answer = client.model()
    assert (answer.model_version, answer.model.name, answer.features.state) == ("3", "tiny", "ready")


@pytest.mark.ray
def test_liked_items_of_the_online_history_explain_a_score(url: str) -> None:
    with Client(url, timeout=60) as client:
        answer = client.explain("7", ITEMS[2], num_neighbours=5)
    assert {neighbour.item_id for neighbour in answer.nearest_liked_items} == {ITEMS[0], ITEMS[1], ITEMS[3]}
    assert answer.history == "stale"


@pytest.mark.ray
def test_events_are_kept_in_sqlite_too_and_a_model_that_cannot_fold_them_in_leaves_them_out(url: str) -> None:
    with Client(url, timeout=60) as client:
        now = int(time.time())
        told = client.tell([Event(user_id=user, item_id=ITEMS[0], timestamp=now) for user in ("10", "newcomer")])
        assert (told.model_version, told.statuses, told.unknown_items) == ("3", ["stored", "stored"], [])
        ten, newcomer = client.recommend(["10", "newcomer"], 4).results
    # "10" saw rows 1 and 3 by its history
    assert [item.item_id for item in ten.items] == [ITEMS[2]]
    assert (newcomer.method, newcomer.reason) == ("popularity", "unknown_user")
    assert ITEMS[0] not in {item.item_id for item in newcomer.items}
    assert (ten.history, newcomer.history) == ("stale", "fresh")


@pytest.mark.ray
def test_without_the_feature_store_answers_are_degraded_and_say_so(url: str, world: World) -> None:
    with sqlite3.connect(sqlite_path(world.root, world.features.facts["project"])) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            connection.execute(f'DROP TABLE "{table}"')
    response = httpx.post(f"{url}/v1/recommend", json={"users": ["9"], "k": 4}, timeout=60)
    assert response.status_code == 200
    assert response.headers["x-degraded"] == "features_unavailable"
    (result,) = response.json()["results"]
    assert [item["item_id"] for item in result["items"]] == [ITEMS[3]]  # by the history last known
    assert result["history"] == "last_good"
    assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200


@pytest.mark.ray
def test_histories_follow_a_new_champion_to_its_own_feature_set(url: str, world: World) -> None:
    """The new one's history of "7" has the one item that was left; the store of the old one is gone by now."""
    later = Small(world.root, name="later", events=[*EVENTS, (0, 2, 1_000_000_950, "train")])
    features = features_stage.run({}, world.root, **later.write().as_arguments())
    trained = train(world.root, features, "later")
    registry = Registry(default_tracking_uri(world.root), "cllmr")
    registry.register(trained.fingerprint, world.root, f"train/{trained.fingerprint}/bundle", {})
    registry.promote(trained.fingerprint)
    seen = []

    def ask() -> tuple[str, str | None, list[str]]:
        response = httpx.post(f"{url}/v1/recommend", json={"users": ["7"], "k": 4}, timeout=60)
        assert response.status_code == 200
        items = sorted(item["item_id"] for item in response.json()["results"][0]["items"])
        seen.append((response.headers["x-model-version"], response.headers.get("x-degraded"), items))
        return seen[-1]

    wait_until("the new champion's history", ask, lambda answer: answer == ("1", None, []))
    assert seen[0] == ("3", "features_unavailable", [ITEMS[2]])  # by the history last known
    assert httpx.get(f"{url}/v1/model", timeout=60).json()["features"] == {"state": "ready", "reason": None}

"""The pipeline with everything a cluster has at once, on one machine: artifacts in an S3 store, models in PostgreSQL, features
in Redis, a Ray cluster of two nodes with a token that does the heavy stages through its Jobs API and serves the result.

What can be taken from the manifests is: Redis' configuration, PostgreSQL's databases, the pipeline's settings, Feast's
feature_store.yaml with the job that uses it, and serveConfigV2. Only addresses, passwords and the data set are others here.
Each process has a cache of its own, so that what passes between them has passed through the store.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest
import yaml

from components.artifacts import Manifest, Store
from serving.client import Client
from serving.run import wait_until_ready
from tests import REPOSITORY
from tests.k8s.manifests import Object, config_of, declared_secrets, job_command, named, needs_kubectl, overlay, redis_config
from tests.planted import block_world
from tests.ray_nodes import HEADERS, TOKEN, RayCluster, lose_node, ray_cluster
from tests.stores import (
    PASSWORD,
    free_ports,
    needs_postgres,
    needs_redis,
    needs_s3,
    postgres_server,
    redis_server,
    s3_server,
)
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(3000),
    needs_kubectl,
    needs_redis,
    needs_postgres,
    needs_s3,
]

SMALL = {
    "spectrum": {"rank": 4},
    "train": {
        "model": {"embedding_dim": 8, "num_negatives": 16, "max_aligned_nodes": 32},
        # small batches and a checkpoint at every epoch make training last long enough to be interrupted
        "batch_size": 16,
        "max_epochs": 8,
        "evaluate_every": 1,
        "patience": 8,
        "recipe": {
            "members": ["graph", "ease", "popularity"],
            "graph_settings": [],
            "ease_l2": [30.0, 100.0],
            "ease_side_weight": [1.0],
        },
        "seed": 5,
    },
    "evaluate": {"baselines": ["popularity"], "bootstrap_samples": 100},
}


@dataclass(frozen=True)
class World:
    """The servers, and how a process finds them."""

    folder: Path
    objects: list[Object]
    environment: dict[str, str]
    """Of whatever stands for a pod: addresses and credentials."""
    tracking_uri: str
    cluster: RayCluster

    @property
    def launch(self) -> dict[str, Any]:
        """Where the heavy stages are done."""
        return {"backend": "jobs", "address": self.cluster.dashboard, "resync_s": 0.5}

    def settings(self) -> list[Path]:
        """The manifest's settings with the tracker's address, and the data set with what suits its size."""
        manifest, small = self.folder / "settings.yaml", self.folder / "small.yaml"
        text = config_of(self.objects, "pipeline", "settings.yaml")
        assert "http://mlflow:5000" in text
        manifest.write_text(text.replace("http://mlflow:5000", self.tracking_uri))
        heavy = {stage: {"launch": self.launch} for stage in ("sideinfo", "train")}
        actors = {"sideinfo": {"encoder_actors": 1}}  # each loads the text model; test_embedding_actors.py has two
        small.write_text(yaml.safe_dump({**SMALL, **planted("s3://cllmr/raw"), **actors, "placement": heavy}))
        return [manifest, small]


def planted(folder: str) -> dict[str, Any]:
    """Settings of ingest for the planted data set in a folder."""
    paths = {name: f"{folder}/{name}.csv" for name in ("interactions", "items")}
    return {"ingest": {"source": "files", "name": "planted", "k_core": 1, **paths}}


def write_planted(store: Store) -> None:
    """Three blocks of users who like the items of their block."""
    world = block_world(num_blocks=3, users_per_block=12, items_per_block=15, keep=0.9)
    users, items = world.train
    interactions = pd.DataFrame({"user_id": users, "item_id": items, "rating": 5})
    films = pd.DataFrame({"item_id": range(world.num_items)})
    films["title"] = "Film " + films["item_id"].astype(str)
    films["genres"] = [f"genre {block}" for block in world.item_block]
    for name, table in (("interactions", interactions), ("items", films)):
        store.write_note(table.to_csv(index=False), f"{name}.csv")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, objects = tmp_path_factory.mktemp("world"), overlay("prod")
    with ExitStack() as servers, pytest.MonkeyPatch.context() as patch:
        (folder / "s3").mkdir()
        aws = servers.enter_context(s3_server(folder / "s3", bucket="cllmr"))
        for name, value in {**aws, "CLLMR_CACHE": str(folder / "cache" / "test")}.items():
            patch.setenv(name, value)  # this process reads what the others wrote
        (folder / "redis").mkdir()
        redis = servers.enter_context(redis_server(folder / "redis", redis_config(objects, folder / "redis", PASSWORD)))
        postgres = servers.enter_context(postgres_server(config_of(objects, "postgres", "databases.sql")))
        feast_uri = declared_secrets()["postgres"]["feast-uri"]
        environment = {
            **aws,
            "CLLMR_ONLINE_STORE": redis,
            "PGPASSWORD": PASSWORD,  # so that the tracker's address is no secret, and the endpoint may follow it
            "FEAST_REGISTRY": feast_uri.replace("postgres:REPLACE-ME@postgres:5432", postgres),
        }
        nodes = {**environment, "CLLMR_CACHE": str(folder / "cache" / "ray")}
        # as in the manifests: the head has the drivers, the worker their work
        cluster = servers.enter_context(ray_cluster(cpus=(0, 4), environment=nodes))
        tracking_uri = f"postgresql+psycopg://postgres@{postgres.rpartition('@')[2]}/mlflow"
        write_planted(Store("s3://cllmr/raw"))
        yield World(folder, objects, environment, tracking_uri, cluster)


def called(command: list[str], environment: dict[str, str], folder: Path) -> None:
    """Runs a command that ends well, in a working directory of its own."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CLLMR_"))}
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=1400,
        cwd=folder,
        env={**variables, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def cllmr(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("cllmr")), *arguments]


def with_files(files: list[Path]) -> list[str]:
    return [part for file in files for part in ("--config", str(file))]


def steps(world: World) -> dict[str, str]:
    """The environment of the pipeline's steps."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    return {**world.environment, **token, "CLLMR_CACHE": str(world.folder / "cache" / "steps")}


@pytest.fixture(scope="module")
def there(world: World) -> dict[str, Any]:
    """The summary of the run with everything."""
    file = world.folder / "there.json"
    command = cllmr("run", "--preset", "cluster", *with_files(world.settings()), "--no-ask", "--json", str(file))
    called(command, steps(world), world.folder / "steps")
    return dict(json.loads(file.read_text()))


def artifact(summary: dict[str, Any], stage: str, root: str = "s3://cllmr/artifacts") -> Manifest:
    found = Store(root).find(stage, summary["stages"][stage]["fingerprint"])
    assert found is not None
    return found


def jobs(world: World) -> dict[str, str]:
    """Status by stage, of all jobs of the cluster; of several of one stage the last."""
    listed = httpx.get(f"{world.cluster.dashboard}/api/jobs/", headers=HEADERS, timeout=60).json()
    ours = [job for job in listed if (job["metadata"] or {}).get("stage")]
    return {job["metadata"]["stage"]: job["status"] for job in sorted(ours, key=lambda job: job["start_time"])}


def test_the_model_and_its_metrics_are_those_of_the_run_on_this_machine(
    world: World, there: dict[str, Any], tmp_path: Path
) -> None:
    write_planted(Store(str(tmp_path / "raw")))
    small, file = tmp_path / "small.yaml", tmp_path / "here.json"
    small.write_text(yaml.safe_dump({**SMALL, **planted(str(tmp_path / "raw"))}))
    root = str(tmp_path / "root")
    command = cllmr("run", "--config", str(small), "--storage", root, "--until", "promote", "--no-ask", "--json", str(file))
    called(command, {}, tmp_path)
    here = json.loads(file.read_text())
    for stage in ("ingest", "sideinfo", "spectrum"):  # the features' online store is another, and so all after them
        assert artifact(here, stage, root).files == artifact(there, stage).files
    trained = [artifact(*of).files for of in ((here, "train", root), (there, "train"))]
    tensors = [name for name in trained[0] if name.endswith(".safetensors")]
    assert "bundle/model.safetensors" in tensors
    assert [trained[0][name] for name in tensors] == [trained[1][name] for name in tensors], "the same bytes"
    paths = [artifact(*of).path() / "metrics.json" for of in ((here, "evaluate", root), (there, "evaluate"))]
    measured = [json.loads(path.read_text()) for path in paths]
    for figures in ("results", "bias"):
        assert measured[0][figures] == measured[1][figures]
    assert here["verdict"]["verdict"] == there["verdict"]["verdict"] == "promoted"


def test_the_heavy_stages_were_jobs_of_the_ray_cluster_and_leave_nothing_but_their_artifacts(
    world: World, there: dict[str, Any]
) -> None:
    assert jobs(world) == {"sideinfo": "SUCCEEDED", "train": "SUCCEEDED"}
    store = Store("s3://cllmr/artifacts")
    assert [one.fingerprint for one in store.outputs("train")] == [there["stages"]["train"]["fingerprint"]]
    assert not [path for path, _, _ in store.files("train") if "/.work-" in path], "checkpoints of a finished training"
    steps_cache = world.folder / "cache" / "steps"
    assert not list(steps_cache.rglob(".work-*")), "training keeps nothing on the launcher's machine"


def test_the_manifests_serve_configuration_serves_the_model(world: World, there: dict[str, Any]) -> None:
    written = yaml.safe_load((artifact(there, "serve").path() / "serve.yaml").read_text())
    text = yaml.safe_load(named(world.objects, "RayService", "serving")["spec"]["serveConfigV2"])
    (application,) = text["applications"]
    application["args"] |= {name: written["applications"][0]["args"][name] for name in ("train", "features", "model_version")}
    application["args"]["registry"]["tracking_uri"] = world.tracking_uri
    assert text == written, "what the serve stage writes is what the manifest has"

    (port,) = free_ports(1)
    document = {**text, "proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    address = f"{world.cluster.dashboard}/api/serve/applications/"
    httpx.put(address, headers=HEADERS, json=document, timeout=60).raise_for_status()
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, 400)
        with Client(url, timeout=60) as client:
            # a busy machine may load it for long
            wait_until("Feast", lambda: client.model().features, lambda now: now.state == "ready", 300)
            model, answer = client.model(), client.recommend(["0", "nobody"], k=5)
        assert model.model_version == "1"
        known, new = answer.results
        assert (known.method, known.cold, len(known.items)) == ("personalised", False, 5)
        assert (new.cold, len(new.items)) == (True, 5)
        response = httpx.post(f"{url}/v1/recommend", json={"users": ["0"], "k": 5}, timeout=60)
        assert (response.status_code, response.headers.get("x-degraded")) == (200, None), "Redis has been read"
    finally:
        httpx.delete(address, headers=HEADERS, timeout=120)


def test_the_job_materialise_registers_in_postgres_and_refills_for_the_champion_a_redis_that_was_lost(
    world: World, there: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from feast import FeatureStore

    from components.features.online import redis_client

    store_file = world.folder / "feature_store.yaml"
    store_file.write_text(config_of(world.objects, "feast", "feature_store.yaml"))
    for _ in range(2):  # every half hour: the second time nothing is to be done
        called(job_command(world.objects, "catalogue", store_file), steps(world), world.folder / "steps")
    for name in ("FEAST_REGISTRY", "CLLMR_ONLINE_STORE"):
        monkeypatch.setenv(name, world.environment[name])
    catalogue = FeatureStore(fs_yaml_file=store_file)
    assert {view.name for view in catalogue.list_feature_views()} >= {"user_history", "item_side_information"}

    client = redis_client()
    full = client.dbsize()
    assert full
    client.flushall()
    settings, serve_file = world.settings()[0], world.folder / "serve.yaml"
    serve_file.write_text(config_of(world.objects, "serve-config", "serve.yaml"))
    command = job_command(world.objects, "materialise", store_file, settings, serve_file)
    called(command, steps(world), world.folder / "steps")
    assert client.dbsize() == full
    assert len(Store("s3://cllmr/artifacts").outputs("features")) == 1


TRAIN = """
import json, sys
from components.artifacts import Manifest
from components.launch import launch
config, root, *parents = sys.argv[1:]
launch("train", json.loads(config), root, {one.stage: one for one in map(Manifest.read, parents)})
"""


def checkpoints(store: Store) -> set[str]:
    """The checkpoints of unfinished trainings that are whole."""
    return {
        path.rpartition("/")[0] for path, _, _ in store.files("train") if path.endswith("/state.json") and "/.work-" in path
    }


def test_a_worker_node_that_is_taken_away_costs_the_epochs_since_the_newest_checkpoint_and_nothing_else(
    world: World, there: dict[str, Any], tmp_path: Path
) -> None:
    parents = []
    for stage in ("ingest", "features"):
        artifact(there, stage).write(tmp_path / f"{stage}.json")
        parents.append(str(tmp_path / f"{stage}.json"))
    trained, store = artifact(there, "train"), Store("s3://cllmr/preempted")
    variables = {**os.environ, **steps(world), "PYTHONPATH": str(REPOSITORY)}
    variables |= {"CLLMR_LAUNCH": json.dumps(world.launch), "CLLMR_RUN_ID": "preempted"}
    config = {**trained.config, "effect": "none"}  # the first of the two trainings of before, which is enough to lose a node
    command = [sys.executable, "-c", TRAIN, json.dumps(config), store.root, *parents]
    with open(tmp_path / "log.txt", "w") as log:
        launcher = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(
            "two checkpoints",
            lambda: (launcher.poll(), checkpoints(store)),
            lambda seen: seen[0] is not None or len(seen[1]) >= 2,
            600,
        )
        text = (tmp_path / "log.txt").read_text()
        assert launcher.poll() is None, f"it ended before it could be interrupted: {text[-3000:]}"
        lose_node(world.cluster.nodes[-1])
        before = epochs(tmp_path / "log.txt")
        world.cluster.start_node(4)
        assert launcher.wait(600) == 0, (tmp_path / "log.txt").read_text()[-4000:]
    finally:
        launcher.kill()
    told = epochs(tmp_path / "log.txt")
    assert len(before) < 8, "too late to say anything"  # the log lags behind the checkpoints
    assert (told.count(1), told[-1]) == (1, 8), f"it started over: {told}"
    (again,) = store.outputs("train")
    assert again.files["side_representations.safetensors"] == trained.files["side_representations.safetensors"]


def epochs(log: Path) -> list[int]:
    """Epochs of the graph model's first run that a job's log tells, in order; it tells some of its lines more than once."""
    form = r'"done": (\d+),[^\n]*"unit": "epochs", "model": "graph, factual"[^\n]*"timestamp": "([^"]+)"'
    found = {(when, int(done)) for done, when in re.findall(form, log.read_text())}
    return [done for _, done in sorted(found)]

"""The train stage on Ray: one seed is one bundle, however often the run was interrupted.

A small data set goes through the real stages before it; only the text encoder is a stand-in. Every training run is a process
of its own, as under a pipeline, so that it can be killed as one is.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

from components.artifacts import Manifest
from components.cllmr.linear.ease import centred_unit_rows
from components.features import stage as features_stage
from components.ids import TRAIN
from components.ingest import stage as ingest_stage
from components.ingest.dataset import Dataset
from components.sideinfo import encoder
from components.sideinfo import stage as sideinfo_stage
from components.sideinfo.config import DEFAULT_ENCODER
from components.spectrum import stage as spectrum_stage
from serving.scorer import Scorer
from serving.texts import Texts
from tests import REPOSITORY
from tests.llm_server import llm_server
from tests.planted import block_world
from tests.sideinfo_parents import HashEncoder
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 6
WAIT = 240  # seconds; a busy machine takes more than a minute to start Ray's processes
CONFIG: dict[str, Any] = {
    # small batches make an epoch last long enough to be interrupted
    "model": {"embedding_dim": 8, "num_negatives": 16, "max_aligned_nodes": 32},
    "batch_size": 16,
    "max_epochs": EPOCHS,
    "evaluate_every": 1,
    "patience": EPOCHS,
    "num_workers": 2,
    "seed": 5,
    # one run of the graph model, so that what is told of it is told once
    "recipe": {"members": ["graph", "ease"], "graph_settings": [], "ease_l2": [100.0], "ease_side_weight": [12.0]},
    "effect": "none",
    "refit": False,
}
PROGRAM = """
import json, sys
from components.artifacts import Manifest
from components.train.stage import run
config, root, ingest, features, out = sys.argv[1:]
run(json.loads(config), root, ingest=Manifest.read(ingest), features=Manifest.read(features)).write(out)
"""


@dataclass
class Run:
    """One process that trains below a storage root of its own; call `start` again to go on after a kill."""

    root: Path
    process: subprocess.Popen[bytes] | None = None

    def prepare(self, **sideinfo_config: Any) -> "Run":
        """Runs the stages before."""
        self.root.mkdir()
        world = block_world(num_blocks=3, users_per_block=12, items_per_block=15, keep=0.9)
        users, items = world.train
        table = pd.DataFrame(
            {"user_id": users, "item_id": items, "rating": 5, "timestamp": 1_000_000_000 + np.arange(len(users))}
        )
        table.to_csv(self.root / "interactions.csv", index=False)
        films = pd.DataFrame({"item_id": np.arange(world.num_items)})
        films["title"] = "Film " + films["item_id"].astype(str)
        films["genres"] = [f"genre {block}" for block in world.item_block]
        films.to_csv(self.root / "items.csv", index=False)
        root = str(self.root / "store")
        config = {
            "source": "files",
            "interactions": str(self.root / "interactions.csv"),
            "items": str(self.root / "items.csv"),
            "k_core": 1,
        }
        ingest = ingest_stage.run(config, root)
        sideinfo = sideinfo_stage.run(sideinfo_config, root, ingest=ingest)
        spectrum = spectrum_stage.run({"rank": 4}, root, ingest=ingest)
        features = features_stage.run({}, root, ingest=ingest, sideinfo=sideinfo, spectrum=spectrum)
        ingest.write(self.root / "ingest.json")
        features.write(self.root / "features.json")
        return self

    def start(self, config: dict[str, Any] = CONFIG) -> "Run":
        arguments = [json.dumps(config), str(self.root / "store")]
        arguments += [str(self.root / f"{name}.json") for name in ("ingest", "features", "train")]
        environment = {**os.environ, "CLLMR_EVENTS": str(self.root / "events.jsonl"), "OMP_NUM_THREADS": "1"}
        with open(self.root / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments], cwd=REPOSITORY, env=environment, stdout=log, stderr=log
            )
        return self

    def finish(self) -> Manifest:
        """Waits for a good end."""
        assert self.process is not None
        assert self.process.wait(WAIT) == 0, (self.root / "log.txt").read_text()[-4000:]
        return Manifest.read(self.root / "train.json")

    def events(self, name: str = "progress") -> list[dict[str, Any]]:
        path = self.root / "events.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def epochs(self) -> list[int]:
        """Epochs told done, in the order of their ends."""
        return [event["done"] for event in self.events() if event["unit"] == "epochs"]

    def wait_for_checkpoint(self) -> None:
        """Until one is committed.

        An epoch is told before it is reported, a report waits until Ray has taken the one before, and Ray takes one when it
        has kept the one before that: the fourth epoch's end tells that the first one's checkpoint is kept.
        """
        wait_until("four epochs", self._epochs_of_running, lambda told: len(told) >= 4, WAIT)

    def descendants(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def training_workers(self) -> list[psutil.Process]:
        return [process for process in self.descendants() if "RayTrainWorker" in " ".join(process.cmdline())]

    def kill(self) -> None:
        """SIGKILL to the stage's process. Its workers must end by themselves, or they would write beside the next run.

        Ray's own agents notice up to a minute later; they hold nothing of the run and are ended here.
        """
        assert self.process is not None
        workers, family = self.training_workers(), self.descendants()
        self.process.kill()
        self.process.wait(30)
        _, working = psutil.wait_procs(workers, timeout=60)
        for process in family:
            with suppress(psutil.NoSuchProcess):  # ended by itself
                process.kill()
        psutil.wait_procs(family, timeout=30)
        assert not working, f"these outlived the stage: {working}"

    def _epochs_of_running(self) -> list[int]:
        assert self.process is not None
        assert self.process.poll() is None, "ended too early: " + (self.root / "log.txt").read_text()[-4000:]
        return self.epochs()


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(encoder, "load", lambda name, truncate_dim: HashEncoder())
    run = Run(tmp_path / "run").prepare()
    yield run
    if run.process is not None and run.process.poll() is None:
        for process in [*run.descendants(), run.process]:
            process.kill()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, list[int]]:
    """A run that nothing happened to, and the epochs it told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "load", lambda name, truncate_dim: HashEncoder())
        run = Run(tmp_path_factory.mktemp("unbroken") / "run").prepare()
    return run.start().finish(), run.epochs()


def digests(manifest: Manifest) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in manifest.files.items()}


def test_a_run_tells_every_epoch_and_writes_a_bundle_and_its_curve(unbroken: tuple[Manifest, list[int]]) -> None:
    """That the same run in another place writes the same bytes, those that are killed below show."""
    manifest, epochs = unbroken
    assert epochs == list(range(1, EPOCHS + 1))
    bundle = {"model.safetensors", "bundle.json", "golden.json", "text.safetensors", "attributes.parquet"}
    assert {"curve.json", *(f"bundle/{name}" for name in bundle)} <= set(manifest.files)


def test_the_bundle_has_the_texts_that_training_had_and_names_their_encoder(unbroken: tuple[Manifest, list[int]]) -> None:
    directory = unbroken[0].path() / "bundle"
    texts = Texts(directory, Scorer.load(directory))
    assert texts.encoder == DEFAULT_ENCODER
    told = [item["profile"] for item in json.loads((directory / "items.json").read_text())]
    embeddings = encoder.unit_rows(np.float32(HashEncoder().encode(told)))
    read = texts.read()
    np.testing.assert_allclose(read.side, centred_unit_rows(embeddings), atol=1e-3)  # half precision
    np.testing.assert_allclose(read.rows(embeddings, told).side, centred_unit_rows(embeddings), atol=1e-4)


def test_nothing_but_the_artifact_is_left_of_a_finished_run(unbroken: tuple[Manifest, list[int]]) -> None:
    manifest, _ = unbroken
    below = Path(manifest.storage_root) / "train"
    assert [path.name for path in below.iterdir()] == [manifest.fingerprint]


def test_a_training_that_begins_with_another_ones_table_begins_where_that_one_was_best(
    unbroken: tuple[Manifest, list[int]], tmp_path: Path
) -> None:
    cold, _ = unbroken
    shutil.copytree(Path(cold.storage_root).parent, tmp_path / "run")
    config = {**CONFIG, "warm_start": cold.fingerprint, "max_epochs": 2}
    warm = Run(tmp_path / "run").start(config).finish()
    assert (warm.config["warm_start"], warm.facts["warm_start"]) == (cold.fingerprint, cold.fingerprint)
    assert json.loads((warm.path() / "training.json").read_text())["nodes_known_at_start"] == 36 + 45
    before, after = (json.loads((one.path() / "curve.json").read_text()) for one in (cold, warm))
    assert [point["epoch"] for point in after] == [0, 1, 2]
    assert after[0]["recall@20"] == max(point["recall@20"] for point in before)
    assert warm.facts["validation"]["ndcg@10"] > 0
    assert cold.facts["warm_start"] == "none"


def test_what_is_served_has_learned_from_all_and_what_is_evaluated_from_the_training_interactions(
    unbroken: tuple[Manifest, list[int]], tmp_path: Path
) -> None:
    without, _ = unbroken
    shutil.copytree(Path(without.storage_root).parent, tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").unlink()
    run = Run(tmp_path / "run").start({**CONFIG, "refit": True})
    manifest = run.finish()
    best = manifest.facts["best_epoch"]
    assert run.epochs() == [*range(1, EPOCHS + 1), *range(1, best + 1)]
    assert digests(manifest)["evaluated/model.safetensors"] == digests(without)["bundle/model.safetensors"]
    assert not any(name.startswith("evaluated/") for name in without.files)
    dataset = Dataset.load(Manifest.read(run.root / "ingest.json").path())
    evaluated, served = (Scorer.load(manifest.path() / name) for name in ("evaluated", "bundle"))
    for scorer, learned in ((evaluated, dataset.matrix(TRAIN)), (served, dataset.matrix())):
        assert [scorer.seen(user).tolist() for user in range(36)] == [
            row.tolist() for row in np.split(learned.indices, learned.indptr[1:-1])
        ]
    assert manifest.facts["learned_from"] == {"evaluated": dataset.matrix(TRAIN).nnz, "served": dataset.matrix().nnz}
    assert served.bundle["members"] == evaluated.bundle["members"]
    assert served.replay_golden() > 0


def test_a_run_whose_worker_is_killed_ends_with_the_same_bundle(unbroken: tuple[Manifest, list[int]], prepared: Run) -> None:
    prepared.start().wait_for_checkpoint()
    workers = prepared.training_workers()
    assert len(workers) == CONFIG["num_workers"]
    before = len(prepared.epochs())
    assert before < EPOCHS, "too late to say anything"
    workers[-1].send_signal(signal.SIGKILL)
    manifest = prepared.finish()
    after = prepared.epochs()[before:]
    assert after[-1] == EPOCHS
    assert min(after) > 1, "it started over instead of going on from a checkpoint"
    assert manifest.storage_root != unbroken[0].storage_root
    assert digests(manifest) == digests(unbroken[0])


def test_a_killed_stage_that_is_run_again_goes_on_and_ends_with_the_same_bundle(
    unbroken: tuple[Manifest, list[int]], prepared: Run
) -> None:
    prepared.start().wait_for_checkpoint()
    prepared.kill()
    before = prepared.epochs()
    assert before[-1] < EPOCHS, "too late to say anything"
    assert not (prepared.root / "train.json").exists()
    manifest = prepared.start().finish()
    after = prepared.epochs()[len(before) :]
    assert 1 < after[0] <= before[-1] + 1, f"done before the kill: {before}, after it: {after}"
    assert after == list(range(after[0], EPOCHS + 1))
    assert digests(manifest) == digests(unbroken[0])


def test_what_the_llm_writes_without_evidence_is_taken_out_by_the_counterfactual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "load", lambda name, truncate_dim: HashEncoder())
    with llm_server() as llm:
        run = Run(tmp_path / "run").prepare(backend="openai", model="tiny", base_url=llm.base_url)
    recipe = {**CONFIG["recipe"], "members": ["ease"]}  # so that no workers are started
    done = run.start({**CONFIG, "effect": "reference_texts", "recipe": recipe}).finish()
    scorer = Scorer.load(done.path() / "bundle")
    assert scorer.bundle["effect"] == "reference_texts"
    assert 0 < scorer.propensity.mean() < 1
    users = np.arange(5)
    assert np.abs(scorer.score_all(users, debias=1.0) - scorer.score_all(users, debias=0.0)).max() > 1e-3

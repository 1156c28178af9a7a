"""Batch scoring over Ray Data: the table is what the endpoint answers, a broken run goes on, and wrong input is named."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import yaml

from components.artifacts import Manifest, Store
from components.batch import stage
from components.batch.config import BatchConfig
from components.errors import ArtifactError, ConfigError, DataError, LaunchError
from components.ingest.config import IngestConfig
from components.registry import Registry, default_tracking_uri
from components.stages import Stage, fingerprint, run_stage
from pipelines.batch_scoring import batch_scoring
from pipelines.config import load
from pipelines.plan import compile_pipeline
from serving import lists
from serving.client import Client
from serving.run import running_endpoint
from serving.scorer import Scorer
from tests.bundles import stored_bundle, write_bundle, write_random_bundle

pytestmark = pytest.mark.ray

NUM_USERS = 250


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def trained(root: str) -> Manifest:
    return stored_bundle(root, partial(write_random_bundle, num_users=NUM_USERS, num_items=150))


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Known and unknown ones, one of them twice."""
    path = tmp_path_factory.mktemp("users") / "users.csv"
    path.write_text("user_id,name\n" + "".join(f"u{row},x\n" for row in (7, 3, 200)) + "stranger,y\nu3,x\n007,z\n")
    return path


@pytest.fixture(scope="module")
def scored(root: str, trained: Manifest) -> Manifest:
    return stage.run({"train": trained.fingerprint, "users_per_part": 60, "num_workers": 2, "k": 12}, root)


def table(manifest: Manifest) -> pd.DataFrame:
    return pq.read_table(manifest.path() / stage.TABLE_DIRECTORY).to_pandas()


def test_every_user_has_the_ranking_of_the_scorer(scored: Manifest, trained: Manifest) -> None:
    assert scored.facts == {
        "model_version": trained.fingerprint,
        "k": 12,
        "num_users": NUM_USERS,
        "num_rows": 12 * NUM_USERS,
        "num_cold": 0,
        "num_parts": 5,
    }
    assert scored.parents == {"train": trained.fingerprint}
    scorer, rows = Scorer.load(trained.path() / "bundle"), table(scored)
    assert list(dict.fromkeys(rows["user_id"])) == scorer.user_vocabulary.ids
    for user in range(NUM_USERS):
        of_user = rows[12 * user : 12 * (user + 1)]
        expected = scorer.recommend(user, 12, exclude=scorer.seen(user))
        assert of_user["item_id"].tolist() == [f"i{row}" for row in expected.rows]
        assert of_user["rank"].tolist() == list(range(1, 13))
        np.testing.assert_allclose(of_user["score"], expected.scores, atol=1e-5)


def test_a_user_without_training_interactions_is_cold_and_has_no_list(tmp_path: Path) -> None:
    trained = stored_bundle(str(tmp_path), write_bundle)
    scored = stage.run({"train": trained.fingerprint, "num_workers": 1, "k": 2}, str(tmp_path))
    assert scored.facts["num_cold"] == 1
    assert table(scored).groupby("user_id")["method"].first().to_dict() == {
        "ann": "personalised",
        "bob": "personalised",
        "cat": "popularity",
    }
    assert lists.read(scored, Scorer.load(trained.path() / "bundle")).lengths.tolist() == [2, 2, 0]


def test_the_same_again_is_reused_whoever_scores(
    scored: Manifest, root: str, trained: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "score_parts", lambda *_: pytest.fail("scored again"))
    again = stage.run({"train": trained.fingerprint, "users_per_part": 60, "num_workers": 1, "k": 12}, root)
    assert again == scored


def test_a_run_that_died_goes_on_with_what_is_missing(
    scored: Manifest, root: str, trained: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"train": trained.fingerprint, "users_per_part": 60, "k": 12, "exclude_seen": False}
    name = fingerprint(stage.STAGE, BatchConfig.parse(config, "batch").identity(), {"train": trained.fingerprint})
    shelf = Store(root).shelf("batch", f".work-{name}")
    shelf.create_dir("/", recursive=True)
    done = (scored.path() / stage.TABLE_DIRECTORY / stage.part_name(60)).read_bytes()  # of a run with other settings
    for file, content in ((stage.part_name(60), done), (f".{stage.part_name(120)}-of-a-dead-run", b"half of a part")):
        with shelf.open_output_stream(file) as stream:
            stream.write(content)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left on device"):
            stage.run(config, root)
    monkeypatch.setattr(stage, "ray_session", lambda **_: pytest.fail("scored again"))
    found = stage.run(config, root)
    assert found.fingerprint == name
    assert (found.path() / stage.TABLE_DIRECTORY / stage.part_name(60)).read_bytes() == done  # not scored again
    assert sorted(file.name for file in (found.path() / stage.TABLE_DIRECTORY).iterdir()) == [
        stage.part_name(start) for start in range(0, NUM_USERS, 60)
    ]
    assert found.facts["num_rows"] == 12 * NUM_USERS
    assert not (Path(root) / "batch" / f".work-{name}").exists()


def score_here(
    parts: dict[str, list[str]], settings: BatchConfig, trained: Manifest, model_version: str, root: str, name: str
) -> None:
    """As `stage.score_parts` does, in this process."""
    scorer = stage.PartScorer(settings, trained.storage_root, trained.fingerprint, model_version, root, name)
    for part, users in parts.items():
        scorer({"name": part, "users": users})


def test_the_same_part_twice_at_once_is_whole(root: str, trained: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    both, tables = Barrier(2, timeout=60), stage.PartScorer._tables

    def together(scorer: stage.PartScorer, users: list[str]) -> Iterator[pa.Table]:
        both.wait()  # each has its file open
        return tables(scorer, users)

    monkeypatch.setattr(stage.PartScorer, "_tables", together)
    settings, shelf = BatchConfig(k=3), Store(root).shelf("batch", ".work-twice")
    shelf.create_dir("/", recursive=True)
    with ThreadPoolExecutor(2) as runs:
        parts = ({"part.parquet": ["u1", "u2"]} for _ in range(2))
        for done in [runs.submit(score_here, part, settings, trained, "1", root, "twice") for part in parts]:
            done.result()
    assert [info.path for info in shelf.get_file_info(pafs.FileSelector("/"))] == ["part.parquet"]
    assert len(pq.read_table(shelf.open_input_file("part.parquet"))) == 6


def test_the_same_batch_twice_at_once_ends_with_the_table_of_whichever_was_first(
    root: str, trained: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"train": trained.fingerprint, "k": 4}
    first: list[Manifest] = []

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(stage, "score_parts", score_here)
        first.append(stage.run(config, root))
        score_here(*arguments)  # into a folder that the other run has taken away

    monkeypatch.setattr(stage, "score_parts", overtaken)
    assert stage.run(config, root) == first[0]
    assert len(table(first[0])) == 4 * NUM_USERS


def test_the_table_equals_what_the_endpoint_answers_for_the_champion_and_a_list_of_users(
    root: str, trained: Manifest, users: Path, tmp_path: Path
) -> None:
    models = Registry(default_tracking_uri(root), "cllmr")
    models.register(trained.fingerprint, root, f"train/{trained.fingerprint}/bundle", {})
    champion = models.promote(trained.fingerprint)
    manifest = stage.run({"users": str(users), "k": 10, "debias": 0.3}, root)
    rows = table(manifest)
    assert manifest.facts["model_version"] == champion.version
    assert manifest.facts["num_cold"] == 2
    asked = ["u7", "u3", "u200", "stranger", "007"]
    assert list(dict.fromkeys(rows["user_id"])) == asked
    values = {"storage_root": root, "train": trained.fingerprint, "model_version": champion.version}
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump({"applications": [{"import_path": "serving.app:build_app", "args": values}]}))
    with running_endpoint(config, port=0) as url, Client(url, timeout=60) as client:
        answer = client.recommend(asked, k=10, debias=0.3)
    for result in answer.results:
        of_user = rows[rows["user_id"] == result.user_id]
        assert of_user["item_id"].tolist() == [item.item_id for item in result.items]
        np.testing.assert_allclose(of_user["score"], [item.score for item in result.items], atol=1e-5)
        assert set(of_user["method"]) == {result.method}


def test_what_cannot_be_scored_is_named(root: str, trained: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="train artifact 0123 is not below"):
        stage.run({"train": "0123"}, root)
    with pytest.raises(ArtifactError, match="no model is champion"):
        stage.run({"model_name": "nobody"}, root)
    with pytest.raises(ConfigError, match=r"setting 'batch.k' = 0"):
        stage.run({"k": 0}, root)
    with pytest.raises(DataError, match="there is no file of users"):
        stage.run({"train": trained.fingerprint, "users": str(tmp_path / "none.csv")}, root)
    for text, told in (
        ("user\nu1\n", "has no column 'user_id'; columns seen: user"),
        ("user_id,name\n,x\nNone,y\n", r"no user of file '.*users\.csv' is usable: 2 rows, rejected as missing_user_id 2\."),
    ):
        file = tmp_path / "users.csv"
        file.write_text(text)
        with pytest.raises(DataError, match=told):
            stage.run({"train": trained.fingerprint, "users": str(file)}, root)


def test_where_ray_cannot_start_that_is_told(root: str, trained: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/ray")
    with pytest.raises(LaunchError, match=r"Ray cannot start on this machine: .*Not a directory: '/dev/null/ray'"):
        stage.run({"train": trained.fingerprint, "k": 3}, root)


def test_the_pipeline_has_one_task_that_asks_the_registry_of_promote() -> None:
    settings = load("local", [], ["promote.model_name=books", "promote.tracking_uri=http://mlflow:5000", "batch.k=7"])
    pipeline = compile_pipeline(batch_scoring(settings))
    assert pipeline.stages() == ["batch"]
    given = pipeline.spec["root"]["inputDefinitions"]["parameters"]["batch_config"]["defaultValue"]
    assert (given["k"], given["model_name"], given["tracking_uri"]) == (7, "books", "http://mlflow:5000")
    assert BatchConfig.parse(given, "batch") == settings.batch_of_champion()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([44, 45, 44], pa.int64()),
        pa.array([44.0, 45.0, 45.0]),  # as pandas has ids as soon as one is missing
        pa.array([" 44", "45 ", "44"]),
        pa.array(["44", "45", "45"]).dictionary_encode(),
    ],
    ids=["integer", "float", "spaces", "dictionary"],
)
def test_ids_are_read_as_ingest_reads_them(column: pa.Array, trained: Manifest, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": column}), tmp_path / "users.parquet")
    settings = BatchConfig.parse({"users": str(tmp_path / "users.parquet")}, "batch")
    assert stage.read_users(settings, trained) == ["44", "45"]
    (tmp_path / "users.tsv").write_text("\ufeffuser_id\tname\n" + "".join(f"{one}\tx\n" for one in column.to_pylist()))
    if not pa.types.is_floating(column.type):
        settings = BatchConfig.parse({"users": str(tmp_path / "users.tsv")}, "batch")
        assert stage.read_users(settings, trained) == ["44", "45"]


def test_quotation_marks_are_read_as_the_models_data_were(root: str, tmp_path: Path) -> None:
    data = run_stage(Stage("ingest", version=1), IngestConfig(quoting="none"), root, {}, lambda directory: {})
    unquoted = stored_bundle(root, write_bundle, "unquoted", {"ingest": data})
    (tmp_path / "users.csv").write_text('user_id\n"anna"\n')
    assert stage.read_users(BatchConfig(users=str(tmp_path / "users.csv")), unquoted) == ['"anna"']


def test_rows_without_a_usable_id_are_left_out_and_told(
    trained: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(stage, "emit", lambda event, **fields: told.append(fields["message"]))
    pq.write_table(pa.table({"user_id": pa.array([44.0, None, 45.0])}), tmp_path / "users.parquet")
    (tmp_path / "users.csv").write_text(f"user_id\n44\nnan\nNone\n45\n{'x' * 257}\n")
    for name, left_out in (("parquet", "missing_user_id 1"), ("csv", "missing_user_id 2, user_id_too_long 1")):
        file = tmp_path / f"users.{name}"
        assert stage.read_users(BatchConfig(users=str(file)), trained) == ["44", "45"]
        assert told.pop().endswith(f"rows of file '{file}' name no user, and are left out: {left_out}")

"""The whole platform as a stranger meets it: ``cllmr run`` on the sample, run again, asked, rolled back. Minutes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.ids import TEST, TRAIN
from components.ingest.dataset import Dataset
from pipelines.local import absolute_root

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3000)]

# without what takes minutes and is tested by itself: tuning AlphaRec is most of an evaluation, epochs are half of a training
BASELINES = "evaluate.baselines=[popularity, ials, ease, ease_text, lightgcn]"
RUN = ("run", "--set", BASELINES, "--set", "train.max_epochs=16")
STAGES = ["ingest", "sideinfo", "spectrum", "features", "train", "evaluate", "promote", "serve"]


def cllmr(*arguments: str, storage: Path, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "cllmr"), *arguments, "--storage", str(storage)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=2400,
    )
    assert done.returncode == expected, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("platform") / "storage"


@pytest.fixture(scope="module")
def first(storage: Path) -> tuple[str, dict[str, Any]]:
    """Standard output and JSON summary of the first run."""
    file = storage.parent / "first.json"
    done = cllmr(*RUN, "--json", str(file), storage=storage)
    return done.stdout, json.loads(file.read_text(encoding="utf-8"))


def test_the_run_ends_with_the_table_the_report_two_rankings_and_what_to_type_next(first: tuple[str, dict[str, Any]]) -> None:
    printed, _ = first
    for wanted in ("Popularity", "EASE", "iALS", "LightGCN", "CLLMR factual", "CLLMR debiased", "report: ", "liked last: "):
        assert wanted in printed
    assert "without debiasing" in printed
    assert "cllmr serve" in printed


def test_the_summary_names_sizes_times_memory_metrics_and_the_verdict(first: tuple[str, dict[str, Any]]) -> None:
    _, summary = first
    text = json.dumps(summary)
    assert list(summary["stages"]) == STAGES
    for stage in summary["stages"].values():
        assert stage["seconds"] >= 0
        assert stage["peak_memory_mb"] < 4 * 1024, "the promise is a machine with 4 GiB"
    for wanted in ("effective_rank", "verdict", "bundle", "versions"):
        assert wanted in text


def test_the_recommender_beats_its_backbone_and_debiasing_costs_nothing_where_no_llm_has_written(
    first: tuple[str, dict[str, Any]], storage: Path
) -> None:
    metrics = json.loads(next(storage.glob("evaluate/*/metrics.json")).read_text(encoding="utf-8"))
    ndcg = {name: found["ndcg@10"]["mean"] for name, found in metrics["results"].items()}
    assert ndcg["debiased"] > 1.5 * ndcg["popularity"]
    assert ndcg["debiased"] > 1.05 * ndcg["lightgcn"]  # five seeds: 1.10 to 1.14
    assert ndcg["debiased"] > ndcg["ials"], "the strongest baseline"  # five seeds: 1.022 to 1.034
    assert abs(ndcg["debiased"] / ndcg["factual"] - 1) < 0.03  # five seeds: at most 0.017


def test_no_interaction_is_both_trained_on_and_tested(first: tuple[str, dict[str, Any]], storage: Path) -> None:
    dataset = Dataset.load(next(path for path in storage.glob("ingest/*") if not path.name.startswith(".")))
    assert dataset.matrix(TRAIN).multiply(dataset.matrix(TEST)).nnz == 0


def test_a_second_run_reuses_everything_and_says_so(first: tuple[str, dict[str, Any]], storage: Path) -> None:
    file = storage.parent / "second.json"
    done = cllmr(*RUN, "--no-ask", "--json", str(file), storage=storage)
    assert "nothing changed: all 8 stages were reused" in done.stderr
    again = json.loads(file.read_text(encoding="utf-8"))
    assert all(stage["reused"] for stage in again["stages"].values())
    assert again["stages"].keys() == first[1]["stages"].keys()


def test_offline_rankings_equal_those_that_came_over_http(first: tuple[str, dict[str, Any]], storage: Path) -> None:
    file = storage.parent / "offline.json"
    example = first[1]["example"]
    cllmr("recommend", example["user_id"], "--compare", "--json", str(file), storage=storage)
    offline = json.loads(file.read_text(encoding="utf-8"))["results"][0]
    online = example["answer"]["results"][0]
    for ranking in ("items", "factual"):
        assert [item["item_id"] for item in offline[ranking]] == [item["item_id"] for item in online[ranking]]
        scores = [item["score"] for item in online[ranking]]
        assert [item["score"] for item in offline[ranking]] == pytest.approx(scores, abs=1e-5)


def test_a_port_that_is_taken_is_one_line_with_the_fix(first: tuple[str, dict[str, Any]], storage: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = cllmr("serve", "--port", port, storage=storage, expected=2)
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_rollback_without_an_earlier_champion_says_so(first: tuple[str, dict[str, Any]], storage: Path) -> None:
    done = cllmr("rollback", storage=storage, expected=2)
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_shows_all_stages_done(first: tuple[str, dict[str, Any]], storage: Path) -> None:
    printed = cllmr(*RUN, "--dry-run", storage=storage).stdout
    assert all(stage in printed for stage in STAGES)
    assert absolute_root(str(storage)) in printed.replace("\n", "")

"""A real vLLM on the CPU, with a tiny model: as a server behind backend 'openai', and run by backend 'vllm' on Ray."""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from components.sideinfo import encoder
from components.sideinfo.backends import Backend, Request
from components.sideinfo.openai import OpenAIBackend
from components.sideinfo.stage import run
from tests import REPOSITORY
from tests.integration.backend_contract import DECODING, ROWS, BackendContract, rows
from tests.sideinfo_parents import SMALL, HashEncoder, write_ingest
from tests.vllm_server import NAME, PYTHON, VLLMServer, environment, make_model, needs_vllm, vllm_server
from tests.waiting import wait_until

pytestmark = [needs_vllm, pytest.mark.timeout(1800)]  # of a busy machine: vLLM alone starts in 20 s to 4 min


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny", tmp_path_factory.mktemp("model"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_backend_on_ray_passes_the_same_suite_in_its_own_environment(model: Path, tmp_path: Path) -> None:
    command = [
        str(PYTHON),
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "--timeout=800",
        "tests/integration/vllm_on_ray.py",
    ]
    variables = environment() | {"CLLMR_TINY_MODEL": str(model)}
    for _ in range(2):  # seldom a check of Ray 2.60's own fails and ends the process, when tasks are cancelled: run once more
        done = subprocess.run(command, env=variables, cwd=REPOSITORY, capture_output=True, text=True, timeout=850, check=False)
        told = done.stdout + done.stderr  # also of Ray's workers
        if "discovered a bug in Ray" not in told:
            break
    assert done.returncode == 0, told[-8000:]
    assert not [text for text in ("Title: Film", "Say who would enjoy it", "long long") if text in told]


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    with vllm_server(model, tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running


class TestServer(BackendContract):
    @pytest.fixture(scope="class")
    def backend(self, server: VLLMServer) -> Backend:
        return OpenAIBackend(server.base_url, None, concurrency=8, timeout=120, attempts=2, patience=120)

    def test_requests_are_answered_side_by_side(self, backend: Backend, server: VLLMServer) -> None:
        started = time.monotonic()
        answers = backend.answers([replace(request, key=str(row)) for row, request in enumerate(rows() * 2)], DECODING)
        next(answers)
        assert server.metric("vllm:num_requests_running") > 1
        assert len(list(answers)) == 2 * ROWS - 1
        assert time.monotonic() - started < 120

    def test_requests_that_nobody_waits_for_are_cancelled_on_the_server(self, backend: Backend, server: VLLMServer) -> None:
        finished = server.metric("vllm:request_success_total")
        sent: list[Request] = []
        answers = backend.answers(
            (sent.append(request) or request for request in rows()), replace(DECODING, max_tokens=1500, schema=None)
        )
        next(answers)
        answers.close()  # type: ignore[attr-defined]  # a generator
        wait_until("no running request", lambda: server.metric("vllm:num_requests_running"), lambda count: count == 0)
        assert server.metric("vllm:request_success_total") - finished < len(sent)
        written = server.metric("vllm:generation_tokens_total")
        assert len(list(backend.answers(rows()[:1], DECODING))) == 1  # it goes on with others
        assert server.metric("vllm:generation_tokens_total") - written < DECODING.max_tokens

    def test_the_beginning_that_all_requests_share_is_read_once(self, backend: Backend, server: VLLMServer) -> None:
        hits, queries = (server.metric(f"vllm:prefix_cache_{name}_total") for name in ("hits", "queries"))
        system = "Say who would enjoy it, and why. " * 20
        list(backend.answers([replace(request, system=system) for request in rows()], DECODING))
        gained = server.metric("vllm:prefix_cache_hits_total") - hits
        assert gained > 0.6 * (server.metric("vllm:prefix_cache_queries_total") - queries)


def test_the_stage_runs_through_and_accounts_for_every_row(
    server: VLLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights write nonsense, which is rejected or not; no row is lost either way."""
    monkeypatch.setattr(encoder, "load", lambda name, truncate_dim: HashEncoder())
    settings = {"backend": "openai", "model": NAME, "base_url": server.base_url, "max_words": 8, "min_coverage": 0.0}
    done = run({**settings, "repair_attempts": 1}, str(tmp_path), ingest=write_ingest(tmp_path, SMALL))
    quarantined = pq.read_table(done.path() / "quarantine.parquet").to_pylist()
    written = sum(
        text is not None
        for name in ("items", "users", "references")
        for text in pq.read_table(done.path() / f"{name}.parquet")["profile"].to_pylist()
    )
    assert written + len(quarantined) == done.facts["rows"]
    assert (done.facts["unanswered"], done.facts["quarantined"]) == (0, len(quarantined))
    assert done.facts["tokens_out"] > done.facts["asked"] > 0
    assert not {row["reason"] for row in quarantined} & {"no JSON object", "empty"}  # guided

"""A stage as a job of a Ray cluster that stands: the real Jobs API of a real `ray start --head` on loopback, with a token.

Its bad days are those of a server of the tests' own.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from structlog.testing import capture_logs

from components import jobs_api
from components.artifacts import Manifest
from components.errors import ConfigError, LaunchError
from components.job import Job, LaunchConfig
from components.jobs_api import JobsApi
from components.launch import launch
from components.spectrum.stage import run as run_spectrum
from tests import REPOSITORY
from tests.ray_nodes import HEADERS, TOKEN, ray_cluster
from tests.servers import Faulty, Refused, serving
from tests.sideinfo_parents import SMALL, write_ingest
from tests.stores import free_ports
from tests.waiting import wait_until

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of one node that asks for a token."""
    with ray_cluster(cpus=(2,)) as running:
        yield running.dashboard


# Ray reads its token once, when it is imported: every launcher is a process of its own.
LAUNCHER = """
import json, os, sys
from components import jobs_api
from components.artifacts import Manifest
from components.launch import launch
jobs_api.ENTRYPOINT = os.environ.get("TEST_ENTRYPOINT", jobs_api.ENTRYPOINT)
config, ingest = json.loads(sys.argv[1]), Manifest.read(sys.argv[2])
print(launch("spectrum", config, ingest.storage_root, {"ingest": ingest}).fingerprint)
"""


@pytest.fixture
def ingest(tmp_path: Path) -> Manifest:
    return write_ingest(tmp_path / "store", SMALL)


def start(
    cluster: str, ingest: Manifest, run: str, rank: int = 2, token: str = TOKEN, entrypoint: str | None = None, **settings: Any
) -> "subprocess.Popen[str]":
    """A launcher of the spectrum stage, in a process of its own as under a pipeline."""
    ingest.write(file := Path(ingest.storage_root) / "ingest.json")
    launch_config = {"backend": "jobs", "address": cluster, "resync_s": 0.2, "grace_s": 10, **settings}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CLLMR_"))},
        "PYTHONPATH": str(REPOSITORY),
        "CLLMR_LAUNCH": json.dumps(launch_config),
        "CLLMR_RUN_ID": run,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        **({"TEST_ENTRYPOINT": entrypoint} if entrypoint else {}),
    }
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, json.dumps({"rank": rank}), str(file)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def jobs(cluster: str, run: str) -> dict[str, str]:
    """Status by id, of the jobs of one run."""
    listed = httpx.get(f"{cluster}/api/jobs/", headers=HEADERS, timeout=60).json()
    return {job["submission_id"]: job["status"] for job in listed if (job["metadata"] or {}).get("run") == run}


def test_a_stage_done_by_a_ray_job_is_the_stage_done_here_and_is_done_once(
    cluster: str, ingest: Manifest, tmp_path: Path
) -> None:
    out, err = (first := start(cluster, ingest, "good")).communicate(timeout=300)
    assert first.returncode == 0, err
    here = run_spectrum({"rank": 2}, str(tmp_path / "here"), ingest=write_ingest(tmp_path / "here", SMALL))
    (file,) = (Path(ingest.storage_root) / "spectrum").glob("*/manifest.json")
    found = Manifest.read(file)
    assert (out.strip(), found.files) == (here.fingerprint, here.files)
    assert err.count('"fingerprint": "' + here.fingerprint) >= 2, "the job's own log, and the launcher's"

    file.unlink()  # as the launcher's image sees it, were its fingerprint another one
    out, err = (again := start(cluster, ingest, "good")).communicate(timeout=300)
    assert again.returncode == 0, err
    assert out.strip() == here.fingerprint
    assert list(jobs(cluster, "good").values()) == ["SUCCEEDED"]


def test_what_the_stage_says_in_the_job_is_what_the_launcher_raises_and_an_attempt_after_it_is_another_job(
    cluster: str, ingest: Manifest
) -> None:
    _, err = (process := start(cluster, ingest, "refused", rank=400)).communicate(timeout=300)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("components.errors.ConfigError: setting 'spectrum.rank' = 400: at most 4 with")
    (name,) = jobs(cluster, "refused")
    _, err = (process := start(cluster, ingest, "refused")).communicate(timeout=300)
    assert process.returncode == 0, err
    assert jobs(cluster, "refused") == {name: "FAILED", f"{name}-2": "SUCCEEDED"}


def test_a_crash_is_told_with_its_reason_and_the_end_of_its_log(cluster: str, ingest: Manifest) -> None:
    _, err = (process := start(cluster, ingest, "crash", entrypoint="echo out of memory; exit 137")).communicate(timeout=300)
    assert process.returncode == 1
    assert "failed: JOB_ENTRYPOINT_COMMAND_ERROR: Job entrypoint command failed with exit code 137" in err.splitlines()[-1]
    assert "Its log ends: " in err.splitlines()[-1]
    assert "out of memory" in err.splitlines()


def test_a_job_that_never_ends_is_stopped_at_its_limit(cluster: str, ingest: Manifest) -> None:
    process = start(cluster, ingest, "endless", entrypoint="echo epoch 1; sleep 600", timeout_s=5)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "was cancelled: it has been running (Job is currently running.) for 5 s. Its log ends: " in err
    assert "epoch 1" in err.splitlines()
    assert list(jobs(cluster, "endless").values()) == ["STOPPED"]


def test_a_launcher_killed_and_started_again_finds_its_job_and_sigterm_stops_it(cluster: str, ingest: Manifest) -> None:
    endless = {"entrypoint": "echo epoch 1; sleep 600"}
    first = start(cluster, ingest, "killed", **endless)
    wait_until("a running job", lambda: jobs(cluster, "killed"), lambda found: "RUNNING" in found.values())
    first.kill()
    first.communicate()
    second = start(cluster, ingest, "killed", **endless)
    assert second.stderr is not None
    lines = iter(second.stderr.readline, "")
    assert any('"event": "job attached"' in line for line in lines)
    assert any(line == "epoch 1\n" for line in lines), "the log is told from its beginning"
    assert list(jobs(cluster, "killed").values()) == ["RUNNING"]
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=300)
    assert second.returncode == 143
    assert list(jobs(cluster, "killed").values()) == ["STOPPED"]


def test_a_wrong_token_is_refused_and_told_so(cluster: str, ingest: Manifest) -> None:
    _, err = (process := start(cluster, ingest, "stranger", token="f" * 32)).communicate(timeout=300)
    assert process.returncode == 1
    assert f"components.errors.LaunchError: the Ray cluster at {cluster} refused the token: " in err
    assert jobs(cluster, "stranger") == {}


def test_an_address_where_nothing_listens_is_named(ingest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_api, "_PATIENCE_S", 0.0)
    monkeypatch.setenv("CLLMR_RUN_ID", "nobody")
    monkeypatch.setenv("CLLMR_LAUNCH", json.dumps({"backend": "jobs", "address": f"http://127.0.0.1:{free_ports(1)[0]}"}))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(LaunchError, match=r"the Ray cluster at http://127\.0\.0\.1:\d+ does not answer: .*Check the address"):
        launch("spectrum", {"rank": 2}, ingest.storage_root, {"ingest": ingest})


@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        ({}, {"address": "http://ray:8265"}, r"CLLMR_RUN_ID is not set\. A job is named after its run"),
        (
            {"CLLMR_RUN_ID": "r", "RAY_ADDRESS": "10.0.0.1:6379"},
            {"address": "http://ray:8265"},
            r"RAY_ADDRESS is set, which Ray lets win over placement\.spectrum\.launch\.address\. Unset one",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told_before_anything_is_asked(
    ingest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    settings: dict[str, str],
    message: str,
) -> None:
    for name in ("CLLMR_RUN_ID", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CLLMR_LAUNCH", json.dumps({"backend": "jobs", **settings}))
    with pytest.raises(ConfigError, match=message):
        launch("spectrum", {"rank": 2}, ingest.storage_root, {"ingest": ingest})


# -- bad days ---------------------------------------------------------------------------------------------------------------

JOB = Job("cllmr-train-0123456789ab", "run", "train", "{}")
JOBS = "/api/jobs/"


@dataclass
class JobsServer(Faulty):
    """One job of a Jobs API."""

    status: str | None = None
    """None: it was not submitted yet."""

    def answer(self, method: str, path: str) -> dict[str, Any]:
        """What Ray answers to a request."""
        if path == "/api/version":
            return {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
        if (method, path) == ("POST", JOBS):
            if self.status is not None:
                raise Refused(500, f"ValueError: Job with submission_id {JOB.name} already exists.")
            self.status = "PENDING"
            return {"submission_id": JOB.name, "job_id": JOB.name}
        if self.status is None:
            raise Refused(404, f"Job {JOB.name} does not exist")
        return {"type": "SUBMISSION", "submission_id": JOB.name, "status": self.status, "entrypoint": "x"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobsServer]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    jobs_server = JobsServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            jobs_server.requests.append((self.command, self.path))
            fault = jobs_server.fault(self.command, self.path)
            try:
                if fault and not fault.after:
                    raise Refused(fault.status, "line 404, in internal_kv_get")
                answer = jobs_server.answer(self.command, self.path)
                if fault:
                    raise Refused(fault.status, "line 404, in internal_kv_get")
                self.reply(200, json.dumps(answer))
            except Refused as refused:
                self.reply(refused.status, refused.message)

        do_POST = do_GET

        def reply(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *ignored: Any) -> None:
            return

    with serving(Handler) as jobs_server.url:
        yield jobs_server


def backend(server: JobsServer) -> JobsApi:
    return JobsApi(JOB, LaunchConfig(backend="jobs", address=server.url))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_poll_that_the_dashboard_cannot_answer_now_is_asked_again(server: JobsServer, status: int) -> None:
    server.status = "RUNNING"
    server.fail("GET", "/api/version", status)
    asking = backend(server)
    server.fail("GET", JOBS + JOB.name, status)
    assert next(asking.look(lambda: 0.0)).phase == "running"
    server.status = None
    assert next(asking.look(lambda: 0.0)).phase == "gone"


@pytest.mark.parametrize("arrived", [False, True])
def test_a_submit_that_is_answered_with_an_error_is_repeated_unless_it_has_arrived(server: JobsServer, arrived: bool) -> None:
    server.fail("POST", JOBS, 502, after=arrived)
    backend(server).attach_or_create(lambda: None, lambda: False)
    assert server.status == "PENDING"
    assert server.asked("POST", JOBS) == (1 if arrived else 2)


def test_a_refusal_is_told_at_once_and_an_answer_that_never_comes_in_the_end(
    server: JobsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = backend(server)
    server.fail("POST", JOBS, 400)
    with pytest.raises(LaunchError, match=r"was not accepted: Request failed with status code 400: .*\. Check the cluster"):
        asking.attach_or_create(lambda: None, lambda: False)
    assert server.asked("POST", JOBS) == 1
    monkeypatch.setattr(jobs_api, "_PATIENCE_S", 0.0)
    server.fail("GET", JOBS + JOB.name, 503)
    with pytest.raises(LaunchError, match=r"cannot be looked up: Request failed with status code 503: .*\. Check the cluster"):
        asking.attach_or_create(lambda: None, lambda: False)


def test_a_log_whose_job_cannot_be_looked_up_ends_with_a_warning(server: JobsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(job: str) -> AsyncIterator[str]:
        for line in ():
            yield line

    monkeypatch.setattr(jobs_api, "_PATIENCE_S", 0.0)
    asking = backend(server)
    monkeypatch.setattr(asking._client, "tail_job_logs", nothing)
    server.fail("GET", JOBS + JOB.name, 503)
    (stop := threading.Event()).set()
    with capture_logs() as logs:
        asking._read_logs(stop)
    assert "ends early: " in logs[-1]["message"]

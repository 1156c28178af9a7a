"""A stage as a RayJob: the real kubernetes client against an API server of the tests' own that has bad days."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import job, kuberay
from components.artifacts import Manifest, Store
from components.errors import ConfigError, LaunchError
from components.job import Job, LaunchConfig
from components.kuberay import phase_of
from components.launch import launch, make_job
from components.spectrum import stage as spectrum
from components.spectrum.stage import run as run_spectrum
from components.stages import Stage
from tests import REPOSITORY
from tests.crds import needs_crds
from tests.kube_server import TEMPLATE, WORKFLOW, KubeServer, kube_server, kubeconfig
from tests.sideinfo_parents import SMALL, write_ingest
from tests.waiting import wait_until

RUN = "0b7b1f0e-1111-4222-8333-444455556666"
JOBS = "/apis/ray.io/v1/namespaces/team/rayjobs"


def works(server: KubeServer, name: str) -> None:
    """The operator on a good day."""
    server.set_status(name, jobDeploymentStatus="Initializing")
    server.run(name)


def never_ends(server: KubeServer, name: str) -> None:
    server.log(name, "epoch 1")
    server.set_status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    monkeypatch.setattr(kuberay, "_PAUSE_S", 0.05)
    monkeypatch.setattr(job, "_LOG_DRAIN_S", 3.0)
    with kube_server(operator=works) as running:
        templates = tmp_path / "templates"
        templates.mkdir()
        (templates / "spectrum.yaml").write_text(TEMPLATE)
        for name, value in environment(running, tmp_path).items():
            monkeypatch.setenv(name, value)
        yield running


def environment(server: KubeServer, tmp_path: Path, pod: str = "pod-1", **settings: Any) -> dict[str, str]:
    """What the task's pod has, by its placement and the downward API."""
    launch_config = {"backend": "rayjob", "templates": str(tmp_path / "templates"), "resync_s": 1, "grace_s": 5, **settings}
    return {
        "CLLMR_LAUNCH": json.dumps(launch_config),
        "CLLMR_RUN_ID": RUN,
        "CLLMR_POD_NAME": pod,
        "KUBECONFIG": str(kubeconfig(server, tmp_path / "kubeconfig")),
    }


def configure(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    monkeypatch.setenv("CLLMR_LAUNCH", json.dumps({**json.loads(os.environ["CLLMR_LAUNCH"]), **settings}))


@pytest.fixture
def ingest(tmp_path: Path) -> Manifest:
    return write_ingest(tmp_path / "store", SMALL)


def launched(ingest: Manifest, rank: int = 2) -> Manifest:
    return launch("spectrum", {"rank": rank}, ingest.storage_root, {"ingest": ingest})


def a_job(ingest: Manifest) -> Job:
    return make_job("spectrum", {"rank": 2}, ingest.storage_root, {"ingest": ingest}, LaunchConfig(backend="rayjob"))


# -- on a good day ----------------------------------------------------------------------------------------------------------


def test_a_stage_done_by_a_rayjob_is_the_stage_done_here(
    server: KubeServer, ingest: Manifest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = launched(ingest)
    here = run_spectrum({"rank": 2}, str(tmp_path / "here"), ingest=write_ingest(tmp_path / "here", SMALL))
    assert (found.fingerprint, found.files) == (here.fingerprint, here.files)
    (job,) = server.objects.values()
    assert job["metadata"]["name"].startswith("cllmr-spectrum-")
    assert len(job["metadata"]["name"]) <= 47  # KubeRay's limit
    assert job["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "gpu",
        "cllmr.io/run": RUN,
        "cllmr.io/stage": "spectrum",
    }
    assert job["metadata"]["ownerReferences"] == [WORKFLOW]
    assert job["spec"]["activeDeadlineSeconds"] == 86400
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["OMP_NUM_THREADS"] == "1"
    told = capfd.readouterr().err
    assert '"phase": "succeeded"' in told
    assert '"event": "stage done"' in told.splitlines()[-3] + told.splitlines()[-1]


@pytest.mark.parametrize(
    "template",
    [
        (REPOSITORY / "k8s/rayjobs/train.yaml").read_text(),
        TEMPLATE.replace("spec:", "spec:\n  activeDeadlineSeconds: 21600", 1),
    ],
    ids=["shipped", "with_a_deadline"],
)
def test_the_time_a_job_may_run_is_the_setting_whatever_its_template(
    server: KubeServer, ingest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    configure(monkeypatch, timeout_s=40000.5)
    (tmp_path / "templates" / "spectrum.yaml").write_text(template)
    launched(ingest)
    (job,) = server.objects.values()
    assert job["spec"]["activeDeadlineSeconds"] == 40001


def test_a_rayjob_in_another_namespace_has_no_owner(
    server: KubeServer, ingest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes would not find the owner there, and delete the RayJob at once."""
    configure(monkeypatch, namespace="gpus")
    launched(ingest)
    (job,) = server.objects.values()
    assert (job["metadata"]["namespace"], job["metadata"]["ownerReferences"]) == ("gpus", [])


def test_what_is_done_already_starts_no_cluster(server: KubeServer, ingest: Manifest) -> None:
    run_spectrum({"rank": 2}, ingest.storage_root, ingest=ingest)
    assert launched(ingest).stage == "spectrum"
    assert server.requests == []


def test_a_stage_is_found_done_when_the_launcher_comes_back_after_its_rayjob_has_ended(
    server: KubeServer, ingest: Manifest
) -> None:
    first = launched(ingest)
    (Path(first.uri) / "manifest.json").unlink()  # as the launcher's image sees it, were its fingerprint another one
    assert launched(ingest).fingerprint == first.fingerprint
    assert len(server.created) == 1


def test_the_log_is_told_while_the_job_runs_and_once_although_its_stream_breaks(
    server: KubeServer, ingest: Manifest, capfd: pytest.CaptureFixture[str]
) -> None:
    def talks(server: KubeServer, name: str) -> None:
        server.set_status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        for number in range(6):
            server.log(name, f"line {number}")
            time.sleep(0.1)
        server.run(name)

    server.operator, server.broken_logs = talks, 2
    launched(ingest)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("line ")]
    assert told == [f"line {number}" for number in range(6)]


# -- releases that differ ---------------------------------------------------------------------------------------------------

OTHER_RELEASE = (
    r"the step asks for version {asked} of stage spectrum, and its job makes version {made}: they are of different releases\. "
    r"Upgrade the image of the job \(RayJob templates in ConfigMap cllmr-rayjobs, "
)


def test_a_job_of_another_release_refuses_before_it_works_and_an_attempt_after_it_is_another_job(
    server: KubeServer, ingest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(spectrum, "STAGE", Stage("spectrum", version=spectrum.STAGE.version + 1))
        message = OTHER_RELEASE.format(asked=spectrum.STAGE.version, made=spectrum.STAGE.version - 1)
        with pytest.raises(LaunchError, match=message):
            launched(ingest)
    assert Store(ingest.storage_root).outputs("spectrum") == []
    assert launched(ingest).version == spectrum.STAGE.version
    assert len(server.created) == 2


def test_what_a_job_wrote_that_does_not_know_what_version_is_asked_for_is_not_taken_and_made_anew_by_the_next_try(
    server: KubeServer, ingest: Manifest, tmp_path: Path
) -> None:
    made = run_spectrum({"rank": 2}, str(tmp_path / "old"), ingest=write_ingest(tmp_path / "old", SMALL))
    old = made.model_copy(update={"version": 1})

    def answers(server: KubeServer, name: str) -> None:
        Store(ingest.storage_root).write_note(json.dumps({"manifest": old.model_dump(mode="json")}), "launched", f"{name}.json")
        server.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")

    server.operator = answers
    with pytest.raises(LaunchError, match=OTHER_RELEASE.format(asked=made.version, made=1)):
        launched(ingest)
    server.operator = works  # of an image that was upgraded
    assert launched(ingest).version == made.version


# -- queues and limits ------------------------------------------------------------------------------------------------------


def test_a_job_that_kueue_holds_back_is_queued_and_told_so(
    server: KubeServer, ingest: Manifest, capfd: pytest.CaptureFixture[str]
) -> None:
    def admits(server: KubeServer, name: str) -> None:
        with server.changed:
            server.objects[name]["spec"]["suspend"] = True
        server.set_status(name, jobDeploymentStatus="Suspended")
        time.sleep(0.5)
        with server.changed:
            server.objects[name]["spec"]["suspend"] = False
        works(server, name)

    server.operator = admits
    launched(ingest)
    told = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"event": "job"' in line]
    phases = list(dict.fromkeys(one["phase"] for one in told))
    assert phases[-3:] == ["starting", "running", "succeeded"] or phases[-2:] == ["running", "succeeded"]
    assert "queued" in phases
    queued = next(one for one in told if one["phase"] == "queued" and "Suspended" in one["state"])
    assert queued["state"] == "Suspended, waiting for Kueue to admit it from queue gpu"


def test_waiting_for_admission_has_a_limit_of_its_own(
    server: KubeServer, ingest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, queue_timeout_s=0.5, timeout_s=60)
    server.operator = lambda server, name: server.set_status(name, jobDeploymentStatus="Suspended")
    with pytest.raises(
        LaunchError,
        match=r"RayJob team/cllmr-spectrum-\w+ was cancelled: it has been queued \(Suspended, waiting for Kueue .*\) for "
        r"0\.5 s\. If it needs longer, raise placement\.spectrum\.launch\.queue_timeout_s",
    ):
        launched(ingest)
    assert server.objects == {}


def test_a_job_that_never_ends_is_cancelled_at_its_limit_and_explained(
    server: KubeServer, ingest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, timeout_s=1.0)
    server.operator = never_ends
    with pytest.raises(
        LaunchError, match=r"it has been running \(Running RUNNING\) for 1 s\. Its log ends: epoch 1 .*launch\.timeout_s"
    ):
        launched(ingest)
    assert server.objects == {}
    assert len(server.created) == 1


# -- failures ---------------------------------------------------------------------------------------------------------------


def test_what_the_stage_says_in_the_job_is_what_the_launcher_raises_after_one_try(server: KubeServer, ingest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"'spectrum\.rank' = 400: at most 4 with 4 users and 5 items\. Choose a smaller"):
        launched(ingest, rank=400)
    states = [one["status"].get("jobDeploymentStatus") for _, _, one in server.events if "status" in one]
    assert states == ["Initializing", "Running", "Complete"]
    assert launched(ingest).stage == "spectrum", "an attempt after it is another job"
    assert len(server.created) == 2


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "exit\ncode 137"},
            r"failed: AppFailed: exit code 137\. Its log ends: boom See kubectl -n team describe rayjob cllmr-spectrum-",
        ),
        (
            {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "The RayJob has passed the deadline"},
            r"failed: DeadlineExceeded: The RayJob has passed the deadline\.",
        ),
        (
            {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "suspend needs shutdown"},
            r"failed: ValidationFailed: suspend needs shutdown\.",
        ),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, r"failed: Complete STOPPED\."),
    ],
)
def test_a_failure_is_told_with_reason_message_and_the_end_of_the_log(
    server: KubeServer, ingest: Manifest, status: dict[str, str], message: str
) -> None:
    def fails(server: KubeServer, name: str) -> None:
        server.log(name, "boom")
        server.set_status(name, **status)

    server.operator = fails
    with pytest.raises(LaunchError, match=message):
        launched(ingest)
    assert len(server.objects) == 1  # it has ended: left there to be looked at


def test_an_attempt_after_a_failure_replaces_the_rayjob_of_the_one_before(server: KubeServer, ingest: Manifest) -> None:
    server.operator = lambda server, name: server.set_status(name, jobDeploymentStatus="Failed", reason="AppFailed")
    with pytest.raises(LaunchError):
        launched(ingest)
    server.operator, server.deletion_s = works, 0.7
    assert launched(ingest).stage == "spectrum"
    assert len(server.created) == 2
    assert [job["status"]["jobStatus"] for job in server.objects.values()] == ["SUCCEEDED"]


def test_a_rayjob_that_somebody_deletes_is_missed(server: KubeServer, ingest: Manifest) -> None:
    def vanishes(server: KubeServer, name: str) -> None:
        never_ends(server, name)
        time.sleep(0.3)
        server._remove(name, server.objects[name])

    server.operator = vanishes
    with pytest.raises(LaunchError, match=r"was deleted by somebody else before it had ended\..*Run the step again"):
        launched(ingest)


def test_a_job_that_ends_well_and_leaves_nothing_is_not_taken_for_a_success(server: KubeServer, ingest: Manifest) -> None:
    server.operator = lambda server, name: server.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    with pytest.raises(LaunchError, match=r"has ended well but left no launched/cllmr-spectrum-\w+\.json below .*same storage"):
        launched(ingest)


def test_a_rayjob_of_the_name_that_is_not_ours_is_left_alone(server: KubeServer, ingest: Manifest) -> None:
    server.operator = never_ends
    other = yaml.safe_load(TEMPLATE)
    other["metadata"]["name"] = name = a_job(ingest).name
    with server.changed:
        server.answer("POST", JOBS, {}, other)
    with pytest.raises(LaunchError, match=r"is there already and is not of run 0b7b1f0e.*, stage spectrum\. Delete it"):
        launched(ingest)
    assert name in server.objects


# -- bad days of the API server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_throttling_or_failing_api_server_is_asked_again(server: KubeServer, ingest: Manifest, status: int) -> None:
    for method, path in (("GET", f"{JOBS}/.*"), ("POST", JOBS), ("WATCH", JOBS), ("GET", ".*/pods")):
        server.fail(method, path, status)
    launched(ingest)
    assert len(server.created) == 1


def test_a_rayjob_whose_answer_was_lost_is_found(server: KubeServer, ingest: Manifest) -> None:
    server.fail("POST", JOBS, 503, after=True)
    launched(ingest)
    assert len(server.created) == 1


@pytest.mark.parametrize("trouble", ["expired_watches", "broken_watches"])
def test_a_watch_that_expires_or_breaks_misses_nothing(server: KubeServer, ingest: Manifest, trouble: str) -> None:
    setattr(server, trouble, 3)
    launched(ingest)
    assert getattr(server, trouble) == 0


def test_a_watch_over_a_dead_connection_is_given_up(server: KubeServer, ingest: Manifest) -> None:
    server.silent_watches = 1
    began = time.monotonic()
    launched(ingest)
    assert time.monotonic() - began < 90


def test_missing_rights_are_named_and_nothing_is_waited_for(server: KubeServer, ingest: Manifest) -> None:
    server.fail("POST", JOBS, 403, times=1000)
    with pytest.raises(LaunchError, match=r"refused with 403: injected\. Give the task's service account the right to create"):
        launched(ingest)


def test_a_log_that_may_not_be_read_is_one_warning_and_no_failure(
    server: KubeServer, ingest: Manifest, capfd: pytest.CaptureFixture[str]
) -> None:
    server.fail("GET", ".*/pods", 403, times=1000)
    launched(ingest)
    assert capfd.readouterr().err.count("may not be read") == 1


@needs_crds
def test_a_template_that_the_crd_refuses_is_told_by_path(server: KubeServer, ingest: Manifest, tmp_path: Path) -> None:
    template = yaml.safe_load(TEMPLATE)
    template["spec"]["rayClusterSpec"]["headGroupSpec"]["replicaCount"] = 1
    (tmp_path / "templates" / "spectrum.yaml").write_text(yaml.safe_dump(template))
    with pytest.raises(LaunchError, match=r"422: .*headGroupSpec.*replicaCount.*Correct .*/spectrum\.yaml"):
        launched(ingest)
    assert server.objects == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"spectrum\.yaml' cannot be read: No such file or directory\. The folder has no templates"),
        ("kind: Pod\napiVersion: v1\nspec: {}", r"is \('v1', 'Pod'\), not a ray\.io/v1 RayJob with a spec"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_template_that_is_none_is_told_before_anything_is_asked(
    server: KubeServer, ingest: Manifest, tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "templates" / "spectrum.yaml"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        launched(ingest)
    assert server.created == []


# -- launchers that die -----------------------------------------------------------------------------------------------------

LAUNCHER = """
import os, sys
from components import kuberay
from components.artifacts import Manifest
from components.job import Job, LaunchConfig
from components.launch import launch, make_job
kuberay.ENTRYPOINT = os.environ.get("TEST_ENTRYPOINT", kuberay.ENTRYPOINT)
parent = Manifest.read(sys.argv[1])
print(launch("spectrum", {"rank": 2}, sys.argv[2], {"ingest": parent}).fingerprint)
"""


def start(server: KubeServer, tmp_path: Path, ingest: Manifest, pod: str, **settings: Any) -> "subprocess.Popen[str]":
    parent = tmp_path / "ingest.json"
    ingest.write(parent)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(parent), ingest.storage_root],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment(server, tmp_path, pod, **settings)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_job(server: KubeServer) -> None:
    """Until a launcher has made one and watches it."""
    wait_until("a RayJob that is watched", lambda: (server.asked("WATCH", JOBS), len(server.objects)), all)


def test_a_launcher_killed_and_started_again_finds_its_rayjob(server: KubeServer, ingest: Manifest, tmp_path: Path) -> None:
    server.operator = never_ends
    first = start(server, tmp_path, ingest, "pod-1")
    wait_for_job(server)
    first.kill()
    first.communicate()
    (name,) = server.objects  # nobody could cancel it
    server.requests.clear()
    second = start(server, tmp_path, ingest, "pod-2")
    wait_for_job(server)
    server.run(name)
    out, err = second.communicate(timeout=180)
    assert second.returncode == 0, err
    assert out.strip() == Manifest.read(next((Path(ingest.storage_root) / "spectrum").glob("*/manifest.json"))).fingerprint
    assert len(server.created) == 1
    assert '"event": "job attached"' in err
    kuberay.KubeRay(a_job(ingest), LaunchConfig(backend="rayjob")).cancel()
    # the server lets nothing else through, and all of it is needed
    granted = {(*rule["apiGroups"], *rule["resources"], verb) for rule in kuberay.RIGHTS for verb in rule["verbs"]}
    assert server.used == granted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_told_to_end_cancels_its_rayjob(
    server: KubeServer, ingest: Manifest, tmp_path: Path, number: signal.Signals
) -> None:
    server.operator, server.deletion_s = never_ends, 0.5
    process = start(server, tmp_path, ingest, "pod-1")
    wait_for_job(server)
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # the impatient one comes while it is cancelling
    _, err = process.communicate(timeout=180)
    assert process.returncode in (143, -signal.SIGINT, 130), err
    assert server.objects == {}
    assert '"event": "job cancelled"' in err


# a stage that works for ten minutes
ENDLESS = (
    f"{sys.executable} -c 'import sys, time; from components import launch; "
    "launch._run_here = lambda *ignored: time.sleep(600); sys.exit(launch.main())'"
)


def test_a_job_whose_launcher_is_gone_for_good_ends_itself_and_one_that_is_waited_for_does_not(
    server: KubeServer, ingest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP kills a terminated task's Python with its container (kubeflow/pipelines#7903): nobody is left to cancel."""
    monkeypatch.setenv("TEST_ENTRYPOINT", ENDLESS)
    process = start(server, tmp_path, ingest, "pod-1", orphan_s=6)  # a busy machine may hold a launcher up for seconds
    wait_for_job(server)
    time.sleep(10)
    (job,) = server.objects.values()
    assert job["status"]["jobDeploymentStatus"] == "Running"
    process.kill()
    process.communicate()
    status = wait_until("the job's end", lambda: job["status"]["jobDeploymentStatus"], lambda status: status != "Running")
    assert status == "Complete", "or the operator would try again, with a whole new cluster"
    (lines,) = server.logs.values()
    assert lines[-1] == f"job {job['metadata']['name']} ends: nobody has waited for it for 6 s"
    assert launched(ingest).stage == "spectrum", "a launcher that comes too late does not take it for done"
    assert len(server.created) == 2


# -- pure -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "suspend", "phase"),
    [
        ({}, False, "starting"),
        ({}, True, "queued"),
        ({"jobDeploymentStatus": "Suspending"}, True, "queued"),
        ({"jobDeploymentStatus": "Suspended"}, False, "queued"),
        ({"jobDeploymentStatus": "Initializing"}, False, "starting"),
        ({"jobDeploymentStatus": "Waiting"}, False, "starting"),
        ({"jobDeploymentStatus": "Running", "jobStatus": "PENDING"}, False, "running"),
        ({"jobDeploymentStatus": "Running", "jobStatus": "FAILED"}, False, "running"),  # the operator may try once more
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, False, "starting"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, False, "succeeded"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, True, "succeeded"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "FAILED"}, False, "failed"),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING"}, False, "failed"),
        ({"jobDeploymentStatus": "ValidationFailed"}, False, "failed"),
    ],
)
def test_the_phase_of_every_state(status: dict[str, str], suspend: bool, phase: str) -> None:
    assert phase_of({"metadata": {}, "spec": {"suspend": suspend}, "status": status}).phase == phase

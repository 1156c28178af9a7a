"""Submission to Kubeflow Pipelines: the real kfp client and the command line against a server with KFP's own models."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from typer.testing import CliRunner, Result

from components.batch.config import BatchConfig
from components.errors import ClusterError, ConfigError
from pipelines import cluster as clusters
from pipelines.batch_scoring import batch_scoring
from pipelines.cli import app
from pipelines.cluster import Cluster, Version
from pipelines.cluster_config import ClusterConfig
from pipelines.config import PlatformConfig, load
from pipelines.names import PipelineName
from pipelines.plan import NEVER_CACHED, CompiledPipeline, compile_pipeline
from tests import REPOSITORY, crds
from tests.kfp_server import KfpServer, kfp_server
from tests.servers import Page, serving
from tests.waiting import wait_until

ROOT = "s3://bucket/cllmr"
DATA = ["ingest.source=files", "ingest.interactions=s3://bucket/raw/interactions.csv"]


@pytest.fixture(autouse=True)
def _no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH", "CLLMR_KFP_TOKEN", "CLLMR_KFP_COOKIES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with kfp_server() as running:
        yield running


@pytest.fixture(scope="module")
def settings() -> PlatformConfig:
    return load("cluster", overrides=[f"storage_root={ROOT}", *DATA])


@pytest.fixture(scope="module")
def pipeline(settings: PlatformConfig) -> CompiledPipeline:
    return clusters.pipeline_of(settings)


def connect(server: KfpServer, **settings: Any) -> Cluster:
    return Cluster(ClusterConfig(**{"host": server.url, "poll_s": 0.02, "patience_s": 5.0, **settings}))


def submitted(cluster: Cluster, pipeline: CompiledPipeline, settings: PlatformConfig, name: str = "a run") -> str:
    version = cluster.ensure_version(pipeline, "abc123")
    return cluster.submit(version, clusters.parameters_of(settings, pipeline), name)


# -- versions and runs ------------------------------------------------------------------------------------------------------


def test_a_run_is_the_version_of_this_revision_with_the_settings_as_parameters(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    cluster = connect(server, service_account="pipeline-runner", pipeline_root="s3://bucket/kfp", experiment="nightly")
    run = server.runs[submitted(cluster, pipeline, settings)]
    (version,) = server.versions.values()
    assert version["name"].startswith("abc123-")
    assert version["pipeline_spec"] == pipeline.spec
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert run["service_account"] == "pipeline-runner"
    assert run["runtime_config"]["pipeline_root"] == "s3://bucket/kfp"
    assert server.experiments[run["experiment_id"]]["display_name"] == "nightly"
    parameters = run["runtime_config"]["parameters"]
    assert parameters["storage_root"] == ROOT
    for name, stage in settings.stages().items():
        assert type(stage).parse(parameters[f"{name}_config"], name) == stage


def test_the_same_code_is_uploaded_once_and_other_code_or_placement_is_another_version(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    cluster = connect(server)
    first = cluster.ensure_version(pipeline, "abc123")
    assert cluster.ensure_version(pipeline, "abc123") == first
    other_settings = load("cluster", overrides=["train.max_epochs=5"])
    assert cluster.ensure_version(clusters.pipeline_of(other_settings), "abc123") == first
    names = {
        first.name,
        cluster.ensure_version(pipeline, "def456").name,
        cluster.ensure_version(clusters.pipeline_of(load("gpu")), "abc123").name,
        cluster.ensure_version(clusters.pipeline_of(settings, until="train"), "abc123").name,
    }
    assert {one["name"] for one in server.versions.values()} == names
    assert len(names) == 4
    assert len(server.pipelines) == 1


def test_a_run_that_is_cut_off_has_no_parameters_of_the_stages_left_out(server: KfpServer, settings: PlatformConfig) -> None:
    short = clusters.pipeline_of(settings, until="spectrum")
    run = server.runs[submitted(connect(server), short, settings)]
    assert set(run["runtime_config"]["parameters"]) == {"storage_root", *(f"{name}_config" for name in short.stages())}


def test_kfps_cache_is_off_and_the_switch_reaches_the_spec_that_runs(server: KfpServer, settings: PlatformConfig) -> None:
    """kfp ignores enable_caching for a run that names a version (kubeflow/pipelines#14253): only the spec itself counts."""

    def cached(run_id: str) -> set[str]:
        tasks = server.spec_of(server.runs[run_id])["root"]["dag"]["tasks"]
        return {name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")}

    cluster = connect(server)
    assert cached(submitted(cluster, clusters.pipeline_of(settings), settings, "off")) == set()
    on = cached(submitted(cluster, clusters.pipeline_of(settings, cache=True), settings, "on"))
    assert on == set(settings.stages()) - NEVER_CACHED
    assert on == {"spectrum", "evaluate"}


def test_batch_scoring_is_never_cached_because_its_inputs_do_not_name_the_champion() -> None:
    (task,) = compile_pipeline(batch_scoring(PlatformConfig())).with_caching().spec["root"]["dag"]["tasks"].values()
    assert not task["cachingOptions"].get("enableCache")


def test_a_directory_of_this_machine_is_refused_before_anything_is_asked(settings: PlatformConfig) -> None:
    with pytest.raises(ConfigError, match=r"storage root '\.cllmr' is a directory of this machine.*Give --storage s3://"):
        clusters.parameters_of(load("local"), clusters.pipeline_of(settings))


def test_the_sample_which_is_in_no_image_is_refused_where_it_would_be_read(settings: PlatformConfig) -> None:
    sample = load("cluster")
    with pytest.raises(ConfigError, match=r"ingest\.source 'sample' is .* do not have\. Give --set ingest\.source=files"):
        clusters.parameters_of(sample, clusters.pipeline_of(settings))
    batch = clusters.pipeline_of(sample, name=PipelineName.BATCH)
    assert "batch_config" in clusters.parameters_of(sample, batch)


def test_a_version_is_named_after_its_revision_in_the_letters_kubernetes_allows(pipeline: CompiledPipeline) -> None:
    name = clusters.version_name(pipeline, "Feature/New_Thing")
    assert name.startswith("feature-new-thing-")
    assert name == clusters.version_name(pipeline, "Feature/New_Thing")


def test_the_revision_is_gits_or_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLMR_REVISION", "release-7")
    assert clusters.source_revision() == "release-7"
    monkeypatch.delenv("CLLMR_REVISION")
    monkeypatch.setenv("PATH", "")  # an image without git
    assert clusters.source_revision().startswith("v")


# -- waiting ----------------------------------------------------------------------------------------------------------------


def test_waiting_ends_with_the_run_and_tells_of_every_change_once(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    server.states = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
    server.task_details = [{"display_name": "Train the recommender", "state": "RUNNING"}]
    cluster, told = connect(server), []
    run = cluster.wait(submitted(cluster, pipeline, settings), 120, lambda task, state: told.append((task, state)))
    assert run.state == "SUCCEEDED"
    assert told == [("Train the recommender", "RUNNING")]


def test_a_cancelled_run_has_ended(server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig) -> None:
    """kfp's own wait_for_run_completion would wait for ever: it does not know the state."""
    server.states = ["RUNNING", "CANCELING", "CANCELED"]
    cluster = connect(server)
    run_id, began = submitted(cluster, pipeline, settings), time.monotonic()
    assert cluster.wait(run_id, 300, lambda *ignored: None).state == "CANCELED"
    assert time.monotonic() - began < 200, "the deadline ended the waiting, and not the run"


def test_the_deadline_ends_the_waiting_and_not_the_run(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    server.states = ["RUNNING"]
    cluster = connect(server)
    began = time.monotonic()
    assert cluster.wait(submitted(cluster, pipeline, settings), 0.3, lambda *ignored: None).state == "RUNNING"
    assert time.monotonic() - began < 60
    assert server.asked("POST", ".*:terminate") == 0


def test_the_message_of_the_failed_task_is_found_among_those_that_hold_it(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    server.states = ["FAILED"]
    server.task_details = [
        {"display_name": "root", "state": "FAILED", "child_tasks": [{"pod_name": "p-1"}]},
        {"display_name": "Train", "state": "FAILED", "error": {"message": "features: no rows"}, "end_time": "2026-01-02"},
        {"display_name": "Ingest", "state": "SUCCEEDED"},
        {"display_name": "Spectrum", "state": "FAILED", "pod_name": "p-2", "end_time": "2026-01-01"},
    ]  # fmt: skip
    cluster = connect(server)
    run = cluster.wait(submitted(cluster, pipeline, settings), 120, lambda *ignored: None)
    assert [(one.task, one.message) for one in clusters.failures(run)] == [
        ("Spectrum", "no message; see the log of pod p-2"),
        ("Train", "features: no rows"),
    ]


# -- schedules --------------------------------------------------------------------------------------------------------------


def asked_for(settings: PlatformConfig, pipeline: CompiledPipeline, cluster: Cluster) -> tuple[str, Version, dict[str, Any]]:
    return "0 0 3 * * *", cluster.ensure_version(pipeline, "abc123"), clusters.parameters_of(settings, pipeline)


def test_a_schedule_is_made_once_left_alone_and_replaced_when_anything_differs(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    cluster = connect(server, service_account="runner")
    cron, version, parameters = asked_for(settings, pipeline, cluster)
    first, change = cluster.ensure_schedule("nightly", cron, version, parameters)
    assert change == "created"
    made = server.recurring_runs[first]
    assert (made["status"], made["no_catchup"], made["max_concurrency"]) == ("ENABLED", True, "1")
    assert made["trigger"]["cron_schedule"]["cron"] == cron
    posts = server.asked("POST", ".*/recurringruns.*")
    assert cluster.ensure_schedule("nightly", cron, version, parameters) == (first, "unchanged")
    assert server.asked("POST", ".*/recurringruns.*") == posts

    other_version = cluster.ensure_version(pipeline, "def456")
    for other in (
        ("0 0 4 * * *", version, parameters),
        (cron, other_version, parameters),
        (cron, version, {**parameters, "storage_root": "s3://elsewhere"}),
    ):
        schedule_id, change = cluster.ensure_schedule("nightly", *other)
        assert change == "replaced"
        assert list(server.recurring_runs) == [schedule_id]
        assert server.recurring_runs[schedule_id]["status"] == "ENABLED"


def test_the_old_schedule_is_switched_off_before_the_new_one_is_switched_on(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    cluster = connect(server)
    cron, version, parameters = asked_for(settings, pipeline, cluster)
    old, _ = cluster.ensure_schedule("nightly", cron, version, parameters)
    server.requests.clear()
    new, _ = cluster.ensure_schedule("nightly", "0 0 5 * * *", version, parameters)
    changes = [path.rsplit("/", 1)[-1] for method, path in server.requests if method != "GET"]
    assert changes == ["recurringruns", f"{old}:disable", f"{new}:enable", old]


def test_what_an_interrupted_call_left_is_finished_by_the_next(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    cluster = connect(server, patience_s=0.01)
    cron, version, parameters = asked_for(settings, pipeline, cluster)
    cluster.ensure_schedule("nightly", cron, version, parameters)
    server.fail("POST", ".*:enable", 503, times=1000)
    with pytest.raises(ClusterError, match="failed: 503, injected"):
        cluster.ensure_schedule("nightly", "0 0 5 * * *", version, parameters)
    server.faults.clear()
    assert sorted(one["status"] for one in server.recurring_runs.values()) == ["DISABLED", "DISABLED"]
    assert connect(server).ensure_schedule("nightly", "0 0 5 * * *", version, parameters)[1] == "replaced"
    (left,) = server.recurring_runs.values()
    assert (left["status"], left["trigger"]["cron_schedule"]["cron"]) == ("ENABLED", "0 0 5 * * *")


def test_a_schedule_is_removed_and_others_are_left(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    cluster = connect(server)
    asked = asked_for(settings, pipeline, cluster)
    cluster.ensure_schedule("nightly", *asked)
    kept, _ = cluster.ensure_schedule("weekly", *asked)
    assert cluster.remove_schedule("nightly") == 1
    assert cluster.remove_schedule("nightly") == 0
    assert list(server.recurring_runs) == [kept]


@pytest.mark.parametrize(
    ("given", "cron"), [("0 3 * * *", "0 0 3 * * *"), ("30 0 3 * * 1-5", "30 0 3 * * 1-5"), ("*/5 * * * ?", "0 */5 * * * ?")]
)
def test_five_fields_of_cron_get_second_0(given: str, cron: str) -> None:
    assert clusters.cron_of(given) == cron


@pytest.mark.parametrize("given", ["", "daily", "0 3 * *", "0 0 0 3 * * *", "0 3 * * $(date)"])
def test_what_is_not_cron_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="not five fields of cron"):
        clusters.cron_of(given)


# -- who is let in, and where ------------------------------------------------------------------------------------------------


def test_a_token_file_is_read_anew_for_every_request_because_kubernetes_renews_it(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    with kfp_server(tokens={"first"}) as server:
        cluster = connect(server, token_file=str(token))
        server.tokens = {"second"}
        with pytest.raises(ClusterError, match=r"refused the request: 401, Request not authenticated\. Give a token"):
            cluster.runs(1)
        token.write_text("second\n")
        assert cluster.runs(1) == []


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with kfp_server() as server, pytest.raises(ConfigError, match=r"token file '.*nowhere' cannot be read: No such file"):
        connect(server, token_file=str(tmp_path / "nowhere"))


def test_a_token_and_cookies_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with kfp_server(tokens={"t"}, cookies={"session=c"}) as server:
        monkeypatch.setenv("CLLMR_KFP_TOKEN", "t")
        assert connect(server).runs(1) == []
        monkeypatch.delenv("CLLMR_KFP_TOKEN")
        monkeypatch.setenv("CLLMR_KFP_COOKIES", "session=c")
        assert connect(server).runs(1) == []
        monkeypatch.setenv("CLLMR_KFP_COOKIES", "session=old")
        with pytest.raises(ClusterError, match="refused the request: 401"):
            connect(server)


def test_a_multi_user_kfp_wants_a_namespace_and_files_everything_in_it(
    pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    with kfp_server(multi_user=True) as server:
        with pytest.raises(ConfigError, match=r"is multi-user\. Name your profile's namespace with --namespace\."):
            connect(server)
        cluster = connect(server, namespace="team-a")
        run_id = submitted(cluster, pipeline, settings)
        assert [run.run_id for run in cluster.runs(5)] == [run_id]
        assert {one["namespace"] for one in (*server.experiments.values(), *server.pipelines.values())} == {"team-a"}


def test_a_single_user_kfp_knows_no_namespace(server: KfpServer) -> None:
    with pytest.raises(ConfigError, match=r"is single-user and knows no namespace 'team-a'\. Leave --namespace out"):
        connect(server, namespace="team-a")


@pytest.mark.parametrize("host", ["", "kfp.example.org", "ftp://kfp"])
def test_a_host_that_is_no_url_is_refused(host: str) -> None:
    told = r"(KFP host '.+': not an http:// or https:// URL|no host of KFP is named)\. Give --host"
    with pytest.raises(ConfigError, match=told):
        Cluster(ClusterConfig(host=host))


def test_a_page_to_sign_in_at_is_not_taken_for_the_api() -> None:
    with kfp_server(tokens={"t"}, sign_in_page=True) as server:
        with pytest.raises(ClusterError, match=r"is not the KFP API, but perhaps a page to sign in at: 302 to /sign-in"):
            connect(server)
        server.tokens, server.cookies = set(), set()
        with (
            serving(Page) as url,
            pytest.raises(ClusterError, match=r"is not the KFP API.*it sends text/html"),
        ):
            Cluster(ClusterConfig(host=url))


# -- bad days ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failing_or_throttling_host_is_asked_again(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig, status: int
) -> None:
    cluster = connect(server)
    for method, path in (("GET", ".*/versions"), ("POST", ".*/upload_version"), ("POST", ".*/runs"), ("GET", ".*/runs/.*")):
        server.fail(method, path, status, headers={"Retry-After": "0"})
    run_id = submitted(cluster, pipeline, settings)
    assert cluster.run(run_id).state == "PENDING"
    assert (len(server.versions), len(server.runs)) == (1, 1)


def test_the_host_says_how_long_to_wait(server: KfpServer) -> None:
    cluster = connect(server)
    server.fail("GET", ".*/experiments", 429, headers={"Retry-After": "1"})
    began = time.monotonic()
    assert cluster.runs(1) == []
    assert 1.0 <= time.monotonic() - began < 20  # by itself it would wait for less than one second


def test_a_run_whose_answer_was_lost_is_found_and_not_started_twice(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    server.fail("POST", ".*/runs", 503, after=True)
    run_id = submitted(connect(server), pipeline, settings)
    assert list(server.runs) == [run_id]


def test_a_version_that_somebody_else_uploads_at_that_moment_is_found(server: KfpServer, pipeline: CompiledPipeline) -> None:
    server.fail("POST", ".*/upload_version", 409, after=True)
    version = connect(server).ensure_version(pipeline, "abc123")
    assert list(server.versions) == [version.version_id]


def test_a_schedule_whose_answer_was_lost_is_there_once(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    cluster = connect(server)
    server.fail("POST", ".*/recurringruns", 502, after=True)
    schedule_id, _ = cluster.ensure_schedule("nightly", *asked_for(settings, pipeline, cluster))
    assert [(key, one["status"]) for key, one in server.recurring_runs.items()] == [(schedule_id, "ENABLED")]


def test_patience_ends_and_says_what_the_host_said(server: KfpServer) -> None:
    cluster = connect(server, patience_s=0.2)
    server.fail("GET", ".*/experiments", 500, times=1000)
    with pytest.raises(ClusterError, match=r"KFP at http://127\.0\.0\.1:\d+ failed: 500, injected\. Try again later\."):
        cluster.runs(1)


def test_a_host_that_is_too_slow_is_given_up(server: KfpServer) -> None:
    cluster = connect(server, request_timeout_s=0.2, patience_s=0.1)
    server.delay = 90.0
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"does not answer: .*[Rr]ead timed out.*Check --host"):
        cluster.runs(1)
    assert time.monotonic() - began < 60


def test_a_host_that_is_slow_but_answers_is_waited_for(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    server.delay = 0.3
    submitted(connect(server, request_timeout_s=5), pipeline, settings)
    assert len(server.runs) == 1


def test_a_host_where_nothing_listens_is_named() -> None:
    with serving(Page) as url:
        pass
    told: list[str] = []
    with pytest.raises(ClusterError, match=r"does not answer: HTTPConnection.* Connection refused\. Check --host"):
        Cluster(ClusterConfig(host=url, patience_s=1), told.append)
    assert len(told) == 1, "said before the waiting, and once"
    assert told[0].startswith(f"KFP at {url} does not answer (HTTPConnection")
    assert told[0].endswith("Connection refused); asked again for 1 s")


def test_a_run_that_is_not_there_and_a_bad_request_are_told_apart(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig
) -> None:
    cluster = connect(server)
    with pytest.raises(ClusterError, match=r"has no such thing: ResourceNotFoundError: nope not found\. See cllmr runs"):
        cluster.run("nope")
    with pytest.raises(ClusterError, match=r"did not accept the request: unknown parameters \['typo'\]"):
        cluster.submit(cluster.ensure_version(pipeline, "abc123"), {"typo": 1}, "a run")


# -- the command line -------------------------------------------------------------------------------------------------------


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


OWN = [part for one in DATA for part in ("--set", one)]
QUICK = ["--set", "cluster.poll_s=0.05", "--storage", ROOT, *OWN]


def test_submit_prints_the_url_waits_and_ends_with_the_result(server: KfpServer, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = call("submit", "--host", server.url, *QUICK, "--wait", "--revision", "r1", "--json", str(file))
    assert result.exit_code == 0, result.output
    (run_id,) = server.runs
    assert result.stdout.strip() == f"run {run_id}: {server.url}/#/runs/details/{run_id}"
    assert f"run {run_id}: succeeded" in result.stderr
    told = json.loads(file.read_text())
    assert (told["run_id"], told["state"]) == (run_id, "SUCCEEDED")
    assert told["version"].startswith("r1-")


def test_a_failed_run_shows_its_tasks_message_and_ends_with_1(server: KfpServer) -> None:
    server.states = ["RUNNING", "FAILED"]
    server.task_details = [
        {"display_name": "Train", "state": "FAILED", "error": {"code": 3, "message": "train: no rows [of] features\n"}}
    ]
    result = call("submit", "--host", server.url, *QUICK, "--wait")
    assert result.exit_code == 1
    assert "failed: Train: train: no rows [of] features" in result.stderr
    assert result.stderr.splitlines()[-1].endswith(": failed")


def test_wait_ends_with_124_when_the_deadline_has_passed_and_with_the_result_later(server: KfpServer) -> None:
    server.states = ["RUNNING"]
    assert call("submit", "--host", server.url, *QUICK).exit_code == 0
    (run_id,) = server.runs
    result = call("wait", run_id, "--host", server.url, "--set", "cluster.poll_s=0.05", "--deadline", "0.1")
    assert result.exit_code == 124
    assert f"run {run_id} is running after 0.1 s. next: cllmr wait {run_id}" in result.stderr
    server.runs[run_id]["script"] = ["SUCCEEDED"]
    assert call("wait", run_id, "--host", server.url).exit_code == 0


def test_runs_are_listed_newest_first_over_several_pages(
    server: KfpServer, pipeline: CompiledPipeline, settings: PlatformConfig, tmp_path: Path
) -> None:
    cluster = connect(server)
    names = [f"run-{number:03d}" for number in range(105)]  # KFP gives at most 100 at once
    for name in names:
        submitted(cluster, pipeline, settings, name)
    file = tmp_path / "runs.json"
    result = call("runs", "--host", server.url, "--limit", "103", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert [run["display_name"] for run in json.loads(file.read_text())] == names[:1:-1]
    assert "run-104" in result.stdout
    assert "run-001" not in result.stdout


def test_schedule_says_what_it_changed(server: KfpServer) -> None:
    arguments = ["schedule", "--host", server.url, "--storage", ROOT, *OWN, "--revision", "r1", "--cron"]
    assert "schedule cllmr-retraining: created, '0 0 3 * * *' UTC, version r1-" in call(*arguments, "0 3 * * *").stdout
    assert "schedule cllmr-retraining: unchanged" in call(*arguments, "0 3 * * *").stdout
    assert "schedule cllmr-retraining: replaced" in call(*arguments, "0 4 * * *").stdout
    assert "schedule cllmr-retraining: removed" in call("schedule", "--host", server.url, "--remove").stdout
    assert "there was none" in call("schedule", "--host", server.url, "--remove").stdout
    assert call("schedule", "--host", server.url).exit_code == 2


def test_batch_scoring_is_submitted_and_scheduled_as_the_retraining_is(server: KfpServer) -> None:
    common = ["--host", server.url, "--storage", ROOT, "--revision", "r1", "--pipeline", "batch", "--set", "batch.k=50"]
    arguments = [*common, "--set", "promote.model_name=books"]
    result = call("submit", *arguments)
    assert result.exit_code == 0, result.output
    (run,) = server.runs.values()
    assert list(server.spec_of(run)["root"]["dag"]["tasks"]) == ["batch"]
    parameters = run["runtime_config"]["parameters"]
    assert set(parameters) == {"storage_root", "batch_config"}
    config = BatchConfig.parse(parameters["batch_config"], "batch")
    assert (config.k, config.model_name, parameters["storage_root"]) == (50, "books", ROOT)
    assert "schedule cllmr-batch: created, '0 0 6 * * *' UTC" in call("schedule", *arguments, "--cron", "0 6 * * *").stdout
    assert "schedule cllmr-batch: unchanged" in call("schedule", *arguments, "--cron", "0 6 * * *").stdout
    assert "there was none" in call("schedule", "--host", server.url, "--remove").stdout  # the retraining's is another
    assert "cllmr-batch: removed" in call("schedule", "--host", server.url, "--remove", "--pipeline", "batch").stdout


def test_mistakes_are_one_line_and_exit_code_2(server: KfpServer) -> None:
    result = call("submit", "--host", server.url, "--storage", ".cllmr")
    assert result.exit_code == 2
    assert "is a directory of this machine" in result.stderr
    assert server.requests == []
    result = call("runs")
    assert result.exit_code == 2
    assert "no host of KFP is named. Give --host" in result.stderr
    result = call("runs", "--host", "kfp.example.org")
    assert result.exit_code == 2
    assert "'kfp.example.org': not an http:// or https:// URL. Give --host" in result.stderr
    result = call("compile", "--namespace", "kubeflow")
    assert result.exit_code == 2
    assert "are for what --kubernetes writes. Give --kubernetes" in result.stderr


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupted(process: "subprocess.Popen[str]", number: signal.Signals) -> str:
    """What it says on standard error; interrupted again if need be: Python drops an interrupt that meets a destructor."""
    for _ in range(3):
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=90)[1]
    raise AssertionError("it does not end")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_run_as_well(server: KfpServer, number: signal.Signals, tmp_path: Path) -> None:
    server.states = ["RUNNING"]
    process = start("submit", "--host", server.url, *QUICK, "--wait", "--json", str(tmp_path / "run.json"))
    assert process.stdout is not None
    run_id = process.stdout.readline().split()[1].rstrip(":")
    err = interrupted(process, number)
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"interrupted: run {run_id} was told to end and is canceled."
    assert server.runs[run_id]["state"] == "CANCELED"
    written = json.loads((tmp_path / "run.json").read_text())
    assert (written["run_id"], written["state"], written["interrupted"]) == (run_id, "CANCELED", True)


@pytest.mark.parametrize(
    ("again", "reason"),
    [(KeyboardInterrupt(), ""), (ClusterError("KFP is away.", "Try again later."), "KFP is away. ")],
    ids=["interrupted again", "KFP is away"],
)
@pytest.mark.parametrize(
    ("at", "told"), [("wait", "run {0} may go on. See {1}"), ("submit", "the run may have begun and go on. See cllmr runs")]
)
def test_an_interrupt_that_cannot_end_the_run_says_that_it_may_go_on(
    server: KfpServer, monkeypatch: pytest.MonkeyPatch, at: str, told: str, again: BaseException, reason: str, tmp_path: Path
) -> None:
    for name, error in ((at, KeyboardInterrupt()), ("find_run", again), ("terminate", again)):
        monkeypatch.setattr(Cluster, name, Mock(side_effect=error))
    result = call("submit", "--host", server.url, *QUICK, "--wait", "--json", str(tmp_path / "run.json"))
    assert result.exit_code == 130, result.output
    seen = result.stdout.split()[1:] if at == "wait" else []
    written = json.loads((tmp_path / "run.json").read_text())
    assert (written["interrupted"], written["state"]) == (True, None)
    assert [f"{written['run_id']}:", written["url"]] == (seen or ["None:", None])
    assert result.stderr.splitlines()[-1] == f"interrupted: {reason}{told.format(*(part.rstrip(':') for part in seen))}"


def test_what_became_of_an_interrupted_run_is_told_where_its_json_cannot_be_written(server: KfpServer) -> None:
    server.states = ["RUNNING"]
    process = start("submit", "--host", server.url, *QUICK, "--wait", "--keep", "--json", "/dev/full")
    assert process.stdout is not None
    run_id = process.stdout.readline().split()[1].rstrip(":")
    err = interrupted(process, signal.SIGINT)
    assert process.returncode == 130
    told = f"interrupted: run {run_id} goes on. next: cllmr wait {run_id} --json /dev/full cannot be written: "
    assert err.splitlines()[-1].startswith(told)


def test_an_interrupt_lets_the_run_go_on_where_that_is_asked_for(server: KfpServer) -> None:
    server.states = ["RUNNING"]
    process = start("submit", "--host", server.url, *QUICK, "--wait", "--keep")
    assert process.stdout is not None
    run_id = process.stdout.readline().split()[1].rstrip(":")
    err = interrupted(process, signal.SIGINT)
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"interrupted: run {run_id} goes on. next: cllmr wait {run_id}"
    assert server.asked("POST", ".*:terminate") == 0


def test_an_interrupt_while_the_run_is_being_created_finds_and_ends_it(server: KfpServer) -> None:
    server.states = ["RUNNING"]
    server.fail("POST", ".*/runs", 503, times=1000, after=True, headers={"Retry-After": "30"})
    process = start("submit", "--host", server.url, *QUICK, "--wait")
    wait_until("the run", lambda: server.runs)
    server.faults.clear()
    err = interrupted(process, signal.SIGINT)
    (run_id,) = server.runs
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"interrupted: run {run_id} was told to end and is canceled."


# -- GitOps -----------------------------------------------------------------------------------------------------------------


def objects(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    output = tmp_path / "objects.yaml"
    result = call("compile", "--preset", "cluster", "--kubernetes", "--output", str(output), "--revision", "r1", *arguments)
    assert result.exit_code == 0, result.output
    return list(yaml.safe_load_all(output.read_text()))


def test_the_pipeline_as_kubernetes_objects_is_the_same_pipeline(tmp_path: Path, settings: PlatformConfig) -> None:
    pipeline, version = objects(tmp_path, "--namespace", "kubeflow", "--storage", ROOT)
    assert (pipeline["kind"], pipeline["metadata"]) == ("Pipeline", {"name": "cllmr-retraining", "namespace": "kubeflow"})
    assert version["spec"]["pipelineName"] == "cllmr-retraining"
    assert version["metadata"]["name"] == f"cllmr-retraining-{version['spec']['displayName']}"
    assert version["spec"]["displayName"].startswith("r1-")
    parameters = version["spec"]["pipelineSpec"]["root"]["inputDefinitions"]["parameters"]
    assert parameters["storage_root"]["defaultValue"] == ROOT
    assert set(version["spec"]["pipelineSpec"]["root"]["dag"]["tasks"]) == set(settings.stages())


@crds.needs_crds
@pytest.mark.parametrize("arguments", [[], ["--until", "train"], ["--set", "placement.train.gpu=1"]])
def test_the_objects_are_what_kfps_own_definitions_ask_for(tmp_path: Path, arguments: list[str]) -> None:
    pipeline, version = objects(tmp_path, *arguments)
    assert crds.problems(pipeline) == []
    assert crds.problems(version) == []
    assert crds.problems({**version, "spec": {**version["spec"], "pipelineNmae": "x"}}) == ["spec.pipelineNmae: unknown field"]


@crds.needs_crds
def test_every_request_is_one_of_kfps_published_api(pipeline: CompiledPipeline, settings: PlatformConfig) -> None:
    published = json.loads((crds.DIRECTORY / "kfp" / "kfp_v2beta1_swagger.json").read_text())["paths"]
    patterns = {
        (method.upper(), tuple(_segments(path))) for path, methods in published.items() for method in methods
    }  # fmt: skip
    with kfp_server() as server:
        server.states = ["RUNNING"]
        cluster = connect(server)
        run_id = submitted(cluster, pipeline, settings)
        cluster.terminate(run_id)
        for cron in ("0 0 3 * * *", "0 0 4 * * *"):
            cluster.ensure_schedule("nightly", cron, *asked_for(settings, pipeline, cluster)[1:])
    for method, path in server.requests:
        assert any(method == seen and _matches(_segments(path), pattern) for seen, pattern in patterns), (method, path)


def _segments(path: str) -> list[str]:
    return path.strip("/").replace(":", "/:").split("/")


def _matches(segments: list[str], pattern: tuple[str, ...]) -> bool:
    return len(segments) == len(pattern) and all(
        wanted.startswith("{") or seen == wanted for seen, wanted in zip(segments, pattern, strict=True)
    )

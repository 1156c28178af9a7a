"""Runs the SAME pipeline on a cluster: submits, schedules, lists and waits for it through Kubeflow Pipelines.

A pipeline version is code: it is named after the source revision and a hash of its spec, uploaded once and never overwritten.
A run is that version with the settings as its parameters. Whatever creates something looks for it first, so that a request that
is repeated (after a lost answer, a conflict, a killed client) finds what the one before it made.
"""

import hashlib
import io
import json
import os
import re
import secrets
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from components.errors import ClusterError, ConfigError, first_line
from components.retry import TRANSIENT, retrying
from pipelines.cluster_config import ClusterConfig
from pipelines.names import PipelineName
from pipelines.plan import CompiledPipeline, compiled

if TYPE_CHECKING:
    import kfp

    from pipelines.config import PlatformConfig

R = TypeVar("R")

ENDPOINT_VARIABLE, TOKEN_FILE_VARIABLE = "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH"  # kfp's own
TOKEN_VARIABLE, COOKIES_VARIABLE, REVISION_VARIABLE = "CLLMR_KFP_TOKEN", "CLLMR_KFP_COOKIES", "CLLMR_REVISION"
FINISHED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
SUCCEEDED = ("SUCCEEDED", "SKIPPED")
_CONFLICT = 409  # somebody else created the same at that moment: looking again finds it


@dataclass(frozen=True)
class Version:
    """One version of a pipeline, as KFP knows it."""

    pipeline_id: str
    version_id: str
    name: str


@dataclass(frozen=True)
class Failure:
    """A task that failed and what it said."""

    task: str
    message: str


class Cluster:
    """A Kubeflow Pipelines that runs are sent to."""

    def __init__(self, config: ClusterConfig, told: Callable[[str], None] = lambda text: None) -> None:
        """Raises ConfigError when no host is named, credentials cannot be read, or the namespace is missing or too much.

        `told` gets a line whenever the host is failing or away and will be asked again.
        """
        self.config, self._told = config, told
        self.host = config.host or os.environ.get(ENDPOINT_VARIABLE) or ""
        if not re.match(r"https?://", self.host):
            raise ConfigError(
                f"KFP host {self.host!r}: not an http:// or https:// URL." if self.host else "no host of KFP is named.",
                f"Give --host https://kfp.example.org/pipeline or set {ENDPOINT_VARIABLE}.",
            )
        self._client = _client(config, self.host)
        # undecoded, because the client makes an answer with nothing in it out of any page
        health = self._call(lambda: self._client.healthzs.healthz_service_get_healthz(_preload_content=False))
        if "json" not in health.headers.get("Content-Type", ""):
            raise self._not_kfp(f"it sends {health.headers.get('Content-Type')}")
        multi_user = bool(health.json().get("multi_user"))
        if multi_user and not config.namespace:
            raise ConfigError(f"KFP at {self.host} is multi-user.", "Name your profile's namespace with --namespace.")
        if config.namespace and not multi_user:
            raise ConfigError(
                f"KFP at {self.host} is single-user and knows no namespace '{config.namespace}'.", "Leave --namespace out."
            )

    # -- pipelines -------------------------------------------------------------------------------------------------------

    def ensure_version(self, pipeline: CompiledPipeline, revision: str) -> Version:
        """The version of this pipeline at this revision; uploaded when it is not there."""
        name = version_name(pipeline, revision)
        pipeline_id = self._call(lambda: self._ensure_pipeline(pipeline.spec["pipelineInfo"]))

        def ensure() -> Any:
            found = self._client.list_pipeline_versions(pipeline_id, filter=_named(name)).pipeline_versions
            if found:
                return found[0]
            with TemporaryDirectory() as folder:
                path = Path(folder) / "pipeline.yaml"
                path.write_text(pipeline.to_yaml(), encoding="utf-8")
                return self._client.upload_pipeline_version(str(path), name, pipeline_id=pipeline_id)

        return Version(pipeline_id, self._call(ensure).pipeline_version_id, name)

    def _ensure_pipeline(self, info: Mapping[str, str]) -> str:
        found = self._client.list_pipelines(filter=_named(info["name"]), namespace=self.config.namespace).pipelines
        if found:
            return str(found[0].pipeline_id)
        # without a first version, which kfp's own upload would name after the pipeline
        created = self._client.pipelines.pipeline_service_create_pipeline(
            self._client.api_models.V2beta1Pipeline(
                name=info["name"],
                display_name=info["name"],
                description=info.get("description", ""),
                namespace=self.config.namespace,
            )
        )
        return str(created.pipeline_id)

    def _ensure_experiment(self) -> str:
        experiment = self._client.create_experiment(self.config.experiment, namespace=self.config.namespace)
        return str(experiment.experiment_id)

    # -- runs ------------------------------------------------------------------------------------------------------------

    def submit(self, version: Version, parameters: Mapping[str, Any], name: str) -> str:
        """Starts one run of `version`, unless a run of this name is there already; its id."""

        def ensure() -> Any:
            experiment_id = self._ensure_experiment()
            return self._find_run(name, experiment_id) or self._client.run_pipeline(
                experiment_id,
                name,
                params=dict(parameters),
                pipeline_id=version.pipeline_id,
                version_id=version.version_id,
                pipeline_root=self.config.pipeline_root,
                service_account=self.config.service_account,
            )

        return str(self._call(ensure).run_id)

    def find_run(self, name: str) -> str | None:
        """Id of the run of this name; None: there is none."""
        run = self._call(lambda: self._find_run(name, self._ensure_experiment()))
        return run.run_id if run else None

    def _find_run(self, name: str, experiment_id: str) -> Any:
        return next(iter(self._client.list_runs(experiment_id=experiment_id, filter=_named(name)).runs or []), None)

    def run(self, run_id: str) -> Any:
        """One run with its tasks (KFP's V2beta1Run); raises ClusterError when there is none of this id."""
        return self._call(lambda: self._client.get_run(run_id))

    def runs(self, limit: int) -> list[Any]:
        """The newest runs of the experiment, newest first."""

        def listed() -> list[Any]:
            found: list[Any] = []
            token, experiment_id = "", self._ensure_experiment()
            while len(found) < limit:
                page = self._client.list_runs(
                    page_token=token,
                    page_size=min(100, limit - len(found)),
                    sort_by="created_at desc",
                    experiment_id=experiment_id,
                )
                found += page.runs or []
                token = page.next_page_token
                if not token:
                    break
            return found

        return self._call(listed)

    def wait(self, run_id: str, deadline_s: float, told: Callable[[str, str], None]) -> Any:
        """Waits until a run has ended or `deadline_s` seconds are over; the run as it is then.

        Args:
            run_id: the run.
            deadline_s: seconds to wait at most.
            told: called with a task's name and its state whenever that has changed.
        """
        from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

        states: dict[str, str] = {}

        def look() -> Any:
            run = self.run(run_id)
            for task in tasks_of(run):
                if task.state and states.get(task.display_name) != task.state:
                    states[task.display_name] = task.state
                    told(task.display_name, task.state)
            return run

        polling = Retrying(
            retry=retry_if_result(lambda run: run.state not in FINISHED),
            wait=wait_fixed(self.config.poll_s),
            stop=stop_after_delay(deadline_s),
        )
        try:
            return polling(look)
        except RetryError as error:
            return error.last_attempt.result()

    def terminate(self, run_id: str) -> str:
        """Ends a run that is under way, waits a while until that has happened; the state it is in then."""
        if self.run(run_id).state not in FINISHED:
            self._call(lambda: self._client.terminate_run(run_id))
        return str(self.wait(run_id, self.config.patience_s, lambda task, state: None).state)

    def url(self, run_id: str) -> str:
        """Where a person sees the run."""
        return f"{(self.config.ui_host or self.host).rstrip('/')}/#/runs/details/{run_id}"

    # -- schedules -------------------------------------------------------------------------------------------------------

    def ensure_schedule(self, name: str, cron: str, version: Version, parameters: Mapping[str, Any]) -> tuple[str, str]:
        """Makes the one schedule of this name what is asked for; its id, and ``unchanged``, ``created`` or ``replaced``.

        Whatever was scheduled under the name before is switched off before the new one is switched on, and then removed; the
        same call finishes what an interrupted one has left.
        """
        changed = False

        def ensure() -> str:
            nonlocal changed
            experiment_id = self._ensure_experiment()
            there = self._schedules(name, experiment_id)
            kept = next((one for one in there if self._is_as_asked(one, cron, version, parameters)), None)
            if kept is None:
                changed = True
                kept = self._client.create_recurring_run(
                    experiment_id,
                    name,
                    cron_expression=cron,
                    max_concurrency=1,
                    no_catchup=True,
                    params=dict(parameters),
                    pipeline_id=version.pipeline_id,
                    version_id=version.version_id,
                    enabled=False,
                    pipeline_root=self.config.pipeline_root,
                    service_account=self.config.service_account,
                )
            others = [one for one in there if one.recurring_run_id != kept.recurring_run_id]
            for other in others:
                self._client.disable_recurring_run(other.recurring_run_id)
            if kept.status != "ENABLED":
                changed = True
                self._client.enable_recurring_run(kept.recurring_run_id)
            for other in others:
                changed = True
                self._client.delete_recurring_run(other.recurring_run_id)
            return str(kept.recurring_run_id)

        had_one = bool(self.schedules(name))
        schedule_id = self._call(ensure)
        return schedule_id, "unchanged" if not changed else "replaced" if had_one else "created"

    def remove_schedule(self, name: str) -> int:
        """Removes what is scheduled under a name; how many there were. Runs that have begun go on."""
        there = self.schedules(name)
        for one in there:
            self._call(lambda one=one: self._client.delete_recurring_run(one.recurring_run_id))  # type: ignore[misc]
        return len(there)

    def schedules(self, name: str) -> list[Any]:
        """What is scheduled under a name in the experiment (KFP's V2beta1RecurringRun)."""
        return self._call(lambda: self._schedules(name, self._ensure_experiment()))

    def _schedules(self, name: str, experiment_id: str) -> list[Any]:
        listed = self._client.list_recurring_runs(page_size=100, experiment_id=experiment_id, filter=_named(name))
        return listed.recurring_runs or []

    def _is_as_asked(self, schedule: Any, cron: str, version: Version, parameters: Mapping[str, Any]) -> bool:
        runtime, reference = schedule.runtime_config, schedule.pipeline_version_reference
        return (
            (schedule.trigger and schedule.trigger.cron_schedule and schedule.trigger.cron_schedule.cron) == cron
            and (reference and reference.pipeline_version_id) == version.version_id
            and dict(runtime.parameters or {}) == dict(parameters)
            and (runtime.pipeline_root or None) == self.config.pipeline_root
            # KFP fills in its default where none is named
            and self.config.service_account in (None, schedule.service_account)
            and schedule.no_catchup is True
            and int(schedule.max_concurrency) == 1
        )

    # -- one request -----------------------------------------------------------------------------------------------------

    def _call(self, function: Callable[[], R]) -> R:
        """Calls KFP, again while it is throttling, failing or away; its errors become ours."""
        with self._told_errors(), redirect_stdout(io.StringIO()):  # kfp prints links of its own
            return retrying(_is_transient, self.config.patience_s, self._tell)(function)

    def _tell(self, error: BaseException) -> None:
        status = getattr(error, "status", None)
        if status != _CONFLICT:  # which the next look resolves
            reason = status or first_line(_cause(error))
            self._told(f"KFP at {self.host} does not answer ({reason}); asked again for {self.config.patience_s:g} s")

    @contextmanager
    def _told_errors(self) -> Iterator[None]:
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            said = _said(error)
            if error.status in (401, 403):
                raise ClusterError(
                    f"KFP at {self.host} refused the request: {error.status}, {said}.",
                    f"Give a token that is valid now: cluster.token_file, {TOKEN_VARIABLE} or {COOKIES_VARIABLE}; "
                    "403: ask for the right to it in the namespace.",
                ) from None
            if 300 <= error.status < 400:
                raise self._not_kfp(f"{error.status} to {error.headers.get('Location')}") from None
            if error.status == 404:
                raise ClusterError(f"KFP at {self.host} has no such thing: {said}.", "See cllmr runs.") from None
            if error.status == 400:
                raise ClusterError(f"KFP at {self.host} did not accept the request: {said}.", "Correct it.") from None
            raise ClusterError(f"KFP at {self.host} failed: {error.status}, {said}.", "Try again later.") from None
        except HTTPError as error:
            raise ClusterError(
                f"KFP at {self.host} does not answer: {first_line(_cause(error))}.", "Check --host and the network."
            ) from None

    def _not_kfp(self, seen: str) -> ClusterError:
        return ClusterError(
            f"what answers at {self.host} is not the KFP API, but perhaps a page to sign in at: {seen}.",
            f"Check --host, and give {TOKEN_VARIABLE}, {COOKIES_VARIABLE} or cluster.token_file.",
        )


# -- names and parameters ---------------------------------------------------------------------------------------------------


def pipeline_of(
    settings: "PlatformConfig",
    until: str | None = None,
    cache: bool = False,
    name: PipelineName = PipelineName.RETRAINING,
) -> CompiledPipeline:
    """The pipeline as it is uploaded: code and placement; settings of the stages are the parameters of a run.

    Args:
        settings: of which only the placement counts.
        until: the last stage.
        cache: let KFP skip tasks that it has seen with the same inputs.
        name: which of the pipelines.
    """
    from pipelines.config import PlatformConfig

    pipeline = compiled(PlatformConfig(placement=settings.placement), name).until(until)
    return pipeline.with_caching() if cache else pipeline


def parameters_of(settings: "PlatformConfig", pipeline: CompiledPipeline) -> dict[str, Any]:
    """A run's parameters; those of stages that were cut off are left out.

    Raises ConfigError when the storage root is a directory that only this machine has, or the data are the sample.
    """
    root = settings.storage_root
    if "://" not in root and not Path(root).is_absolute():
        raise ConfigError(
            f"storage root '{root}' is a directory of this machine, which the tasks of a cluster do not see.",
            "Give --storage s3://bucket/prefix, or the absolute path of a volume that all tasks mount.",
        )
    if "ingest" in pipeline.stages() and settings.ingest.source == "sample":
        raise ConfigError(
            "ingest.source 'sample' is a data set of a Python package that the images of a cluster do not have.",
            "Give --set ingest.source=files --set ingest.interactions=s3://bucket/raw/interactions.csv, or a --config file "
            "with them.",
        )
    from pipelines.config import BATCH

    configs = {**settings.stages(), BATCH: settings.batch_of_champion()}
    given = {f"{name}_config": configs[name].as_parameter() for name in pipeline.stages()}
    return {"storage_root": root, **given}


def version_name(pipeline: CompiledPipeline, revision: str) -> str:
    """Name of a version: where its code stands, and what exactly it is: one name never stands for two specs."""
    digest = hashlib.sha256(pipeline.to_yaml().encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9.-]+", "-", revision.lower()).strip("-.") or "unknown"
    return f"{readable[:60]}-{digest}"


def run_name(version: str) -> str:
    """A name that no other run has."""
    return f"cllmr {version} {datetime.now(UTC):%Y-%m-%d %H:%M:%S} {secrets.token_hex(2)}"


def source_revision() -> str:
    """The git revision of these sources, ``-dirty`` with changes that are not committed; without git the package's version."""
    if given := os.environ.get(REVISION_VARIABLE):
        return given
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed below somebody else's repository: not its revision
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        return f"v{version('cllmr-platform')}"
    except PackageNotFoundError:
        return "unknown"


def cron_of(expression: str) -> str:
    """A cron expression as KFP reads it, with seconds in front; five fields get second 0. UTC, unless KFP is set otherwise.

    Raises ConfigError when it has neither five nor six fields of cron's characters.
    """
    fields = expression.split()
    if len(fields) not in (5, 6) or not all(re.fullmatch(r"[0-9A-Za-z*/,?#LW-]+", field) for field in fields):
        raise ConfigError(
            f"--cron '{expression}': not five fields of cron (minute hour day month weekday), or six with seconds first.",
            "Every night at three: --cron '0 3 * * *'",
        )
    return " ".join(fields if len(fields) == 6 else ["0", *fields])


# -- what a run says --------------------------------------------------------------------------------------------------------


def tasks_of(run: Any) -> list[Any]:
    """The tasks that KFP tells of for a run; none before it has begun."""
    return (run.run_details and run.run_details.task_details) or []


def failures(run: Any) -> list[Failure]:
    """The tasks that failed, in the order they ended, and what they or their pods said; the run's own error when none did."""
    failed = [task for task in tasks_of(run) if task.state == "FAILED"]
    # the graph, and tasks that only hold others, fail with what is in them
    leaves = [task for task in failed if not task.child_tasks or (task.error and task.error.message)]
    found = [
        Failure(task.display_name, (task.error and task.error.message) or f"no message; see the log of pod {task.pod_name}")
        for task in sorted(leaves, key=lambda task: str(task.end_time))
    ]
    if not found and run.error and run.error.message:
        found.append(Failure("the run", run.error.message))
    return found


# -- the client -------------------------------------------------------------------------------------------------------------


def _client(config: ClusterConfig, host: str) -> "kfp.Client":
    """A kfp client with these credentials, whose requests end; nothing is asked of the host yet."""
    import kfp
    import urllib3
    from kfp.client import ServiceAccountTokenVolumeCredentials

    token_file = config.token_file or os.environ.get(TOKEN_FILE_VARIABLE)
    if token_file:
        try:
            Path(token_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"token file '{token_file}' cannot be read: {error.strerror or error}.",
                "Mount the projected token there, or name another file (cluster.token_file).",
            ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = kfp.Client(
            host=host,
            existing_token=None if token_file else os.environ.get(TOKEN_VARIABLE) or None,
            credentials=ServiceAccountTokenVolumeCredentials(token_file) if token_file else None,
            cookies=os.environ.get(COOKIES_VARIABLE) or None,
            ssl_ca_cert=config.ca_file,
            ui_host=config.ui_host,
            # with no namespace the constructor would ask the host, five times if need be, and write into the home directory
            namespace=config.namespace or "-",
        )
    client._context_setting["namespace"] = config.namespace or ""
    # kfp's methods take no timeout and its HTTP client retries by itself: both are set where all requests pass
    rest = client._run_api.api_client.rest_client
    rest.pool_manager.connection_pool_kw["retries"] = urllib3.Retry(0, raise_on_redirect=False)
    send = rest.request

    def request(*arguments: Any, _request_timeout: Any = None, **options: Any) -> Any:
        return send(*arguments, _request_timeout=_request_timeout or (config.request_timeout_s,) * 2, **options)

    rest.request = request
    return client


def _named(name: str) -> str:
    """KFP's filter for one display name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _is_transient(error: BaseException) -> bool:
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    return error.status in (*TRANSIENT, _CONFLICT) if isinstance(error, ApiException) else isinstance(error, HTTPError)


def _said(error: Any) -> str:
    """What KFP says in an error's body, one line."""
    try:
        body = json.loads(error.body)
        said = body.get("message") or body.get("error") or error.reason
    except (TypeError, ValueError, AttributeError):
        said = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or error.reason
    return " ".join(str(said).split())[:500].rstrip(".")


def _cause(error: BaseException) -> BaseException:
    """Why a request was given up, without what urllib3 wraps round it."""
    return getattr(error, "reason", None) or error

"""A stage as a KubeRay RayJob: one per run and stage, found again by its name, cancelled with its launcher."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import urllib3
import yaml
from kubernetes import client, config, watch
from kubernetes.client import ApiException
from tenacity import Retrying, retry_if_result, stop_after_delay
from tenacity import wait_fixed as every

from components.errors import ConfigError, LaunchError, did_you_mean
from components.job import ENTRYPOINT, REQUEST_S, Backend, Job, LaunchConfig, Phase, Seen
from components.progress import emit
from components.retry import TRANSIENT, retrying

R = TypeVar("R")
Json = dict[str, Any]

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
RIGHTS = (
    {"apiGroups": [GROUP], "resources": [PLURAL], "verbs": ["create", "get", "watch", "delete"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
)
"""Rules of the Role that the task's service account needs in the job's namespace, and no more. Of pods, get is for the task's
own, whose owner the job is given, and the rest for the log."""
RUN_LABEL, STAGE_LABEL = "cllmr.io/run", "cllmr.io/stage"
POD_NAME_VARIABLE, NAMESPACE_VARIABLE = "CLLMR_POD_NAME", "CLLMR_POD_NAMESPACE"

_PATIENCE_S = 120.0  # of trying again when the API server is throttling, failing or away
_PAUSE_S = 1.0  # between a watch that has ended and the next look


class KubeRay(Backend):
    """A RayJob in Kubernetes."""

    def __init__(self, job: Job, config: LaunchConfig) -> None:
        super().__init__(job, config)
        api, namespace = _connect()
        self._jobs, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._own_namespace = os.environ.get(NAMESPACE_VARIABLE) or namespace
        self.namespace = config.namespace or self._own_namespace
        self._where = (GROUP, VERSION, self.namespace, PLURAL)

    @property
    def title(self) -> str:
        """See Backend."""
        return f"RayJob {self.namespace}/{self.job.name}"

    @property
    def see(self) -> str:
        """See Backend."""
        return f"See kubectl -n {self.namespace} describe rayjob {self.job.name}"

    # -- one RayJob ------------------------------------------------------------------------------------------------------

    def attach_or_create(self, forget: Callable[[], None], has_error: Callable[[], bool]) -> None:
        """See Backend. A RayJob of an earlier attempt that failed, or that is being deleted, makes room for a new one.

        One that left an error has succeeded, as KubeRay sees it.

        Raises LaunchError when the name belongs to something else, or the API server refuses the RayJob.
        """
        manifest = self._manifest()  # before anything is asked: a template that cannot be read is told at once
        found = self._get()
        if found is not None and self._is_ours(found):
            seen = phase_of(found)
            if _is_ending(found) or seen.phase == "failed" or (seen.phase == "succeeded" and has_error()):
                emit("job replaced", job=self.job.name, state=seen.text)
                self._delete(found)
                self._wait_until_gone(_PATIENCE_S)
                found = None
        if found is None:
            forget()
        there = found or self._create(manifest)
        if not self._is_ours(there):
            raise LaunchError(
                f"{self.title} is there already and is not of run {self.job.run_id}, stage {self.job.stage}.",
                "Delete it, or give the run another id.",
            )
        if found is not None:
            emit("job attached", job=self.job.name)

    def _create(self, manifest: Json) -> Json:
        """Creates the RayJob; the one that is there when another launcher, or a lost answer, was first."""
        try:
            manifest["metadata"]["ownerReferences"] = self._owners()
            made: Json = self._call(
                lambda: self._jobs.create_namespaced_custom_object(*self._where, manifest, _request_timeout=REQUEST_S)
            )
            return made
        except ApiException as error:
            if error.status != 409:
                raise self._refused(error) from None
        there = self._get()
        assert there is not None, "a name is taken by something that can be read"
        return there

    def _manifest(self) -> Json:
        """The template with the name, what runs, of which run it is, and the limits that must not be missing."""
        manifest = read_template(Path(self.config.templates) / f"{self.job.stage}.yaml")
        metadata, spec = manifest.setdefault("metadata", {}), manifest["spec"]
        metadata["name"] = self.job.name
        metadata.pop("generateName", None)
        metadata["namespace"] = self.namespace
        metadata["labels"] = {**(metadata.get("labels") or {}), RUN_LABEL: self.job.run_id, STAGE_LABEL: self.job.stage}
        runtime = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
        runtime["env_vars"] = {**runtime.get("env_vars", {}), **self.job.environment()}
        spec["entrypoint"] = ENTRYPOINT
        spec["runtimeEnvYAML"] = yaml.safe_dump(runtime)
        # the operator keeps these when the launcher is gone
        spec["shutdownAfterJobFinishes"] = True
        spec["activeDeadlineSeconds"] = math.ceil(self.config.timeout_s)
        return manifest

    def _owners(self) -> list[Json]:
        """What owns the launcher's pod, on Kubeflow the run's Workflow: Kubernetes deletes the RayJob after it.

        Not the pod: it goes with its node, and the RayJob is to wait for the next launcher. Nothing in another namespace, where
        an owner would count as gone.
        """
        name = os.environ.get(POD_NAME_VARIABLE)
        if not name or self.namespace != self._own_namespace:
            return []
        pod = self._call(lambda: self._core.read_namespaced_pod(name, self.namespace, _request_timeout=REQUEST_S))
        return [
            {"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid}
            for owner in pod.metadata.owner_references or []
        ]

    def _get(self) -> Json | None:
        try:
            there: Json = self._call(
                lambda: self._jobs.get_namespaced_custom_object(*self._where, self.job.name, _request_timeout=REQUEST_S)
            )
            return there
        except ApiException as error:
            if error.status == 404:
                return None
            raise self._refused(error) from None

    def _is_ours(self, there: Json) -> bool:
        labels = there["metadata"].get("labels") or {}
        return (labels.get(RUN_LABEL), labels.get(STAGE_LABEL)) == (self.job.run_id, self.job.stage)

    def cancel(self) -> None:
        """See Backend."""
        there = self._get()
        if there is None or not self._is_ours(there):
            return
        self._delete(there)
        self._wait_until_gone(self.config.grace_s)

    def _delete(self, there: Json) -> None:
        options = client.V1DeleteOptions(
            propagation_policy="Background", preconditions=client.V1Preconditions(uid=there["metadata"]["uid"])
        )
        try:
            self._call(
                lambda: self._jobs.delete_namespaced_custom_object(
                    *self._where, self.job.name, body=options, _request_timeout=REQUEST_S
                )
            )
        except ApiException as error:
            if error.status not in (404, 409):  # gone already, or replaced by another of the name
                raise self._refused(error) from None

    def _wait_until_gone(self, seconds: float) -> None:
        waiting = Retrying(
            retry=retry_if_result(lambda there: there is not None),
            wait=every(0.5),
            stop=stop_after_delay(seconds),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        if waiting(self._get) is not None:
            emit("warning", stage=self.job.stage, message=f"{self.title} is still being deleted after {seconds:g} s")

    # -- its state -------------------------------------------------------------------------------------------------------

    def look(self, longest_s: Callable[[], float]) -> Iterator[Seen]:
        """See Backend. A watch from the state that was read; when it ends, expires or breaks, the state is read again."""
        while (there := self._get()) is not None:
            yield phase_of(there)
            yield from self._watched(there["metadata"]["resourceVersion"], min(self.config.resync_s, longest_s()))
            time.sleep(min(_PAUSE_S, longest_s()))
        yield Seen("gone", "deleted")

    def _watched(self, version: str, longest_s: float) -> Iterator[Seen]:
        """What changes from a version on, until the watch ends, for whatever reason."""
        seconds = max(1, math.ceil(longest_s))
        try:
            for event in watch.Watch().stream(
                self._jobs.list_namespaced_custom_object,
                *self._where,
                field_selector=f"metadata.name={self.job.name}",
                resource_version=version,
                timeout_seconds=seconds,
                _request_timeout=(REQUEST_S[0], seconds + 5.0),  # a server that is silent for longer is dead
            ):
                if event["type"] == "DELETED":
                    return
                if event["type"] != "BOOKMARK":
                    yield phase_of(event["object"])
        except ApiException as error:
            if error.status not in (*TRANSIENT, 410):  # 410: what it began from is forgotten
                raise self._refused(error) from None
        except urllib3.exceptions.HTTPError as error:
            emit("watch broken", job=self.job.name, reason=type(error).__name__)

    # -- its log ---------------------------------------------------------------------------------------------------------

    def _read_logs(self, stop: threading.Event) -> None:
        """Copies the log of the pod that submits the job, which is the driver's, until `stop`, and then the rest of it."""
        told: dict[str, int] = {}  # lines, by pod
        last = False
        while not last:
            last = stop.is_set()
            try:
                for pod, container in self._log_sources():
                    lines = watch.Watch().stream(
                        self._core.read_namespaced_pod_log,
                        name=pod,
                        namespace=self.namespace,
                        container=container,
                        _request_timeout=(REQUEST_S[0], self.config.resync_s),
                        **({} if last else {"follow": True}),
                    )
                    for line in islice(lines, told.get(pod, 0), None):  # a log that is read again begins at its beginning
                        told[pod] = told.get(pod, 0) + 1
                        self.tell(line)
            except ApiException as error:
                if error.status in (401, 403):
                    emit("warning", stage=self.job.stage, message=f"the log of {self.title} may not be read: {error.reason}")
                    return
            except urllib3.exceptions.HTTPError:
                pass  # silent for a while, or broken: read on from there
            stop.wait(_PAUSE_S)

    def _log_sources(self) -> Iterator[tuple[str, str]]:
        """Pods and containers whose log is the driver's, oldest first: the submitter's own pod, or its sidecar's."""
        there = self._get() or {"spec": {}}
        cluster = (there.get("status") or {}).get("rayClusterName")
        if there["spec"].get("submissionMode") != "SidecarMode":
            selector = f"job-name={self.job.name}"
        elif cluster:
            selector = f"ray.io/cluster={cluster},ray.io/node-type=head"
        else:
            return
        pods = self._core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=REQUEST_S).items
        for pod in sorted(pods, key=lambda pod: str(pod.metadata.creation_timestamp)):
            names = [container.name for container in pod.spec.containers]
            yield pod.metadata.name, "ray-job-submitter" if "ray-job-submitter" in names else names[0]

    # -- requests --------------------------------------------------------------------------------------------------------

    def _call(self, function: Callable[[], R]) -> R:
        """Calls the API server, again while it is throttling, failing or away."""
        try:
            return retrying(_is_transient, _PATIENCE_S)(function)
        except urllib3.exceptions.HTTPError as error:
            raise LaunchError(
                f"the Kubernetes API server does not answer: {error}.", "Check the cluster; the step may be run again."
            ) from None

    def _refused(self, error: ApiException) -> LaunchError:
        """An API server's refusal in its own words."""
        try:
            said = yaml.safe_load(error.body)["message"]
        except (TypeError, KeyError, AttributeError, yaml.YAMLError):
            said = error.reason
        hint = {
            403: "Give the task's service account the right to create, get, watch and delete rayjobs.ray.io, and to get pods.",
            404: "Install the KubeRay operator and its RayJob definition.",
            422: f"Correct {self.config.templates}/{self.job.stage}.yaml.",
        }
        return LaunchError(
            f"{self.title}: the Kubernetes API server refused with {error.status}: {said}.", hint.get(error.status, self.see)
        )


# -- pure -------------------------------------------------------------------------------------------------------------------


def phase_of(rayjob: Json) -> Seen:
    """How a RayJob stands, from its spec and status.

    The deployment's state decides and not the job's: a failed job with tries left (backoffLimit) goes on. Suspended is Kueue's
    (or a person's) doing: queued, and not started.
    """
    status = rayjob.get("status") or {}
    deployment, job = status.get("jobDeploymentStatus") or "", status.get("jobStatus") or ""
    said = ": ".join(" ".join(str(status[key]).split()) for key in ("reason", "message") if status.get(key))
    words = " ".join(word for word in (deployment or "new", job, said and f"({said[:1000]})") if word)
    phase: Phase = "starting"
    if deployment in ("Failed", "ValidationFailed") or (deployment == "Complete" and job != "SUCCEEDED"):
        return Seen("failed", said[:1000] or words)
    if deployment == "Complete":
        phase = "succeeded"
    elif rayjob["spec"].get("suspend") or deployment in ("Suspended", "Suspending"):
        queue = (rayjob["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name")
        phase, words = "queued", f"{words}, waiting for Kueue to admit it from queue {queue}" if queue else words
    elif deployment == "Running":
        phase = "running"
    return Seen(phase, words)


def read_template(path: Path) -> Json:
    """The RayJob that a stage's job is made from; raises ConfigError when there is none."""
    try:
        template = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        stages = [other.stem for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        there = did_you_mean(path.stem, stages) if stages else "The folder has no templates: mount the ConfigMap with them."
        raise ConfigError(f"RayJob template '{path}' cannot be read: {error.strerror or error}.", there) from None
    except yaml.YAMLError:
        raise ConfigError(f"RayJob template '{path}' is not YAML.", "Correct it.") from None
    seen = (template.get("apiVersion"), template.get("kind")) if isinstance(template, dict) else type(template).__name__
    if seen != (f"{GROUP}/{VERSION}", "RayJob") or not isinstance(template.get("spec"), dict):
        raise ConfigError(f"RayJob template '{path}' is {seen}, not a ray.io/v1 RayJob with a spec.", "Correct it.")
    return dict(template)


def _is_ending(rayjob: Json) -> bool:
    return bool(rayjob["metadata"].get("deletionTimestamp"))


def _connect() -> tuple[client.ApiClient, str]:
    """A client of the cluster this pod is in, else of the one that the kubeconfig names, and the namespace to work in."""
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
        namespace = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text(encoding="utf-8").strip()
    except config.ConfigException:
        try:
            file = os.environ.get("KUBECONFIG")  # the client has read it when it was imported, which may have been before
            config.load_kube_config(file, client_configuration=configuration)
            _, active = config.list_kube_config_contexts(file)
            namespace = active["context"].get("namespace", "default")
        except config.ConfigException as error:
            raise ConfigError(
                f"no Kubernetes cluster is configured: {str(error).rstrip('.')}.",
                "Run in a pod with a service account, or set KUBECONFIG.",
            ) from None
    configuration.retries = urllib3.Retry(0)  # tenacity's are the only ones
    return client.ApiClient(configuration), namespace


def _is_transient(error: BaseException) -> bool:
    return error.status in TRANSIENT if isinstance(error, ApiException) else isinstance(error, urllib3.exceptions.HTTPError)

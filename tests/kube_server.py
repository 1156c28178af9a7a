"""A Kubernetes API server for RayJobs on loopback: objects validated by the operator's own CRD where it is at hand, versions,
watches that expire, pods with logs, and an operator that moves the status on as a test says."""

import copy
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from components.kuberay import RIGHTS
from tests import REPOSITORY, crds
from tests.servers import Faulty, Refused, serving

Json = dict[str, Any]
TEMPLATE = """
apiVersion: ray.io/v1
kind: RayJob
metadata:
  labels: {kueue.x-k8s.io/queue-name: gpu}
spec:
  submissionMode: K8sJobMode
  backoffLimit: 2
  runtimeEnvYAML: |
    env_vars: {OMP_NUM_THREADS: "1"}
  rayClusterSpec:
    rayVersion: 2.60.0
    headGroupSpec:
      rayStartParams: {num-cpus: "0"}
      template:
        spec:
          containers:
            - {name: ray-head, image: cllmr-train, resources: {requests: {cpu: "1", memory: 4Gi}, limits: {memory: 4Gi}}}
    workerGroupSpecs:
      - groupName: workers
        replicas: 2
        minReplicas: 2
        maxReplicas: 2
        rayStartParams: {}
        template:
          spec:
            containers:
              - {name: ray-worker, image: cllmr-train, resources: {requests: {cpu: "1", memory: 4Gi}, limits: {memory: 4Gi}}}
"""
WORKFLOW = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "retraining-x7k2p", "uid": "uid-of-workflow"}


@dataclass
class KubeServer(Faulty):
    """What the cluster holds, and how it behaves."""

    operator: Callable[["KubeServer", str], None] = lambda server, name: None
    """Called in a thread of its own with the name of every RayJob that is created."""
    validates: bool = True
    token: str = "t"
    deletion_s: float = 0.0
    """Seconds that the operator's finalizer holds a deleted RayJob."""
    expired_watches: int = 0
    """Watches to come that are told 410, as after etcd's compaction."""
    silent_watches: int = 0
    """Watches to come that tell nothing and never end, as over a dead connection."""
    broken_watches: int = 0
    """Watches to come whose connection breaks at once."""
    pod_owners: list[Json] = field(default_factory=lambda: [{**WORKFLOW, "controller": True, "blockOwnerDeletion": True}])
    """Of every pod that is asked for by its name, as Argo's pods have them."""
    objects: dict[str, Json] = field(default_factory=dict)
    used: set[tuple[str, str, str]] = field(default_factory=set)
    """API group, resource and verb of everything that was asked."""
    created: list[str] = field(default_factory=list)
    """Uid of every RayJob that ever was."""
    events: list[tuple[int, str, Json]] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)
    """Lines by pod."""
    broken_logs: int = 0
    """Followed logs to come that end after their first line, although there is more."""
    version: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    # -- what tests and operators do ------------------------------------------------------------------------------------------

    def set_status(self, name: str, **status: Any) -> None:
        """Moves a RayJob's status on, as the operator does; nothing happens when it is not there any more."""
        with self.changed:
            if name in self.objects:
                self.objects[name]["status"] = {**self.objects[name].get("status", {}), **status}
                self._changed("MODIFIED", name)

    def log(self, name: str, *lines: str) -> None:
        """Lines of the pod that submits the RayJob."""
        with self.changed:
            self.logs.setdefault(f"{name}-xyz12", []).extend(lines)
            self.changed.notify_all()

    def run(self, name: str) -> None:
        """Does what the RayJob asks for in a process of its own, as often as backoffLimit has it, and sets the status."""
        spec = self.objects[name]["spec"]
        variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
        for left in range(spec.get("backoffLimit", 0), -1, -1):
            self.set_status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
            process = subprocess.run(
                spec["entrypoint"],
                shell=True,  # as Ray runs an entrypoint
                cwd=REPOSITORY,
                env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), **variables},
                capture_output=True,
                text=True,
            )
            self.log(name, *(process.stdout + process.stderr).splitlines())
            if process.returncode == 0:
                self.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
                return
            message = f"Job entrypoint command failed with exit code {process.returncode}"
            state = "Retrying" if left else "Failed"
            self.set_status(name, jobDeploymentStatus=state, jobStatus="FAILED", reason="AppFailed", message=message)

    def _changed(self, kind: str, name: str) -> Json:
        self.version += 1
        one = self.objects[name]
        one["metadata"]["resourceVersion"] = str(self.version)
        self.events.append((self.version, kind, copy.deepcopy(one)))
        self.changed.notify_all()
        return one

    def authorize(self, kind: str, path: str) -> None:
        """Raises Refused for a verb that the launcher's Role does not have."""
        match path.strip("/").split("/"):
            case ["apis", group, _, "namespaces", _, resource, *name]:
                pass
            case ["api", _, "namespaces", _, resource, *name]:
                group, resource = "", "/".join([resource, *name[1:]])
            case _:
                raise Refused(403, f"{path} is forbidden")
        verbs = {"POST": "create", "DELETE": "delete", "WATCH": "watch", "GET": "get" if name else "list"}
        verb = verbs[kind]
        self.used.add((group, resource, verb))
        if not any(group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"] for rule in RIGHTS):
            raise Refused(403, f"{resource} is forbidden: cannot {verb} in API group {group!r}")

    # -- the API -------------------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: Json, body: Any) -> Json:
        """The object of one answer that is no stream."""
        match method, path.strip("/").split("/"):
            case "POST", ["apis", "ray.io", "v1", "namespaces", namespace, "rayjobs"]:
                return self._create(namespace, body)
            case "GET", ["apis", "ray.io", "v1", "namespaces", _, "rayjobs", name]:
                return self._of(name)
            case "DELETE", ["apis", "ray.io", "v1", "namespaces", _, "rayjobs", name]:
                return self._delete(name, body or {})
            case "GET", ["api", "v1", "namespaces", namespace, "pods", name]:
                metadata = {"name": name, "namespace": namespace, "ownerReferences": self.pod_owners}
                return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
            case "GET", ["api", "v1", "namespaces", namespace, "pods"]:
                key, _, wanted = query["labelSelector"].partition("=")
                assert key == "job-name"
                pods = [pod for pod in sorted(self.logs) if pod.rsplit("-", 1)[0] == wanted]
                return {"apiVersion": "v1", "kind": "PodList", "items": [self._pod(namespace, pod) for pod in pods]}
        raise Refused(404, f"{method} {path} is not of this API")

    def _pod(self, namespace: str, name: str) -> Json:
        created = datetime(2026, 1, 1, tzinfo=UTC).isoformat()
        metadata = {"name": name, "namespace": namespace, "creationTimestamp": created}
        return {"metadata": metadata, "spec": {"containers": [{"name": "ray-job-submitter"}]}}

    def _create(self, namespace: str, body: Json) -> Json:
        name = body["metadata"]["name"]
        if self.validates and crds.FOUND and (found := crds.problems(body)):
            raise Refused(422, f"RayJob.ray.io {name!r} is invalid: {'; '.join(found)}")
        if name in self.objects:
            raise Refused(409, f'rayjobs.ray.io "{name}" already exists')
        made = copy.deepcopy(body)
        made["metadata"] |= {"uid": str(uuid.uuid4()), "namespace": namespace, "creationTimestamp": "2026-01-01T00:00:00Z"}
        self.objects[name] = made
        self.created.append(made["metadata"]["uid"])
        answer = copy.deepcopy(self._changed("ADDED", name))
        threading.Thread(target=self.operator, args=(self, name), daemon=True).start()
        return answer

    def _of(self, name: str) -> Json:
        if name not in self.objects:
            raise Refused(404, f'rayjobs.ray.io "{name}" not found')
        return self.objects[name]

    def _delete(self, name: str, options: Json) -> Json:
        there = self._of(name)
        wanted = (options.get("preconditions") or {}).get("uid", there["metadata"]["uid"])
        if wanted != there["metadata"]["uid"]:
            raise Refused(409, "Precondition failed: UID in precondition does not match")
        if self.deletion_s:
            there["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            self._changed("MODIFIED", name)
            threading.Timer(self.deletion_s, self._remove, (name, there)).start()
        else:
            self._remove(name, there)
        return {"kind": "Status", "status": "Success"}

    def _remove(self, name: str, there: Json) -> None:
        with self.changed:
            if self.objects.get(name) is there:
                self._changed("DELETED", name)
                del self.objects[name]

    def watch(self, query: Json) -> Iterator[Json]:
        """Events from a version on, until the time is up."""
        name = query["fieldSelector"].removeprefix("metadata.name=")
        since, deadline = int(query["resourceVersion"]), time.monotonic() + int(query["timeoutSeconds"])
        if self.expired_watches:
            self.expired_watches -= 1
            status = {"kind": "Status", "code": 410, "reason": "Expired", "message": f"too old resource version: {since}"}
            yield {"type": "ERROR", "object": status}
            return
        while (left := deadline - time.monotonic()) > 0:
            with self.changed:
                found = [(version, kind, one) for version, kind, one in self.events if version > since]
                if not found:
                    self.changed.wait(left)
                    continue
            for version, kind, one in found:
                since = version
                if one["metadata"]["name"] == name:
                    yield {"type": kind, "object": one}

    def lines(self, pod: str, follow: bool) -> Iterator[str]:
        """A pod's log; followed until its RayJob has ended."""
        name, told = pod.rsplit("-", 1)[0], 0
        broken = self.broken_logs > 0 and follow
        self.broken_logs -= broken
        while True:
            with self.changed:
                fresh = self.logs[pod][told:]
                status = self.objects.get(name, {}).get("status", {})
                ended = name not in self.objects or status.get("jobDeploymentStatus") in ("Complete", "Failed")
                if not fresh and follow and not ended:
                    self.changed.wait(0.2)
                    continue
            for line in fresh:
                told += 1
                yield line
                if broken:
                    return
            if not follow or (ended and told == len(self.logs[pod])):
                return


def handler(server: KubeServer) -> type[BaseHTTPRequestHandler]:
    """The requests of one server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *ignored: Any) -> None:
            return

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = "WATCH" if query.get("watch") else self.command
            server.requests.append((kind, parts.path))
            time.sleep(server.delay)
            try:
                if self.headers.get("Authorization", "").removeprefix("Bearer ") != server.token:
                    raise Refused(401, "Unauthorized")
                server.authorize(kind, parts.path)
                fault = server.fault(kind, parts.path)
                if fault and not fault.after:
                    raise Refused(fault.status, "injected")
                if kind == "WATCH":
                    self.stream_events(query)
                    return
                if parts.path.endswith("/log"):
                    self.stream(f"{line}\n" for line in server.lines(parts.path.split("/")[-2], query.get("follow") == "True"))
                    return
                with server.changed:
                    value = copy.deepcopy(server.answer(self.command, parts.path, query, json.loads(raw) if raw else None))
                if fault:
                    raise Refused(fault.status, "injected")
                self.reply(200, value)
            except Refused as refused:
                fault_headers = {"Retry-After": "0"} if refused.status == 429 else {}
                self.reply(
                    refused.status, {"kind": "Status", "code": refused.status, "message": refused.message}, fault_headers
                )

        do_GET = do_POST = do_DELETE = handle_any

        def stream_events(self, query: Json) -> None:
            if server.broken_watches:
                server.broken_watches -= 1
                self.close_connection = True
                self.connection.close()
                return
            if server.silent_watches:
                server.silent_watches -= 1
                self.start(chunked=True)
                self.wfile.flush()
                time.sleep(180)
                return
            self.stream(f"{json.dumps(event)}\n" for event in server.watch(query))

        def start(self, chunked: bool, status: int = 200, headers: Json | None = None, length: int = 0) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(length))))
            self.end_headers()

        def stream(self, texts: Iterator[str]) -> None:
            try:
                self.start(chunked=True)
                for text in texts:
                    data = text.encode()
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # who watched has gone

        def reply(self, status: int, value: Json, headers: Json | None = None) -> None:
            body = json.dumps(value).encode()
            try:
                self.start(False, status, headers, len(body))
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    return Handler


@contextmanager
def kube_server(**settings: Any) -> Iterator[KubeServer]:
    """A running server."""
    server = KubeServer(**settings)
    with serving(handler(server)) as url:
        server.url = url
        yield server


def kubeconfig(server: KubeServer, path: Path, token: str = "t") -> Path:
    """A kubeconfig file for the server."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server.url}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
        "current-context": "x",
    }
    path.write_text(yaml.safe_dump(config))
    return path

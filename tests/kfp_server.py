"""A Kubeflow Pipelines API on loopback for tests: real HTTP, and KFP's own models say what a body may hold, both ways.

Single-user or multi-user, with or without credentials; ``fail`` and ``delay`` inject what a cluster does on a bad day.
"""

import json
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import yaml

from tests.servers import Faulty, Refused, serving

Json = dict[str, Any]
PREFIX = "/apis/v2beta1"


def check(value: Any, kind: str, where: str = "body") -> None:
    """Raises Refused when `value` is not of a type as KFP's swagger names it, down to the last field."""
    if value is None or kind == "object":
        return
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        for place, item in enumerate(expect(value, list, where)):
            check(item, match[1], f"{where}[{place}]")
    elif match := re.fullmatch(r"dict\(str, (.+)\)", kind):
        for key, item in expect(value, dict, where).items():
            check(item, match[1], f"{where}.{key}")
    elif kind in ("str", "datetime"):
        expect(value, (str, int), where)  # int64 is a string in the swagger, and kfp's client sends numbers
    elif kind in ("bool", "int", "float"):
        expect(value, {"bool": bool, "int": int, "float": (int, float)}[kind], where)
    else:
        model = getattr(kfp_server_api, kind)
        if hasattr(model, "allowable_values"):
            if value not in model.allowable_values:
                raise Refused(400, f"{where}: {value!r} is not one of {model.allowable_values}")
            return
        names = {wire: attribute for attribute, wire in model.attribute_map.items()}
        for key, item in expect(value, dict, where).items():
            if key not in names:
                raise Refused(400, f"{where}: unknown field {key!r} of {kind}")
            check(item, model.openapi_types[names[key]], f"{where}.{key}")


def expect(value: Any, kind: Any, where: str) -> Any:
    """`value`, which is a `kind`."""
    if not isinstance(value, kind):
        raise Refused(400, f"{where}: {value!r} is not a {kind}")
    return value


@dataclass
class KfpServer(Faulty):
    """What the API holds, and how it behaves."""

    multi_user: bool = False
    tokens: set[str] = field(default_factory=set)
    """Bearer tokens that are let in; empty: everybody is."""
    cookies: set[str] = field(default_factory=set)
    """Cookie headers that are let in."""
    sign_in_page: bool = False
    """Whether who is not let in is sent to a page, as oauth2-proxy does, and not told 401."""
    states: list[str] = field(default_factory=lambda: ["PENDING", "RUNNING", "SUCCEEDED"])
    """What a run goes through, one step for each time it is looked at."""
    task_details: list[Json] = field(default_factory=list)
    """The tasks of runs that have begun."""
    pipelines: dict[str, Json] = field(default_factory=dict)
    versions: dict[str, Json] = field(default_factory=dict)
    experiments: dict[str, Json] = field(default_factory=dict)
    runs: dict[str, Json] = field(default_factory=dict)
    recurring_runs: dict[str, Json] = field(default_factory=dict)

    def spec_of(self, run: Json) -> Json:
        """The pipeline spec that a run executes."""
        spec: Json = (
            run.get("pipeline_spec") or self.versions[run["pipeline_version_reference"]["pipeline_version_id"]]["pipeline_spec"]
        )
        return spec

    # -- the API -------------------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: Json, body: Any) -> tuple[str, Json]:
        """The model and the value of one answer."""
        match method, path.removeprefix(PREFIX).strip("/").split("/"):
            case "GET", ["healthz"]:
                return "V2beta1GetHealthzResponse", {"multi_user": self.multi_user}
            case "GET", ["experiments"]:
                return "V2beta1ListExperimentsResponse", self._list(self.experiments, "experiments", query)
            case "POST", ["experiments"]:
                self._check_namespace(body.get("namespace"))
                return "V2beta1Experiment", self._create(self.experiments, "experiment_id", body)
            case "GET", ["pipelines"]:
                return "V2beta1ListPipelinesResponse", self._list(self.pipelines, "pipelines", query)
            case "POST", ["pipelines"]:
                self._unique(self.pipelines, "name", body)
                return "V2beta1Pipeline", self._create(self.pipelines, "pipeline_id", body)
            case "POST", ["pipelines", "upload_version"]:
                return "V2beta1PipelineVersion", self._upload(query, body)
            case "GET", ["pipelines", pipeline_id, "versions"]:
                theirs = {key: one for key, one in self.versions.items() if one["pipeline_id"] == pipeline_id}
                return "V2beta1ListPipelineVersionsResponse", self._list(theirs, "pipeline_versions", query, namespaced=False)
            case "GET", ["runs"]:
                return "V2beta1ListRunsResponse", self._list(self.runs, "runs", query)
            case "POST", ["runs"]:
                self._runnable(body)
                return "V2beta1Run", self._create(self.runs, "run_id", {**body, "state": "PENDING"})
            case "GET", ["runs", run_id]:
                return "V2beta1Run", self._step(self._of(self.runs, run_id))
            case "POST", ["runs", call] if call.endswith(":terminate"):
                self._of(self.runs, call.removesuffix(":terminate"))["script"] = ["CANCELING", "CANCELED"]
                return "object", {}
            case "GET", ["recurringruns"]:
                return "V2beta1ListRecurringRunsResponse", self._list(self.recurring_runs, "recurringRuns", query)
            case "POST", ["recurringruns"]:
                self._runnable(body)
                if not 1 <= int(body["max_concurrency"]) <= 10 or len(body["trigger"]["cron_schedule"]["cron"].split()) != 6:
                    raise Refused(400, "max_concurrency is 1 to 10, and cron has six fields")
                status = "ENABLED" if body["mode"] == "ENABLE" else "DISABLED"
                made = {**body, "status": status, "max_concurrency": str(body["max_concurrency"])}
                return "V2beta1RecurringRun", self._create(self.recurring_runs, "recurring_run_id", made)
            case "POST", ["recurringruns", call] if ":" in call:
                recurring_run_id, verb = call.split(":")
                self._of(self.recurring_runs, recurring_run_id)["status"] = {"enable": "ENABLED", "disable": "DISABLED"}[verb]
                return "object", {}
            case "DELETE", ["recurringruns", recurring_run_id]:
                self._of(self.recurring_runs, recurring_run_id)
                del self.recurring_runs[recurring_run_id]
                return "object", {}
        raise Refused(404, f"{method} {path} is not of this API")

    def _check_namespace(self, namespace: str | None) -> None:
        if self.multi_user and not namespace:
            raise Refused(400, "Invalid input error: Namespace is empty in multi-user mode")
        if namespace and not self.multi_user:
            raise Refused(400, "Invalid input error: In single-user mode, a namespace must not be given")

    def _unique(self, things: dict[str, Json], key: str, body: Json) -> None:
        if any(one[key] == body[key] for one in things.values()):
            raise Refused(409, f"Already exist error: {key} {body[key]} is taken")

    def _create(self, things: dict[str, Json], key: str, body: Json) -> Json:
        made = {**body, key: str(uuid.uuid4()), "created_at": datetime.now(UTC).isoformat()}
        things[made[key]] = made
        return made

    def _of(self, things: dict[str, Json], key: str) -> Json:
        if key not in things:
            raise Refused(404, f"ResourceNotFoundError: {key} not found")
        return things[key]

    def _runnable(self, body: Json) -> None:
        self._of(self.experiments, body["experiment_id"])
        reference = body.get("pipeline_version_reference")
        if reference:
            self._of(self.versions, reference["pipeline_version_id"])
        elif not body.get("pipeline_spec"):
            raise Refused(400, "neither a version nor a spec")
        inputs = self.spec_of(body)["root"].get("inputDefinitions", {}).get("parameters", {})
        unknown = set(body["runtime_config"].get("parameters") or {}) - set(inputs)
        if unknown:
            raise Refused(400, f"unknown parameters {sorted(unknown)}")

    def _list(self, things: dict[str, Json], name: str, query: Json, namespaced: bool = True) -> Json:
        if namespaced and "experiment_id" not in query and name != "pipelines":
            self._check_namespace(query.get("namespace"))
        found = sorted(things.values(), key=lambda one: one["created_at"], reverse=query.get("sort_by", "").endswith(" desc"))
        if "experiment_id" in query:
            found = [one for one in found if one["experiment_id"] == query["experiment_id"]]
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            assert predicate["operation"] == "EQUALS" or predicate["operation"] == 1
            found = [one for one in found if one.get(predicate["key"]) == predicate["stringValue"]]
        first, size = int(query.get("page_token") or 0), int(query.get("page_size") or 10)
        more = {"next_page_token": str(first + size)} if first + size < len(found) else {}
        page = [{key: value for key, value in one.items() if key != "script"} for one in found[first : first + size]]
        return {name: page, "total_size": len(found), **more}

    def _upload(self, query: Json, body: Message) -> Json:
        (part,) = body.get_payload()
        documents = list(yaml.safe_load_all(part.get_payload(decode=True)))
        self._of(self.pipelines, query["pipelineid"])
        made = {"pipeline_id": query["pipelineid"], "name": query["name"], "display_name": query["name"]}
        self._unique(self.versions, "name", made)
        return self._create(self.versions, "pipeline_version_id", {**made, "pipeline_spec": documents[0]})

    def _step(self, run: Json) -> Json:
        script = run.setdefault("script", list(self.states))
        run["state"] = script.pop(0) if len(script) > 1 else script[0]
        if run["state"] != "PENDING":
            run["run_details"] = {"task_details": self.task_details}
        return {key: value for key, value in run.items() if key != "script"}


def handler(server: KfpServer) -> type[BaseHTTPRequestHandler]:
    """The requests of one server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet

        def log_message(self, *ignored: Any) -> None:
            return

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.requests.append((self.command, parts.path))
            time.sleep(server.delay)
            try:
                with server.lock:
                    self.admit()
                    fault = server.fault(self.command, parts.path)
                    value = None
                    if fault is None or fault.after:
                        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
                        kind, value = server.answer(self.command, parts.path, query, self.body(raw))
                        check(value, kind, "answer")
                    if fault:
                        self.reply(fault.status, json.dumps({"message": "injected"}).encode(), fault.headers)
                        return
                    text = json.dumps(value).encode()
                self.reply(200, text)
            except Refused as refused:
                if refused.status == 302:
                    self.reply(302, b"", {"Location": "/sign-in"})
                    return
                self.reply(refused.status, json.dumps({"error": refused.message, "message": refused.message}).encode())

        do_GET = do_POST = do_DELETE = handle_any

        def admit(self) -> None:
            if not server.tokens and not server.cookies:
                return
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token not in server.tokens and self.headers.get("Cookie") not in server.cookies:
                raise Refused(302 if server.sign_in_page else 401, "Request not authenticated")

        def body(self, raw: bytes) -> Any:
            kind = self.headers.get("Content-Type") or ""
            if kind.startswith("multipart/"):
                return message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw)
            if not raw:
                return {}
            value = json.loads(raw)
            path = urlsplit(self.path).path.removeprefix(PREFIX)
            models = {
                "/experiments": "V2beta1Experiment",
                "/pipelines": "V2beta1Pipeline",
                "/runs": "V2beta1Run",
                "/recurringruns": "V2beta1RecurringRun",
            }
            if path in models:
                check(value, models[path])
            return value

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # who asked has given up

    return Handler


@contextmanager
def kfp_server(**settings: Any) -> Iterator[KfpServer]:
    """A running server."""
    server = KfpServer(**settings)
    with serving(handler(server)) as url:
        server.url = url
        yield server

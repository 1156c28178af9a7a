"""A request's trace through proxy, gateway and scorer, as a collector that speaks OTLP receives it."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from serving.run import running_endpoint
from tests.bundles import write_random_bundle
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

SERVICE = "cllmr-endpoint"
EXPECTED = {"POST /v1/recommend", "features", "scorer", "model"}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Collector(ThreadingHTTPServer):
    """Keeps the spans it is sent, each with the name of its service."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receive)
        self.spans: list[tuple[str, Span]] = []

    def of_trace(self, trace_id: str) -> list[Span]:
        return [span for _, span in list(self.spans) if span.trace_id.hex() == trace_id]


class Receive(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.server.spans += [(named["service.name"], span) for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: a line per batch tells nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def test_a_request_is_traced_from_the_proxy_to_the_model(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "serving.tracing:otlp")
    monkeypatch.setenv("RAY_SERVE_TRACING_SAMPLING_RATIO", "0")  # only what comes with a trace that is sampled
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", SERVICE)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds
    bundle = write_random_bundle(tmp_path / "bundle", num_users=10, num_items=20)
    args = {"storage_root": str(tmp_path), "train": "0" * 16, "model_version": "7", "bundle_dir": str(bundle)}
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump({"applications": [{"import_path": "serving.app:build_app", "args": args}]}))
    with running_endpoint(config, port=0) as url:
        parent = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        assert httpx.post(f"{url}/v1/recommend", json={"users": ["u1"]}, headers=parent, timeout=60).status_code == 200
        assert httpx.post(f"{url}/v1/recommend", json={"users": ["u2"]}, timeout=60).status_code == 200
        # each process sends its own
        wait_until("the spans", lambda: {span.name for span in collector.of_trace(TRACE)}, lambda names: names >= EXPECTED)
    spans = {span.name: span for span in collector.of_trace(TRACE)}
    assert {service for service, _ in collector.spans} == {SERVICE}
    assert {span.trace_id.hex() for _, span in collector.spans} == {TRACE}
    by_id = {span.span_id: span for span in spans.values()}
    ancestors, span = [], spans["model"]
    while span.parent_span_id in by_id:
        span = by_id[span.parent_span_id]
        ancestors.append(span.name)
    assert any("Scorer" in name for name in ancestors), ancestors
    assert "POST /v1/recommend" in ancestors, ancestors
    assert span.parent_span_id.hex() == "00f067aa0ba902b7", "the caller's span is the root"

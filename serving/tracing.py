"""Where the traces of requests go. Ray Serve makes the spans of proxy and replicas, `StageTimer` those of stages within.

Behind environment variables alone, read when a process starts: ``RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH=serving.tracing:otlp``
turns it on, ``RAY_SERVE_TRACING_SAMPLING_RATIO`` (0.01) says for which share of the requests that come without a trace, and
``OTEL_EXPORTER_OTLP_ENDPOINT`` and the other variables of OpenTelemetry where spans are sent and under which service name.
"""

from opentelemetry.sdk.trace import SpanProcessor


def otlp() -> list[SpanProcessor]:
    """What sends spans, in batches, to a collector that speaks OTLP over HTTP; for Ray Serve, once per process."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]

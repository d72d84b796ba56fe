"""Tells OpenTelemetry how long each text waited, was read, was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from trimode.server.records import RequestRecord

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_NANOSECONDS = 1_000_000_000
_PARENT: ContextVar[tuple[str, Context] | None] = ContextVar("trimode_trace_parent", default=None)


class TraceParent:
    """Reads the trace that a request belongs to.

    The W3C headers ``traceparent`` and ``tracestate`` name it.

    Args:
        app: Application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._reader = app, TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request answered within its trace."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parent = self._reader.extract(dict(Headers(scope=scope)), Context())
        token = _PARENT.set((OPERATIONS.get(scope["path"], "other"), parent))
        try:
            await self._app(scope, receive, send)
        finally:
            _PARENT.reset(token)


class TextTracer:
    """Makes a span for each ended text, and for its phases.

    It is an observer. No prompt and no answer is part of a span.

    Args:
        tracer: Tracer that takes the spans.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def observe(self, record: RequestRecord) -> None:
        """Make the spans of a text."""
        operation, parent = _PARENT.get() or ("other", Context())
        start = record.times.began_at
        span = self._tracer.start_span(
            f"{operation} {record.model}",
            parent,
            SpanKind.SERVER,
            attributes={"gen_ai.operation.name": operation, **attributes_of(record)},
            start_time=_ns(start),
        )
        if record.error is not None:
            span.set_status(Status(StatusCode.ERROR, record.finish_reason))
        self._phases(span, record)
        span.end(_ns(start + record.times.e2e_s))

    def reject(self, reason: str) -> None:
        """Refused requests have no text, and no span."""

    def _phases(self, span: Span, record: RequestRecord) -> None:
        times, inside = record.times, set_span_in_context(span, Context())
        end = times.began_at + times.e2e_s
        waits = end - times.queue_s - (times.prefill_s or 0.0) - (times.decode_s or 0.0)
        for name, seconds in (
            ("queue", times.queue_s),
            ("prefill", times.prefill_s),
            ("decode", times.decode_s),
        ):
            if seconds is not None:
                phase = self._tracer.start_span(name, inside, start_time=_ns(waits))
                waits += seconds
                phase.end(_ns(waits))


def attributes_of(record: RequestRecord) -> dict[str, AttributeValue]:
    """Return a span's attributes, with names of the GenAI conventions.

    An attribute that has none there has a name of its own.
    """
    found: dict[str, AttributeValue] = {
        "gen_ai.provider.name": "trimode",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": (record.finish_reason,),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "trimode.mode": record.mode,
        "trimode.drafts": record.drafts.num_tokens,
        "trimode.accepted_drafts": record.drafts.num_accepted,
    }
    if record.times.ttft_s is not None:
        found["gen_ai.server.time_to_first_token"] = record.times.ttft_s
    if record.error is not None:
        found["error.type"] = record.error
    return found


@contextmanager
def tracing_to(endpoint: str, version: str) -> Iterator[TextTracer]:
    """Send spans to an OTLP endpoint while the block runs.

    Args:
        endpoint: URL that takes traces over HTTP, such as ``http://localhost:4318/v1/traces``.
        version: Version of the library.
    """
    resource = Resource.create({"service.name": "trimode", "service.version": version})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=5)))
    try:
        yield TextTracer(provider.get_tracer("trimode.server", version))
    finally:
        provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * _NANOSECONDS)

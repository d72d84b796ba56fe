"""Spans of texts, as OpenTelemetry's exporters get them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from threading import Thread
from typing import Any

import httpx
import pytest
from serving import serving

from trimode import Engine, TriModeModel
from trimode.server.records import RequestRecord
from trimode.server.service import Service

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, get_tracer_provider

from trimode.server.tracing import TextTracer, TraceParent, tracing_to

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Sort: 5 3 9 1"}],
    "max_tokens": 12,
    "mode": "linear-spec",
    "temperature": 0,
}


class Recorder:
    """Keeps the records that the tracer sees."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def observe(self, record: RequestRecord) -> None:
        self.records.append(record)

    def reject(self, reason: str) -> None:
        """Not of interest."""


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def client(
    demo_model: TriModeModel, spans: InMemorySpanExporter, recorder: Recorder
) -> Iterator[httpx.Client]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracer = TextTracer(provider.get_tracer("test"))
    with Engine(demo_model, max_rows=2) as engine:
        service = Service(engine, "demo", observers=(tracer, recorder))
        with (
            serving(service, middleware=[TraceParent]) as address,
            httpx.Client(base_url=address, timeout=60) as client,
        ):
            yield client
    provider.shutdown()


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


def wait_for(spans: InMemorySpanExporter, name: str, count: int) -> list[ReadableSpan]:
    """Those of a stream are made once its last event is out."""
    deadline = time.monotonic() + 10
    while True:
        found = [span for span in spans.get_finished_spans() if span.name == name]
        if len(found) >= count or time.monotonic() > deadline:
            assert len(found) == count
            return found
        time.sleep(0.01)


def test_spans_are_phases_of_the_text(
    client: httpx.Client, spans: InMemorySpanExporter, recorder: Recorder
) -> None:
    answer = client.post("/v1/chat/completions", json=BODY).json()
    found = by_name(spans)
    assert set(found) == {"chat demo", "queue", "prefill", "decode"}
    text, (record,) = found["chat demo"], recorder.records
    assert text.attributes is not None
    attributes = dict(text.attributes)
    usage = answer["usage"]
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "demo"
    assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert attributes["gen_ai.response.finish_reasons"] == (answer["choices"][0]["finish_reason"],)
    assert attributes["trimode.mode"] == "linear_spec"
    assert attributes["trimode.accepted_drafts"] == record.drafts.num_accepted
    phases = [found[name] for name in ("queue", "prefill", "decode")]
    for phase in phases:
        assert phase.parent is not None
        assert phase.parent.span_id == text.context.span_id
        assert text.start_time <= phase.start_time <= phase.end_time <= text.end_time + 1000
    for before, after in pairwise(phases):
        assert abs(before.end_time - after.start_time) < 1000
    seconds = [(phase.end_time - phase.start_time) / 1e9 for phase in phases]
    times = record.times
    assert seconds == pytest.approx([times.queue_s, times.prefill_s, times.decode_s], abs=1e-5)
    assert "Sort" not in str(attributes)


def test_a_trace_goes_on(client: httpx.Client, spans: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
    body = {"prompt": "1 2 3", "max_tokens": 3, "stream": True, "n": 2}
    client.post("/v1/completions", json=body, headers=headers)
    texts = wait_for(spans, "text_completion demo", 2)
    for text in texts:
        assert f"{text.context.trace_id:032x}" == TRACE
        assert text.parent is not None
        assert f"{text.parent.span_id:016x}" == PARENT
        assert text.context.trace_state.get("a") == "b"


@pytest.mark.parametrize("header", ["", "00-0-0-01", "x" * 5000, f"00-{'0' * 32}-{PARENT}-01"])
def test_a_bad_header_begins_a_trace(
    client: httpx.Client, spans: InMemorySpanExporter, header: str
) -> None:
    answer = client.post("/v1/chat/completions", json=BODY, headers={"traceparent": header})
    assert answer.status_code == 200
    assert by_name(spans)["chat demo"].parent is None


def test_what_is_not_sampled_upstream_is_not_sent(
    client: httpx.Client, spans: InMemorySpanExporter
) -> None:
    client.post(
        "/v1/chat/completions", json=BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}
    )
    assert not spans.get_finished_spans()


def test_an_error_is_one(
    demo_model: TriModeModel, spans: InMemorySpanExporter, recorder: Recorder
) -> None:
    from trimode.server.records import make_record

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with Engine(demo_model) as engine:
        handle = engine.submit([5, 6], mode="ar", max_new_tokens=400, eos_token_ids=())
        handle.cancel()
    record = make_record(handle, request_id="r", model="m", mode="ar")
    TextTracer(provider.get_tracer("test")).observe(record)
    found = by_name(spans)
    assert set(found) == {"other m", "queue"}
    assert found["other m"].status.status_code is StatusCode.ERROR
    assert dict(found["other m"].attributes or {})["error.type"] == "RequestCancelledError"


def test_spans_reach_a_collector(recorder: Recorder, demo_model: TriModeModel) -> None:
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with Engine(demo_model) as engine:
        handle = engine.submit([5, 6], mode="ar", max_new_tokens=4)
        handle.result()
    from trimode.server.records import make_record

    with tracing_to(f"http://127.0.0.1:{server.server_port}/v1/traces", "1.2.3") as tracer:
        tracer.observe(make_record(handle, request_id="r", model="demo", mode="ar"))
    server.shutdown()
    server.server_close()
    thread.join(5)
    assert b"gen_ai.usage.output_tokens" in b"".join(bodies)
    assert type(get_tracer_provider()).__name__ == "ProxyTracerProvider"  # nothing global is set


def test_a_server_does_without() -> None:
    """No spans are made where no endpoint is given; FastAPI itself loads the interface alone."""
    code = """
import sys, trimode.server.start
print([m for m in sys.modules if m.startswith(("opentelemetry.sdk", "trimode.server.tracing"))])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

"""The log of a server: one line a request, joined with its texts, and nothing that users say."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from serving import serving

from trimode import Engine, TriModeModel
from trimode.server.access_log import AccessLog, RequestLog, TextLog
from trimode.server.logs import MOST_WAITING, LogFormat, logging_to
from trimode.server.service import Service

MARKER = "q7q7q7"
BODY = {"messages": [{"role": "user", "content": f"Reverse: {MARKER}"}], "max_tokens": 8}
LINE_KEYS = {"request_id", "method", "path", "status", "duration_ms", "client"}


@contextmanager
def logged(
    model: TriModeModel, stream: io.StringIO, log_format: LogFormat = "json", **options: Any
) -> Iterator[httpx.Client]:
    texts = options.get("with_texts", False)
    with (
        Engine(model, max_rows=2, max_queue=2) as engine,
        logging_to(stream, log_format, **options),
    ):
        service = Service(engine, "demo", observers=(RequestLog(),))
        if texts:
            service.processors = lambda _, prompt: (TextLog(prompt),)
        with (
            serving(service, middleware=[AccessLog]) as address,
            httpx.Client(base_url=address, timeout=60) as client,
        ):
            yield client


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def requests_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines_of(stream) if line["message"] == "request"]


def test_a_line_joins_request_and_text(demo_model: TriModeModel) -> None:
    stream = io.StringIO()
    with logged(demo_model, stream) as client:
        answer = client.post(
            "/v1/chat/completions", json=BODY | {"n": 2}, headers={"X-Request-Id": "mine-1"}
        )
        client.post("/v1/chat/completions", json=BODY | {"stream": True, "mode": "ar"})
        client.get("/v1/models/demo")
        client.get("/health")
    usage = answer.json()["usage"]
    found = requests_of(stream)
    assert len(found) == 3  # probes are quiet
    first, second, third = found
    assert set(first) >= LINE_KEYS
    assert first["request_id"] == "mine-1" == answer.headers["X-Request-Id"]
    assert (first["method"], first["path"], first["status"]) == (
        "POST",
        "/v1/chat/completions",
        200,
    )
    assert first["client"] == "127.0.0.1"
    assert first["texts"] == 2
    assert first["completion_tokens"] == usage["completion_tokens"]
    assert first["prompt_tokens"] == usage["prompt_tokens"]
    assert 0 < first["ttft_ms"] <= first["duration_ms"]
    assert first["finish_reasons"] == ",".join(c["finish_reason"] for c in answer.json()["choices"])
    assert second["mode"] == "ar"
    assert len(second["request_id"]) == 32
    assert (third["path"], "mode" in third) == ("/v1/models/{name:path}", False)


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_what_users_say_is_not_logged(demo_model: TriModeModel, log_format: LogFormat) -> None:
    """Neither in prompts nor answers, ids, paths, wrong values or errors."""
    stream = io.StringIO()
    with logged(demo_model, stream, log_format, level=logging.DEBUG) as client:
        answer = client.post("/v1/chat/completions", json=BODY).json()
        assert answer["choices"][0]["message"]["content"]
        client.post("/v1/completions", json={"prompt": MARKER, "max_tokens": 3, "stream": True})
        client.post("/v1/completions", json={"prompt": MARKER, "mode": MARKER})
        client.post("/v1/completions", json={"prompt": MARKER, MARKER: 1})
        client.post("/v1/completions", content=f'{{"prompt": "{MARKER}'.encode())
        client.post("/v1/chat/completions", json=BODY | {"stop": [MARKER] * 99})
        client.post("/v1/chat/completions", json=BODY | {"model": MARKER})
        client.post("/tokenize", json={"prompt": MARKER})
        client.get(f"/v1/models/{MARKER}")
        client.get(f"/{MARKER}?{MARKER}=1")
        client.get("/health", headers={"X-Request-Id": f"{MARKER} \x7f", "User-Agent": MARKER})
    assert stream.getvalue().count("request") >= 11
    assert MARKER not in stream.getvalue()


def test_refusals_are_named(demo_model: TriModeModel) -> None:
    stream = io.StringIO()
    with logged(demo_model, stream) as client:
        client.post("/v1/completions", json={"prompt": "a", "mode": "backwards"})
        client.get("/nothing")
    first, second = requests_of(stream)
    assert (first["status"], bool(first["refusal"])) == (422, True)
    assert (second["status"], second["path"]) == (404, "unknown")


def test_texts_are_logged_where_it_is_asked_for(demo_model: TriModeModel) -> None:
    stream = io.StringIO()
    with logged(demo_model, stream, with_texts=True) as client:
        answer = client.post("/v1/chat/completions", json=BODY).json()
    (text,) = (line for line in lines_of(stream) if line["message"] == "text")
    assert MARKER in text["prompt"]
    assert text["answer"] == answer["choices"][0]["message"]["content"]


def test_an_exception_tells_no_values() -> None:
    logger = logging.getLogger("trimode.server")
    for with_texts in (False, True):
        stream = io.StringIO()
        with logging_to(stream, "json", with_texts=with_texts):
            try:
                try:
                    raise KeyError(MARKER)
                except KeyError as error:
                    raise ValueError(MARKER) from error
            except ValueError:
                logger.exception("a request has failed")
        (line,) = lines_of(stream)
        assert "ValueError" in line["exception"]
        assert "KeyError" in line["exception"]
        assert "test_logs.py" in line["exception"]
        assert (f"'{MARKER}'" in line["exception"]) == with_texts


def test_nobody_can_forge_a_line() -> None:
    for log_format in ("text", "json"):
        stream = io.StringIO()
        with logging_to(stream, log_format):
            logging.getLogger("trimode.server").info(
                "asked for %s", "x\nrequest status=200\r\x1b[2J\u2028"
            )
        assert len(stream.getvalue().splitlines()) == 1
        assert "\x1b" not in stream.getvalue()


def test_a_slow_reader_holds_up_nobody() -> None:
    """Lines beyond those that may wait are lost; who logs goes on at once."""
    gate = threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            gate.wait(30)
            return super().write(text)

    stream, logger = Slow(), logging.getLogger("trimode.server")
    with logging_to(stream):
        for number in range(MOST_WAITING + 500):
            logger.info("line %s", number)
        gate.set()
    lines = stream.getvalue().splitlines()
    assert MOST_WAITING <= len(lines) <= MOST_WAITING + 2
    assert lines[0].endswith("line 0")


def test_loggers_are_left_as_they_were() -> None:
    logger = logging.getLogger("trimode")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with logging_to(io.StringIO()):
        assert not logger.propagate
    assert (logger.level, logger.propagate, list(logger.handlers)) == before

"""What the client notes of a stream, against what the server that sent it noted."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from stub_server import Stub, running, script

from trimode.loadtest.client import Connections, Exchange, exchange
from trimode.loadtest.options import Server
from trimode.loadtest.play import Played
from trimode.loadtest.questions import Question
from trimode.loadtest.requests import request_record
from trimode.loadtest.sse import EventParser

SLACK = 0.25
"""Seconds that a busy machine may deliver late."""


def ask(stub: Stub, content: str, **fields: Any) -> Exchange:
    body = {
        "messages": [{"role": "user", "content": content}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }

    async def once() -> Exchange:
        async with Connections(Server(stub.url, api_key="secret", timeout=5)) as client:
            return await exchange(client, stub.url + "/v1/chat/completions", body)

    return asyncio.run(once())


def test_times_are_those_of_the_sender() -> None:
    text = script((0.12, "ab"), (0.06, "c"), (0.0, "de"), tokens=9)
    with running() as stub:
        done = ask(stub, text)
    (served,) = stub.served
    assert done.error == ""
    assert done.sent <= served.received
    for noted, sent in zip(done.chunk_times, served.sent, strict=True):
        assert sent <= noted < sent + SLACK
    record = request_record(Played(Question("q"), 0, done, is_measured=True), 0, done.sent)
    assert record.ttft is not None
    assert record.latency is not None
    # the event with the role comes at once and is no text
    assert 0.12 <= record.ttft < 0.12 + SLACK
    assert 0.18 <= record.latency < 0.18 + SLACK
    assert record.itl == tuple(after - before for before, after in pairwise(done.chunk_times))
    assert (record.text, record.output_tokens, record.input_tokens) == ("abcde", 9, 7)
    assert (record.cached_tokens, record.finish_reason) == (3, "stop")
    assert served.headers["authorization"] == "Bearer secret"


def test_tokens_are_counted_by_events_where_the_server_does_not() -> None:
    with running() as stub:
        done = ask(stub, script((0, "a"), (0, ""), (0, "b"), tokens=9), stream_options=None)
    record = request_record(Played(Question("q"), 0, done, is_measured=True), 0, done.sent)
    assert (record.output_tokens, record.input_tokens) == (2, None)


def test_faults_are_recorded() -> None:
    with running(most=0) as full:
        done = ask(full, script((0, "a"), tokens=1))
    assert (done.status, done.error, done.retry_after) == (429, "HTTP 429: full", "1")
    with running() as stub:
        cut = ask(stub, script((0, "a"), tokens=1, cut=True))
        told = ask(stub, script((0, "a"), tokens=1, error="out of\nmemory"))
    assert cut.error == "the stream ended before [DONE]"
    assert told.error == "out of memory"
    gone = ask(stub, script((0, "a"), tokens=1))
    assert gone.error.startswith("ConnectError")
    assert gone.status is None


def test_acceptance_is_read_in_vllms_form() -> None:
    told = {
        "mean_acceptance_length": 3.5,
        "draft_acceptance_rate": 0.5,
        "acceptance_histogram": {"0": 1, "5": 1},
        "num_accepted_draft_tokens": 5,
        "num_draft_tokens": 10,
        "num_spec_steps": 2,
        "num_spec_tokens": 5,
    }
    with running() as stub:
        done = ask(stub, script((0, "a"), tokens=7, speculation=told))
        odd = ask(stub, script((0, "a"), tokens=7, speculation={"num_spec_steps": "many"}))
    record = request_record(Played(Question("q"), 0, done, is_measured=True), 0, done.sent)
    assert record.speculative_decoding is not None
    assert record.speculative_decoding.acceptance_histogram == {0: 1, 5: 1}
    assert request_record(Played(Question("q"), 0, odd, True), 0, 0).speculative_decoding is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_do_not_depend_on_pieces(size: int) -> None:
    stream = 'data: {"a": 1}\r\n\r\n: ping\n\nevent: x\ndata: one\ndata: two é\n\ndata:[DONE]\n\n'
    raw, parser, found = stream.encode(), EventParser(), []
    for start in range(0, len(raw), size):
        found += parser.feed(raw[start : start + size])
    assert [one.decode() for one in found] == ['{"a": 1}', "one\ntwo é", "[DONE]"]

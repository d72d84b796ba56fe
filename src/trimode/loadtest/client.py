"""Sends one request and notes when each part of its answer came."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from trimode.formats.texts import reason_of
from trimode.loadtest.options import Server
from trimode.loadtest.sse import EventParser

DONE = b"[DONE]"
_MOST_ERROR = 300
"""Characters of a server's message that are kept."""


@dataclass
class Exchange:
    """Records one request and its answer.

    Times are those of :func:`time.perf_counter`, in seconds.

    Attributes:
        sent: Time of sending.
        chunk_times: Time of each event with text.
        ended: Time of the last event before ``[DONE]``; None until there was one.
        reasoning: Text that the server calls reasoning.
        content: Text of the answer.
        status: HTTP status; None if there was no answer.
        error: Fault in one line; empty if there was none.
        usage: Counts of tokens that the server gave.
        speculation: Counts of drafts that the server gave.
    """

    sent: float
    chunk_times: list[float] = field(default_factory=list)
    ended: float | None = None
    reasoning: str = ""
    content: str = ""
    status: int | None = None
    error: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    speculation: dict[str, Any] | None = None
    retry_after: str | None = None

    @property
    def text(self) -> str:
        """Whole text, reasoning first."""
        return self.reasoning + self.content

    @property
    def succeeded(self) -> bool:
        """Whether the answer came whole."""
        return not self.error


class Connections:
    """Lends a client of its own to each request under way.

    One client for all would search all its connections whenever a request begins or ends.
    """

    def __init__(self, server: Server) -> None:
        self._headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
        self._timeout = httpx.Timeout(server.timeout, pool=None)
        self._verify = httpx.create_ssl_context() if server.url.startswith("https") else False
        self._idle: list[httpx.AsyncClient] = []
        self._all: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._all:
            await client.aclose()

    @contextlib.contextmanager
    def lent(self) -> Iterator[httpx.AsyncClient]:
        """Lend a client, which reads no proxy settings, until the block ends."""
        client = self._idle.pop() if self._idle else self._opened()
        try:
            yield client
        finally:
            self._idle.append(client)

    async def get(self, url: str) -> httpx.Response:
        """Get a page.

        Raises:
            httpx.HTTPError: there is no answer.
        """
        with self.lent() as client:
            return await client.get(url)

    async def post(self, url: str, body: dict[str, Any]) -> httpx.Response:
        """Send a body as JSON.

        Raises:
            httpx.HTTPError: there is no answer.
        """
        with self.lent() as client:
            return await client.post(url, json=body)

    def _opened(self) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            headers=self._headers, timeout=self._timeout, trust_env=False, verify=self._verify
        )
        self._all.append(client)
        return client


async def exchange(connections: Connections, url: str, body: dict[str, Any]) -> Exchange:
    """Send a streaming request; faults are recorded, not raised.

    Args:
        connections: Lender of clients.
        url: Address of the endpoint.
        body: Fields of the request, ``stream`` among them.
    """
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    result = Exchange(sent=time.perf_counter())
    try:
        with connections.lent() as client:
            async with client.stream("POST", url, content=content, headers=headers) as response:
                await _read(response, result)
    except httpx.TimeoutException as error:
        result.error = f"timeout ({type(error).__name__})"
    except httpx.HTTPError as error:
        result.error = f"{type(error).__name__}: {reason_of(error)}"
    return result


async def _read(response: httpx.Response, result: Exchange) -> None:
    result.status = response.status_code
    if response.status_code != httpx.codes.OK:
        result.retry_after = response.headers.get("retry-after")
        result.error = _message_of(response.status_code, await response.aread())
        return
    parser, is_done = EventParser(), False
    async for piece in response.aiter_bytes():
        now = time.perf_counter()
        for data in parser.feed(piece):
            is_done = is_done or data == DONE
            if data != DONE:
                _take(data, now, result)
    if not result.error and not is_done:
        result.error = "the stream ended before [DONE]"


def _take(data: bytes, now: float, result: Exchange) -> None:
    """Note one event."""
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        result.error = "an event is not a JSON object"
        return
    result.ended = now
    if event.get("error"):
        result.error = _short(_error_text(event["error"]))
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        reasoning = _text(delta.get("reasoning_content") or delta.get("reasoning"))
        content = _text(delta.get("content")) + _text(choice.get("text")) + _arguments(delta)
        if reasoning or content:
            result.chunk_times.append(now)
        result.reasoning += reasoning
        result.content += content
        result.finish_reason = choice.get("finish_reason") or result.finish_reason
    if event.get("usage"):
        result.usage = event["usage"]
    metrics = event.get("metrics")
    if isinstance(metrics, dict) and metrics.get("speculative_decoding"):
        result.speculation = metrics["speculative_decoding"]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _arguments(delta: dict[str, Any]) -> str:
    """Return what a delta adds to the arguments of tool calls."""
    calls = delta.get("tool_calls") or ()
    return "".join(_text((call.get("function") or {}).get("arguments")) for call in calls)


def _message_of(status: int, body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict) and value.get("error"):
        text = _error_text(value["error"])
    return _short(f"HTTP {status}: {text}")


def _error_text(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _short(text: str) -> str:
    return " ".join(text.split())[:_MOST_ERROR]

"""A small server of scripted streams, on plain sockets: independent of what measures it.

The last message of a request, or its prompt, is the script in JSON: `{"chunks": [[0.02, "ab"],
[0.01, "c"]], "tokens": 5}` waits 20 ms, sends "ab", waits 10 ms, sends "c", and says that these
were 5 tokens. The server notes when it sent what.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Served:
    """What the server saw of one request, and when it sent what (``time.perf_counter``)."""

    body: dict[str, Any]
    path: str
    received: float
    headers: dict[str, str]
    sent: list[float] = field(default_factory=list)
    ended: float = 0.0


@dataclass
class Stub:
    """A running server.

    Attributes:
        url: Its address.
        served: Requests for texts, in the order of arrival.
        refused: Fields that it refuses with 400.
        metrics: Text of /metrics.
        most: Most requests at a time; further ones get 429.
        under_way: Requests at this time.
        peak: Most requests that were under way.
    """

    url: str = ""
    served: list[Served] = field(default_factory=list)
    refused: tuple[str, ...] = ()
    metrics: str = ""
    most: int = 10**6
    under_way: int = 0
    peak: int = 0
    token_ids: list[int] | None = None

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await _read(reader):
                await self._answer(*request, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, path: str, headers: dict[str, str], raw: bytes, writer: asyncio.StreamWriter
    ) -> None:
        received = time.perf_counter()
        if path == "/v1/models":
            return await _plain(writer, 200, {"data": [{"id": "stub"}]})
        if path == "/version":
            return await _plain(writer, 200, {"version": "1.2", "bundle_sha256": "ab" * 32})
        if path == "/metrics" and self.metrics:
            return await _plain(writer, 200, self.metrics)
        body = json.loads(raw) if raw else {}
        if path == "/tokenize" and self.token_ids is not None:
            wrong = set(body) - {"model", "prompt"}
            return await _plain(writer, 400 if wrong else 200, {"tokens": self.token_ids})
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return await _plain(writer, 404, {"error": {"message": "no such page"}})
        for name in self.refused:
            if name in body:
                return await _plain(writer, 400, {"error": {"message": f"unknown field {name}"}})
        if self.under_way >= self.most:
            return await _plain(writer, 429, {"error": {"message": "full"}}, "Retry-After: 1\r\n")
        served = Served(body, path, received, headers)
        self.served.append(served)
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            await self._stream(served, writer)
        finally:
            self.under_way -= 1
        return None

    async def _stream(self, served: Served, writer: asyncio.StreamWriter) -> None:
        body, script = served.body, script_of(served.body)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
        if served.path == "/v1/chat/completions":  # an event without text, as OpenAI sends it first
            _event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for wait, text in script["chunks"]:
            await asyncio.sleep(wait)
            if served.path == "/v1/completions":
                choice: dict[str, Any] = {"text": text}
            else:
                choice = {"delta": {"content": text}}
            served.sent.append(time.perf_counter())
            _event(writer, {"choices": [{**choice, "index": 0}], "usage": None})
            await writer.drain()
            if script.get("cut"):
                _chunk(writer, b"")
                return
        if script.get("error"):
            _event(writer, {"error": {"message": script["error"]}})
        _event(writer, {"choices": [{"delta": {}, "text": "", "finish_reason": "stop"}]})
        served.ended = time.perf_counter()
        if body.get("stream_options"):
            usage = {"prompt_tokens": 7, "completion_tokens": script["tokens"]}
            usage["prompt_tokens_details"] = {"cached_tokens": 3}  # type: ignore[assignment]
            last: dict[str, Any] = {"choices": [], "usage": usage}
            if "speculation" in script:
                last["metrics"] = {"speculative_decoding": script["speculation"]}
            _event(writer, last)
        _chunk(writer, b"data: [DONE]\n\n")
        _chunk(writer, b"")
        await writer.drain()


def script_of(body: dict[str, Any]) -> dict[str, Any]:
    if "messages" not in body:
        return {"chunks": [[0.0, "x"]], "tokens": 1}
    content = body["messages"][-1]["content"]
    return dict(json.loads(content if isinstance(content, str) else content[0]["text"]))


async def _read(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes] | None:
    first = await reader.readline()
    if not first:
        return None
    headers = {}
    while (line := (await reader.readline()).decode().strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return first.split()[1].decode(), headers, body


async def _plain(writer: asyncio.StreamWriter, status: int, body: Any, more: str = "") -> None:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n{more}\r\n"
    writer.write(head.encode() + data)
    await writer.drain()


def _event(writer: asyncio.StreamWriter, value: Any) -> None:
    _chunk(writer, f"data: {json.dumps(value)}\n\n".encode())


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@contextmanager
def running(**settings: Any) -> Iterator[Stub]:
    """A stub server in a thread of its own."""
    stub, loop = Stub(**settings), asyncio.new_event_loop()

    async def start() -> asyncio.Server:
        server = await asyncio.start_server(stub.handle, "127.0.0.1", 0, backlog=1024)
        stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    server = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def stop() -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield stub
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


def script(*chunks: tuple[float, str], tokens: int, **more: Any) -> str:
    """The text of a message that asks for these chunks."""
    return json.dumps({"chunks": chunks, "tokens": tokens, **more})

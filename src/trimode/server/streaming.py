"""Sends answers: as server-sent events, or in one piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from trimode.server.answers import Envelope, Object, Shape, Whole, usage_of
from trimode.server.errors import api_error
from trimode.server.outputs import Update
from trimode.server.protocol.base import StreamOptions
from trimode.server.reply import Reply, watching_client
from trimode.server.service import Service

_DONE, _PING = b"data: [DONE]\n\n", b": ping\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Telling:
    """Holds what is needed to tell a client of a reply.

    Attributes:
        service: Engine and rules of the server.
        reply: Texts that the engine works on.
        shape: How the endpoint writes its choices.
        envelope: What the objects begin with.
        options: Options of a stream.
    """

    service: Service
    reply: Reply
    shape: Shape
    envelope: Envelope
    options: StreamOptions


async def answer_whole(request: Request, telling: Telling) -> Response:
    """Answer in one piece, once all texts have ended."""
    service, reply = telling.service, telling.reply
    wholes = [Whole() for _ in reply.texts]
    with service.lifecycle.answering(), service.lifecycle.holding(reply.handles):
        async with watching_client(request.receive, reply):
            async for news in reply.updates(service.limits.ping_s):
                for update in news:
                    wholes[update.index].add(update)
    choices = [telling.shape.whole(index, text) for index, text in enumerate(wholes)]
    return JSONResponse(telling.envelope.around(choices) | {"usage": usage_of(reply.handles)})


class EventStream(Response):
    """Sends an answer in events as its tokens come.

    Where a client takes nothing for too long, or leaves, its rows are freed.
    """

    media_type = "text/event-stream"

    def __init__(self, telling: Telling) -> None:
        self._telling, self.status_code, self.background = telling, 200, None
        self.init_headers(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head, the events and the end."""
        del scope
        telling, lifecycle = self._telling, self._telling.service.lifecycle
        send = _hurried(send, telling.service.limits.write_timeout_s)
        with lifecycle.answering(), lifecycle.holding(telling.reply.handles):
            async with watching_client(receive, telling.reply):
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
                try:
                    async for event in events(telling):
                        await send({"type": "http.response.body", "body": event, "more_body": True})
                except (TimeoutError, OSError):
                    telling.reply.abandon()
                    return
                await send({"type": "http.response.body", "body": b""})


async def events(telling: Telling) -> AsyncIterator[bytes]:
    """Iterate over the events of an answer; the last one is ``[DONE]``."""
    reply, options = telling.reply, telling.options
    firsts = [telling.shape.first(text.index) for text in reply.texts]
    for first in firsts:
        if first is not None:
            yield _event(telling, [first])
    try:
        async for news in reply.updates(telling.service.limits.ping_s):
            yield b"".join(_news(telling, news)) or _PING
    except Exception as error:
        yield _data(api_error(error).body())
        yield _DONE
        return
    if options.include_usage:
        yield _event(telling, [], usage_of(reply.handles))
    yield _DONE


def _news(telling: Telling, news: Sequence[Update]) -> list[bytes]:
    usage = None
    if telling.options.continuous_usage_stats:
        usage = usage_of(telling.reply.handles)
    return [_event(telling, [telling.shape.part(update)], usage) for update in news]


def _event(telling: Telling, choices: list[Object], usage: Object | None = None) -> bytes:
    found = telling.envelope.around(choices, is_event=True)
    if telling.options.include_usage or usage is not None:
        found["usage"] = usage
    return _data(found)


def _data(found: Object) -> bytes:
    return (
        b"data: " + json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


def _hurried(send: Send, timeout_s: float) -> Callable[[Any], Awaitable[None]]:
    """Let nobody take longer over a part than so many seconds."""

    async def within(message: Any) -> None:
        async with asyncio.timeout(timeout_s):
            await send(message)

    return within

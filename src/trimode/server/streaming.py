"""Sends answers: as server-sent events, or in one piece."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from trimode.server.answers import Envelope, Object, Shape, Whole
from trimode.server.errors import api_error
from trimode.server.outputs import Update
from trimode.server.protocol.base import StreamOptions
from trimode.server.reasoning import CLOSE as END_THINK
from trimode.server.reply import Reply, watching_client
from trimode.server.service import Service
from trimode.server.ticking import every
from trimode.server.usage import ending_of, usage_so_far

_DONE, _PING = b"data: [DONE]\n\n", b": ping\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Telling:
    """Holds what is needed to tell a client of a reply.

    Attributes:
        service: Engine and rules of the server.
        reply: Texts that the engine works on.
        shape: Form in which the endpoint writes its choices.
        envelope: Fields that the objects begin with.
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
    try:
        async with answering(telling, request.receive):
            async for news in reply.updates(service.limits.ping_s):
                for update in news:
                    wholes[update.index].add(update)
    except Exception as error:
        return api_error(error).response()  # no refusal: the text has a record of its own
    choices = [telling.shape.whole(index, text) for index, text in enumerate(wholes)]
    return JSONResponse(telling.envelope.around(choices) | _ending(telling))


@contextlib.asynccontextmanager
async def answering(telling: Telling, receive: Receive) -> AsyncIterator[None]:
    """Surround an answer: free rows at its end, and tell observers."""
    service, reply = telling.service, telling.reply
    try:
        with service.lifecycle.answering(reply.handles):
            async with watching_client(receive, reply):
                yield
    finally:
        for record in reply.records:
            for observer in service.observers:
                observer.observe(record)


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
        telling = self._telling
        async with answering(telling, receive):
            try:
                async with _hurried(send, telling.service.limits.write_timeout_s) as within:
                    await self._send(within)
            except (TimeoutError, OSError):
                telling.reply.abandon()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in events(self._telling):
            await send({"type": "http.response.body", "body": event, "more_body": True})
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
            if not news:
                yield _PING
            elif found := b"".join(_news(telling, news)):
                yield found
    except Exception as error:
        yield _data(api_error(error).body())
        yield _DONE
        return
    if options.include_usage:
        ending = _ending(telling)
        yield _event(telling, [], ending["usage"], ending.get("metrics"))
    yield _DONE


def _ending(telling: Telling) -> Object:
    return ending_of(telling.reply, telling.service.codec.token_id(END_THINK))


def _news(telling: Telling, news: Sequence[Update]) -> list[bytes]:
    usage = None
    if telling.options.continuous_usage_stats:
        usage = usage_so_far(telling.reply.handles)
    return [
        _event(telling, [telling.shape.part(update)], usage)
        for update in news
        # Tokens whose text is still held back are no news, unless they were asked for
        if update.delta or update.finish_reason or update.logprobs or telling.shape.with_ids
    ]


def _event(
    telling: Telling,
    choices: list[Object],
    usage: Object | None = None,
    metrics: Object | None = None,
) -> bytes:
    found = telling.envelope.around(choices, is_event=True)
    if telling.options.include_usage or usage is not None:
        found["usage"] = usage
    if metrics is not None:
        found["metrics"] = metrics
    return _data(found)


def _data(found: Object) -> bytes:
    return (
        b"data: " + json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


@contextlib.asynccontextmanager
async def _hurried(send: Send, timeout_s: float) -> AsyncIterator[Send]:
    """Let nobody take longer over a part than so many seconds.

    Raises:
        TimeoutError: somebody has.
    """
    loop, since = asyncio.get_running_loop(), math.inf
    async with asyncio.timeout(None) as scope:

        def look() -> None:
            if loop.time() - since > timeout_s:
                scope.reschedule(loop.time())

        async def within(message: Any) -> None:
            nonlocal since
            since = loop.time()
            await send(message)
            since = math.inf

        with every(timeout_s / 2, look):
            yield within

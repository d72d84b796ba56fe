"""Follows a request's texts from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from starlette.types import Receive

from trimode.errors import RequestCancelledError
from trimode.formats.contract import Mode
from trimode.runtime.engine.handle import Handle
from trimode.server.errors import CLIENT_LEFT, ApiError
from trimode.server.outputs import ChoiceText, Update
from trimode.server.records import RequestRecord, make_record
from trimode.server.ticking import every


class Bell:
    """Wakes an event loop from any thread.

    Many rings before it wakes count as one.
    """

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self._is_rung = False

    def ring(self, _: object = None) -> None:
        """Wake who waits."""
        if not self._is_rung:
            self._is_rung = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until it rings; False where time ran out first."""
        try:
            async with asyncio.timeout(timeout_s) if timeout_s else contextlib.nullcontext():
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        self._is_rung = False
        return True


@dataclass(frozen=True)
class Asked:
    """Holds facts of a request for whoever observes it.

    Attributes:
        request_id: Name of the request.
        model: Name that the bundle is served under.
        mode: Decoding mode.
        received: Arrival, by ``time.perf_counter``, in seconds.
        prompt: Rendered prompt; empty where it came as tokens.
    """

    request_id: str
    model: str
    mode: Mode
    received: float
    prompt: str = ""


@dataclass
class Reply:
    """Holds the texts of a request that the engine works on.

    Nothing is buffered here: an event loop that is late, or a client that reads slowly, finds all
    pieces in the handles, whose size ``max_tokens`` bounds. The engine never waits.

    Attributes:
        asked: Facts of the request.
        texts: Texts, by index.
        bell: Bell that rings as tokens come.
        is_abandoned: Whether the client has left.
    """

    asked: Asked
    texts: Sequence[ChoiceText]
    bell: Bell
    is_abandoned: bool = False
    _records: dict[int, RequestRecord] = field(default_factory=dict)

    @property
    def handles(self) -> tuple[Handle, ...]:
        """Handles of the texts."""
        return tuple(text.handle for text in self.texts)

    def record(self, index: int) -> RequestRecord:
        """Return the record of a text that has ended."""
        if index not in self._records:
            asked, handle = self.asked, self.texts[index].handle
            self._records[index] = make_record(
                handle,
                request_id=asked.request_id,
                model=asked.model,
                mode=asked.mode,
                received=asked.received,
            )
        return self._records[index]

    @property
    def records(self) -> list[RequestRecord]:
        """Records of all texts, which have ended."""
        return [self.record(index) for index in range(len(self.texts))]

    def abandon(self) -> None:
        """Take note that the client has left."""
        self.is_abandoned = True
        for handle in self.handles:
            handle.cancel()

    async def updates(self, ping_s: float) -> AsyncIterator[list[Update]]:
        """Iterate over news; an empty list after so many seconds without any.

        Raises:
            ApiError: the client has left (499).
            TrimodeError: a text has ended without a result.
        """
        for handle in self.handles:
            handle.add_done_callback(self.bell.ring)
        last = time.monotonic()
        with every(ping_s / 2, self.bell.ring):
            while not all(text.is_finished for text in self.texts):
                await self.bell.wait()
                news, now = self._read(), time.monotonic()
                if news or now - last >= ping_s:
                    last = now
                    yield news

    def _read(self) -> list[Update]:
        try:
            return [update for text in self.texts if (update := text.read()) is not None]
        except RequestCancelledError:
            if self.is_abandoned:
                raise ApiError(CLIENT_LEFT, "the client has left", code="client_left") from None
            raise


@contextlib.asynccontextmanager
async def watching_client(receive: Receive, reply: Reply) -> AsyncIterator[None]:
    """Free the rows of a request whose client leaves."""
    watcher = asyncio.create_task(_watch(receive, reply))
    try:
        yield
    finally:
        watcher.cancel()


async def _watch(receive: Receive, reply: Reply) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reply.abandon()

"""Follows the texts of a request from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from starlette.types import Receive

from trimode.errors import RequestCancelledError
from trimode.runtime.engine.handle import Handle
from trimode.server.errors import CLIENT_LEFT, ApiError
from trimode.server.outputs import ChoiceText, Update


class Bell:
    """Wakes an event loop from any thread; many rings before it wakes count as one."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self._is_rung = False

    def ring(self, _: object = None) -> None:
        """Wake who waits."""
        if not self._is_rung:
            self._is_rung = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout_s: float) -> bool:
        """Sleep until it rings; False where time ran out first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        self._is_rung = False
        return True


@dataclass
class Reply:
    """Holds the texts of a request that the engine works on.

    Nothing is buffered here: an event loop that is late, or a client that reads slowly, finds all
    pieces in the handles, whose size ``max_tokens`` bounds. The engine never waits.

    Attributes:
        texts: Texts, by index.
        bell: Rings as tokens come.
        is_abandoned: Whether the client has left.
    """

    texts: Sequence[ChoiceText]
    bell: Bell
    is_abandoned: bool = False

    @property
    def handles(self) -> tuple[Handle, ...]:
        """Handles of the texts."""
        return tuple(text.handle for text in self.texts)

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
        while not all(text.is_finished for text in self.texts):
            has_rung = await self.bell.wait(ping_s)
            news = self._read()
            if news or not has_rung:
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

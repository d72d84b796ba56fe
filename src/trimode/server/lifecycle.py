"""Knows whether the server takes requests, and which ones it is answering."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from trimode.runtime.engine.handle import Handle
from trimode.server.errors import ApiError


class Lifecycle:
    """Counts requests at work, and refuses new ones while the server drains.

    It is for one event loop.

    Attributes:
        is_draining: Whether new requests are refused.
    """

    def __init__(self) -> None:
        self.is_draining = False
        self._running = 0
        self._handles: set[Handle] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return self._running

    def check_open(self) -> None:
        """Raise :class:`ApiError` 503 while the server drains."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down; ask another one", code="draining")

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """Count a request while it is prepared, unless the server drains.

        It is made ready for the engine.

        Raises:
            ApiError: 503, it drains.
        """
        self.check_open()
        with self.answering(()):
            yield

    @contextlib.contextmanager
    def answering(self, handles: tuple[Handle, ...]) -> Iterator[None]:
        """Count a request while it is answered; cancel what is left."""
        self._running += 1
        self._idle.clear()
        self._handles.update(handles)
        try:
            yield
        finally:
            for handle in handles:
                handle.cancel()
            self._handles.difference_update(handles)
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests, and wait for those that run.

        Args:
            timeout_s: Most seconds to wait; what runs then is cancelled.

        Returns:
            Number of requests that were cancelled.
        """
        self.is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return self._cancel_all()
        return 0

    def _cancel_all(self) -> int:
        return sum(handle.cancel() for handle in list(self._handles))

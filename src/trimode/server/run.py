"""Runs an application under uvicorn until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from trimode.errors import UsageError
from trimode.formats.texts import reason_of
from trimode.server.lifecycle import Lifecycle

CLOSING_S = 5
"""Seconds for connections to end once nothing is answered any more."""
logger = logging.getLogger("trimode.server")


class DrainingServer(uvicorn.Server):
    """Finishes requests when it is told to stop.

    A second signal stops it at once. While it drains, new requests are answered with 503, so that a
    balancer tries another server.

    Args:
        config: Uvicorn's configuration.
        lifecycle: Requests at work.
        drain_timeout_s: Most seconds for them.
        started_at: Function that gets the address once requests are taken.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        lifecycle: Lifecycle,
        drain_timeout_s: float,
        started_at: Callable[[str], object] = lambda _: None,
    ) -> None:
        super().__init__(config)
        self._lifecycle, self._drain_timeout_s = lifecycle, drain_timeout_s
        self._started_at = started_at
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started and self.servers:
            self._started_at(_address(self.servers[0].sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at the second."""
        if self._loop is None or self._lifecycle.is_draining:
            self.force_exit = True
            super().handle_exit(sig, frame)
            return
        self._lifecycle.is_draining = True
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Stop once what runs has ended; call on the event loop."""
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        logger.info("draining: %s requests at work", self._lifecycle.running)
        cancelled = await self._lifecycle.drain(self._drain_timeout_s)
        if cancelled:
            logger.warning("cancelled %s texts that took too long", cancelled)
        self.should_exit = True


def serve(
    app: ASGIApp, lifecycle: Lifecycle, *, host: str, port: int, drain_timeout_s: float = 30.0
) -> None:
    """Serve until a signal ends it.

    Args:
        app: Application.
        lifecycle: Requests at work.
        host: Address to listen on.
        port: Port; 0 = any free one.
        drain_timeout_s: Most seconds for requests at work once it is to stop.

    Raises:
        UsageError: nothing can listen there.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSING_S,
        h11_max_incomplete_event_size=1 << 16,
    )
    server = DrainingServer(config, lifecycle, drain_timeout_s, _announce)
    with listening(host, port) as listener:
        server.run([listener])


def listening(host: str, port: int) -> socket.socket:
    """Open a socket that listens.

    Raises:
        UsageError: it cannot.
    """
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"expected an address to listen on, found {host} port {port}: {reason_of(error)}",
            "choose another `host` or `port`",
        ) from error
    # Connections inherit it. Without it an event waits 40 ms for the client's delayed ACK;
    # asyncio sets it only on sockets that were opened with a protocol number.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(address: str) -> None:
    sys.stderr.write(f"serving on {address}\n")
    sys.stderr.flush()

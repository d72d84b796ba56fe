"""A server in a thread of the test's own process, on a port that is free."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from trimode.server.app import create_app
from trimode.server.run import DrainingServer, listening
from trimode.server.service import Service


@contextlib.contextmanager
def serving(service: Service, *, send_buffer: int = 0, **parts: Any) -> Iterator[str]:
    """Serve until the block ends; the address. A send buffer of so many bytes, 0 = the usual."""
    config = uvicorn.Config(
        create_app(service, **parts), lifespan="off", log_config=None, access_log=False
    )
    began = threading.Event()
    addresses: list[str] = []
    loops: list[asyncio.AbstractEventLoop] = []

    def started(address: str) -> None:
        addresses.append(address)
        loops.append(asyncio.get_running_loop())
        began.set()

    server = DrainingServer(config, service.lifecycle, 5.0, started)
    with listening("127.0.0.1", 0) as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        assert began.wait(10)
        try:
            yield addresses[0]
        finally:
            loops[0].call_soon_threadsafe(server.drain)
            thread.join(10)
            assert not thread.is_alive()

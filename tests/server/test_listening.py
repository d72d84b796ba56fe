"""The socket of the server."""

from __future__ import annotations

import socket

import pytest

from trimode.server.run import listening


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_events_leave_at_once(host: str) -> None:
    """Nagle's algorithm would hold an event back until the client has acknowledged the last."""
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with (
        listening(host, 0) as listener,
        socket.create_connection(listener.getsockname()[:2]),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0

"""Splits a stream of server-sent events (WHATWG HTML, 9.2) into their data."""

from __future__ import annotations

from collections.abc import Iterator


class EventParser:
    """Takes pieces of a stream, and gives the data of whole events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yield the data of each event that ends in this piece.

        Lines end in LF or CR LF.
        """
        lines = (self._rest + piece).replace(b"\r\n", b"\n").split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []

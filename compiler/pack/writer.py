"""Writes a weight pack in a thread of its own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from trimode.compiler.pack.layout import PackLayout


def write_pack(layout: PackLayout, path: Path, on_bytes: Callable[[int], None]) -> str:
    """Write the pack and return its sha256.

    ``on_bytes`` is told the size of every piece written.
    """
    whole = hashlib.sha256(layout.header)
    path.touch()
    with path.open("r+b") as stream:
        stream.write(layout.header)
        on_bytes(len(layout.header))
        for source in layout.sources:
            for data in source.chunks():
                whole.update(data)
                stream.write(data)
                on_bytes(len(data))
        stream.truncate()  # what another pack has left behind
    return whole.hexdigest()


class PackWriter:
    """Writes a pack in a thread, once it is started.

    Args:
        layout: Layout of the pack.
        path: File to write. It exists in its full size as soon as writing has started, so that
            graphs which point into it can be checked.
    """

    def __init__(self, layout: PackLayout, path: Path) -> None:
        self._layout, self._path = layout, path
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._digest: Future[str] = Future()  # that of the thread, once there is one

    @property
    def num_bytes(self) -> int:
        """Size of the pack."""
        return self._layout.num_bytes

    def start(self, on_bytes: Callable[[int], None]) -> None:
        """Begin to write; ``on_bytes`` is told the size of every piece."""

        def advance(num_bytes: int) -> None:
            if self._stopped.is_set():
                raise InterruptedError
            on_bytes(num_bytes)

        with self._path.open("wb") as stream:
            stream.truncate(self._layout.num_bytes)
        self._digest = self._pool.submit(write_pack, self._layout, self._path, advance)

    def result(self) -> str:
        """Wait until the pack is written; its sha256. Raises what writing raised."""
        return self._digest.result()

    def check(self) -> bool:
        """Whether the pack is written by now.

        Raises what writing has raised.
        """
        if self._digest.done():
            self._digest.result()
        return self._digest.done()

    def stop(self) -> None:
        """Give up writing, if it goes on, and wait for the thread."""
        self._stopped.set()
        self._pool.shutdown()

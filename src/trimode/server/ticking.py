"""Does something regularly on an event loop while a block runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def every(seconds: float, call: Callable[[], object]) -> Iterator[None]:
    """Call a function every so many seconds, while the block runs.

    One timer costs less than one for each event.
    """
    loop = asyncio.get_running_loop()
    timer = loop.call_later(seconds, lambda: again())

    def again() -> None:
        nonlocal timer
        timer = loop.call_later(seconds, again)
        call()

    try:
        yield
    finally:
        timer.cancel()

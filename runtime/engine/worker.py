"""Runs the one thread of an engine."""

from __future__ import annotations

import threading

from trimode.errors import RequestCancelledError
from trimode.runtime.engine.core import EngineCore


class Worker:
    """Turns an engine's core until it is told to stop.

    It holds the core alone, so an engine that nobody holds can be collected.

    Args:
        core: Core that is turned.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._is_draining = self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="trimode-engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool) -> None:
        """Stop once all is finished (``drain``), or after the step that runs."""
        self._is_draining = True
        self._is_stopped = self._is_stopped or not drain
        self._core.post(None)

    @property
    def is_current(self) -> bool:
        """Whether the caller is this thread."""
        return threading.current_thread() is self._thread

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the end; return whether it came in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        core = self._core
        while not self._is_stopped:
            self._turn()
            if core.is_idle:
                if self._is_draining and not core.has_mail:
                    break
                core.wait()
        core.take_in()
        core.end_all(
            RequestCancelledError(
                "expected a text to its end, found its engine closed", "close it with drain=True"
            )
        )
        core.close()

    def _turn(self) -> None:
        try:
            self._core.turn()
        except Exception as error:  # a fault of ours: better to say so than to hang
            self._core.give_up(error)

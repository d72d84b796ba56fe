"""Compiles one engine: ``python -m trimode.compiler.tensorrt.worker``.

The job comes as one JSON line on stdin, events go out as JSON lines on stdout: ``{"progress":
0.4}``, at the end ``{"done": true}``, ``{"refused": [...]}`` or ``{"disk": {...}}``. A process of
its own keeps the compiler's memory apart, may crash without taking the build with it, and can be
stopped at any moment. It ends by itself when stdin closes, i.e. when its parent is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from trimode.compiler.tensorrt.builder import EngineJob, EngineRefusedError, build_engine

_REPORT_EVERY_S = 0.1


def main() -> None:
    """Read the job, build, report."""
    # The library may print to stdout on its own; events keep the real one.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = EngineJob.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        build_engine(job, _Reporter(events))
    except EngineRefusedError as error:
        _send(events, refused=error.messages)
        return
    except OSError as error:
        _send(events, disk={"errno": error.errno, "message": str(error)})
        return
    _send(events, done=True)


class _Reporter:
    """Sends the fraction done, not more often than anybody can see."""

    def __init__(self, events: Any) -> None:
        self._events = events
        self._last = 0.0
        self._lock = threading.Lock()  # the library reports from several threads

    def __call__(self, fraction: float) -> bool:
        with self._lock:
            now = time.perf_counter()
            if now - self._last >= _REPORT_EVERY_S:
                self._last = now
                _send(self._events, progress=round(fraction, 4))
        return True


def _send(events: Any, **event: Any) -> None:
    events.write(json.dumps(event) + "\n")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()

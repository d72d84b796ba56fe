"""What each runner measures, in an environment of its own: numpy and the standard library only."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Model(Protocol):
    """A loaded decoder with one text."""

    def read(self, ids: list[int]) -> None:
        """Begin the text anew with these tokens."""

    def forward(self, ids: list[int]) -> None:
        """Read further tokens and compute the logits of the last."""

    def back(self) -> None:
        """Forget what ``forward`` has read."""


def main(load: Callable[[dict[str, Any]], Model]) -> None:
    """Load as the first argument says, as JSON, and print what was measured, as JSON."""
    wanted = json.loads(sys.argv[1])
    begun = time.perf_counter()
    model = load(wanted)
    measured = {"load_s": time.perf_counter() - begun, **_measure(model, wanted)}
    measured["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured["pss_bytes"] = _pss()
    print(json.dumps(measured))


def _measure(model: Model, wanted: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return [int(one) for one in rng.integers(200, wanted["vocab"], count)]

    prompt = ids(wanted["past"])
    model.read(prompt)
    prefill = _least(lambda: model.read(prompt), 2)
    best: dict[int, dict[str, float]] = {}
    for _ in range(wanted["repeats"]):
        for rows in wanted["rows"]:
            tokens = ids(rows)
            found = _timed(lambda tokens=tokens: model.forward(tokens))
            model.back()
            old = best.setdefault(rows, found)
            best[rows] = {name: min(old[name], value) for name, value in found.items()}
    return {"prefill": prefill, "rows": best}


def _least(call: Callable[[], None], repeats: int) -> dict[str, float]:
    found = [_timed(call) for _ in range(repeats)]
    return {name: min(one[name] for one in found) for name in found[0]}


def _timed(call: Callable[[], None]) -> dict[str, float]:
    """Milliseconds by the clock, and of processor time in all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"ms": 1e3 * wall, "cpu_ms": 1e3 * cpu}


def _pss() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))

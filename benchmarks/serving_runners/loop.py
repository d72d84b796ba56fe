"""What each runner does: answers lines of standard input with what a batch took.

Standard library and numpy only, since each runner has an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

Answer = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and the number of new tokens -> the new tokens of each."""


def serve(answer: Answer) -> None:
    """Run ``{"prompts": ..., "new_tokens": n}`` a line, until the input ends."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = answer(wanted["prompts"], wanted["new_tokens"])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall_s": wall, "cpu_s": cpu, "tokens": tokens}), flush=True)

"""Asks how much memory is free."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def free_memory_bytes(device: str) -> int:
    """Count the bytes that this process could still take on a device.

    The device is ``cpu`` or ``cuda``. On the CPU (Linux) the limit of the control group counts too.
    """
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None  # in every kernel since 3.14
    available = int(found[1]) * 1024
    limit, used = (
        _number(Path("/sys/fs/cgroup/memory.max")),
        _number(Path("/sys/fs/cgroup/memory.current")),
    )
    return available if limit is None or used is None else max(0, min(available, limit - used))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such control group, or its limit is "max"
        return None

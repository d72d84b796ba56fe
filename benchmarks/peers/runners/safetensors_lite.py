"""Reads bfloat16 tensors of a safetensors file as float32, with numpy alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values, in the file's order."""
    data = np.memmap(path, np.uint8, "r")
    end = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:end].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        halves = data[end + begin : end + stop].view(np.uint16)
        wide = (halves.astype(np.uint32) << 16).view(np.float32)
        yield name, wide.reshape(entry["shape"])

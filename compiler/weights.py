"""The weight pack: one safetensors file that every graph names as ONNX external data.

Laid out before any byte is read, then written tensor by tensor in chunks: memory stays constant whatever the checkpoint's size.
The data begins at a multiple of 4096, so that mapped tensors of usual sizes are aligned.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimode.graphs.checkpoint import Checkpoint, to_float32
from trimode.graphs.rope import rope_tables

Source = tuple[str, tuple[int, ...], Callable[[], Iterator[bytes]]]

_DATA_ALIGNMENT = 4096


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of the pack; ``offset`` is in bytes from the start of the file, ``chunks`` yields its float32 bytes."""

    name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    chunks: Callable[[], Iterator[bytes]] = field(repr=False, compare=False)


@dataclass(frozen=True)
class PackLayout:
    """Header and tensors of a pack that is not written yet."""

    header: bytes
    tensors: dict[str, PackedTensor]

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(t.num_bytes for t in self.tensors.values())


def plan_pack(checkpoint: Checkpoint, num_positions: int) -> tuple[PackLayout, SourceDigest]:
    """Lay out the pack of a checkpoint: its tensors in float32, then the position tables.

    The returned digest is complete once every tensor has been written.
    """
    digest = SourceDigest(checkpoint)
    sources: list[Source] = [(name, entry.shape, partial(digest.read, name)) for name, entry in checkpoint.tensors.items()]
    tables = rope_tables(checkpoint.config.rope, checkpoint.config.head_dim, num_positions)
    for name, table in zip(("rope.cos", "rope.sin", "rope.query_scale"), tables, strict=True):
        if table is not None:
            column = np.ascontiguousarray(table.reshape(num_positions, -1), "<f4")
            sources.append((name, column.shape, partial(_whole, column)))
    return _lay_out(sources), digest


def write_pack(layout: PackLayout, path: Path, on_bytes: Callable[[int], None]) -> str:
    """Write the pack and return its sha256; ``on_bytes`` is told the size of every piece written."""
    whole = hashlib.sha256(layout.header)
    with path.open("wb") as stream:
        stream.write(layout.header)
        on_bytes(len(layout.header))
        for tensor in layout.tensors.values():
            for data in tensor.chunks():
                whole.update(data)
                stream.write(data)
                on_bytes(len(data))
    return whole.hexdigest()


class SourceDigest:
    """Digest of a checkpoint's tensors, taken while they are copied so that nothing is read twice."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._whole = hashlib.sha256((checkpoint.path / "config.json").read_bytes())

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a tensor as float32 bytes; tensors must be read once each, in the checkpoint's order."""
        entry = self._tensors[name]
        self._whole.update(f"{name} {entry.dtype} {entry.shape}".encode())
        for raw in entry.chunks():
            self._whole.update(raw)
            yield to_float32(raw, entry.dtype).tobytes()

    def hexdigest(self) -> str:
        """The digest of what has been read."""
        return self._whole.hexdigest()


def _whole(table: NDArray[np.float32]) -> Iterator[bytes]:
    yield table.tobytes()


def _lay_out(sources: list[Source]) -> PackLayout:
    sizes = [4 * math.prod(shape) for _, shape, _ in sources]
    begins = list(itertools.accumulate(sizes, initial=0))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for (name, shape, _), begin, end in zip(sources, begins, begins[1:], strict=False):
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT)
    prefix = len(text).to_bytes(8, "little") + text
    tensors = {
        name: PackedTensor(name, shape, len(prefix) + begin, size, chunks)
        for (name, shape, chunks), begin, size in zip(sources, begins, sizes, strict=False)
    }
    return PackLayout(prefix, tensors)

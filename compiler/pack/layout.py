"""Lays out the weight pack, the file that all graphs share.

It is a safetensors file that every graph names as ONNX external data, one for each precision of a
bundle.

Laid out before any byte is read, then written tensor by tensor in chunks: memory stays constant
whatever the checkpoint's size. The data begins at a multiple of 4096, so that mapped tensors of
usual sizes are aligned. What another pack of the bundle holds already is not written again: graphs
name that pack instead.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from trimode.compiler.pack.integer_stream import WeightStream
from trimode.compiler.pack.nvfp4_stream import Nvfp4Stream
from trimode.formats.contract import DType
from trimode.formats.safetensors import (
    PACKED_DTYPES,
    SAFETENSORS_NAMES,
    PackEntry,
    TensorEntry,
    stored_bytes,
)
from trimode.graphs.checkpoint import Checkpoint, Read
from trimode.graphs.decoder.rope import rope_tables
from trimode.graphs.numerics.integers import FORMATS
from trimode.graphs.numerics.quantization import Quantization
from trimode.graphs.numerics.stored import stored_as
from trimode.runtime.bundle.weights import PrecisionWeights, WeightPack, is_common

_DATA_ALIGNMENT = 4096


@dataclass(frozen=True)
class _Source:
    """Holds a tensor to pack.

    ``chunks`` yields its bytes in ``dtype``, once, after those of the tensors before it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    chunks: Callable[[], Iterator[bytes]] = field(repr=False, compare=False)

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return stored_bytes(self.dtype, self.num_elements)


@dataclass(frozen=True)
class PackedTensor(PackEntry):
    """Says where one tensor lies; ``file`` is the pack's name."""

    file: str

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PackLayout:
    """Describes a pack that is not written yet.

    Attributes:
        header: First bytes of the file.
        sources: Tensors that follow, in this order.
        tensors: Places of all tensors of the precision by name, those in other packs included.
    """

    header: bytes
    sources: tuple[_Source, ...]
    tensors: dict[str, PackedTensor]

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(source.num_bytes for source in self.sources)


def plan_pack(
    checkpoint: Checkpoint,
    num_positions: int,
    dtype: DType = "float32",
    quantization: Quantization | None = None,
    *,
    file: str = "weights.safetensors",
    held: Mapping[str, PackedTensor] = MappingProxyType({}),
    read: Read | None = None,
) -> PackLayout:
    """Lay out the pack of a checkpoint.

    It holds the tensors in ``dtype``, or quantized; the position tables, always in float32; and
    scales, in ``dtype``.

    Angles need the precision at long positions, whatever the weights are stored in. Scales come
    last: some are single numbers, behind which nothing would be aligned, and some are known only
    when their weight has been read; those of nvfp4's blocks follow their weight.

    Args:
        checkpoint: Opened checkpoint.
        num_positions: Rows of the position tables.
        dtype: Type of what is not quantized.
        quantization: Scales of what is quantized; None quantizes nothing.
        file: The pack's name in the bundle.
        held: Tensors that other packs of the bundle hold in ``dtype``, by name (see
            :func:`read_shared_tensors`). They are not written again.
        read: Function that reads the other tensors, in the checkpoint's order; None = the
            checkpoint's own.
    """
    read = read or checkpoint.read
    sources: list[_Source] = []
    scales: list[_Source] = []
    shared: dict[str, PackedTensor] = {}
    for name, entry in checkpoint.tensors.items():
        layer = name.removesuffix(".weight")
        if quantization is None or layer not in quantization.layers:
            if name in held:
                shared[name] = held[name]
            else:
                sources.append(
                    _Source(name, entry.shape, dtype, partial(_stored, dtype, name, entry, read))
                )
            continue
        stream = _stream(
            quantization, layer, entry, partial(_stored, "float32", name, entry, read), dtype
        )
        sources.append(
            _Source(name, entry.shape, FORMATS[quantization.precision].dtype, stream.weight)
        )
        for kind, (scale_dtype, shape) in stream.scales.items():
            # An eighth of the weight, found while it was read: not to be kept until the end.
            place = sources if scale_dtype == "float8e4m3fn" else scales
            place.append(
                _Source(f"{layer}.{kind}", shape, scale_dtype, partial(stream.scale, kind))
            )
    tables = rope_tables(checkpoint.config.rope, checkpoint.config.head_dim, num_positions)
    for name, table in zip(("rope.cos", "rope.sin", "rope.query_scale"), tables, strict=True):
        if name in held:
            shared[name] = held[name]
        elif table is not None:
            column = np.ascontiguousarray(table.reshape(num_positions, -1), "<f4")
            sources.append(_Source(name, column.shape, "float32", partial(_whole, column)))
    return _lay_out([*sources, *scales], file, shared)


def _stream(
    quantization: Quantization,
    layer: str,
    entry: TensorEntry,
    read: Callable[[], Iterator[bytes]],
    stored: DType,
) -> WeightStream | Nvfp4Stream:
    given = quantization.layers[layer]
    if quantization.precision == "nvfp4":
        name = f"{layer}.weight"  # looked at once more: the digest must see it once
        look = partial(_stored, "float32", name, entry, lambda _: entry.chunks())
        return Nvfp4Stream(layer, entry.shape, read, look, given, stored)
    return WeightStream(
        layer, entry.shape, read, scales=given, precision=quantization.precision, stored=stored
    )


def _stored(dtype: DType, name: str, entry: TensorEntry, read: Read) -> Iterator[bytes]:
    """Yield a tensor's bytes in the pack's type.

    Nothing is read before the first of them is asked for.
    """
    yield from stored_as(dtype, name, entry, read(name))


def read_shared_tensors(packs: Iterable[Path]) -> dict[str, PackedTensor]:
    """Find the tensors of packs that all precisions share.

    Raises:
        BundleError: a file is no pack of this library.
    """
    held: dict[str, PackedTensor] = {}
    for path in packs:
        for name, entry in WeightPack(path).entries.items():
            if is_common(name, entry.dtype):
                held.setdefault(name, _packed(entry, path))
    return held


def read_tensors(weights: PrecisionWeights) -> dict[str, PackedTensor]:
    """Where the tensors of a precision lie that is there."""
    return {
        name: _packed(entry, weights.pack_of(name).path) for name, entry in weights.entries.items()
    }


def _whole(table: NDArray[np.float32]) -> Iterator[bytes]:
    yield table.tobytes()


def _packed(entry: PackEntry, path: Path) -> PackedTensor:
    return PackedTensor(entry.dtype, entry.shape, entry.offset, path.name)


def _lay_out(sources: list[_Source], file: str, shared: Mapping[str, PackedTensor]) -> PackLayout:
    begins = list(itertools.accumulate((source.num_bytes for source in sources), initial=0))
    header: dict[str, object] = {"__metadata__": _metadata(sources)}
    for source, begin, end in zip(sources, begins, begins[1:], strict=False):
        header[source.name] = {
            "dtype": SAFETENSORS_NAMES[source.dtype],
            "shape": _bytes_shape(source),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT)
    prefix = len(text).to_bytes(8, "little") + text
    own = {
        s.name: PackedTensor(s.dtype, s.shape, len(prefix) + begin, file)
        for s, begin in zip(sources, begins, strict=False)
    }
    return PackLayout(prefix, tuple(sources), {**shared, **own})


def _metadata(sources: list[_Source]) -> dict[str, str]:
    packed = sorted({source.dtype for source in sources if source.dtype in PACKED_DTYPES})
    if not packed:
        return {"format": "pt"}
    (dtype,) = packed  # safetensors has no type for either: what says U8 is one of them
    return {
        "format": "pt",
        "U8": f"{dtype}, two numbers along the last axis in each byte,"
        " the first in the low four bits",
    }


def _bytes_shape(source: _Source) -> list[int]:
    """The shape in bytes, where safetensors has no name for a type."""
    return (
        [*source.shape[:-1], source.shape[-1] // 2]
        if source.dtype in PACKED_DTYPES
        else list(source.shape)
    )

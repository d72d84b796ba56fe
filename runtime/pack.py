"""Reads weight packs: safetensors files (https://github.com/huggingface/safetensors) whose tensors are bound to engines by name.

A bundle of several precisions has a pack for each, and what they have in common lies in one of them.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.errors import BundleError
from trimode.graphs.contract import DType
from trimode.hints import REBUILD
from trimode.texts import Unreadable, decode_text, parse_json, reason_of

logger = logging.getLogger("trimode.runtime")

SAFETENSORS_DTYPES: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8e4m3fn", "I8": "int8"}
PACKED_DTYPES: tuple[DType, ...] = ("int4", "float4e2m1")
"""Two numbers to a byte, ``U8`` to safetensors. A pack has one of them at most, and its metadata says under ``U8`` which; int4 where it does not."""
ITEM_SIZES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "float8e4m3fn": 1, "int8": 1}
"""Bytes of one number, of types that are not packed."""
SCALE_KINDS = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
"""How the names of scales end, behind the layer's."""
_QUANTIZED: tuple[DType, ...] = ("float8e4m3fn", "int8", *PACKED_DTYPES)


@dataclass(frozen=True)
class PackEntry:
    """One tensor of the pack; ``offset`` is in bytes from the start of the file.

    A packed type lies in the file as bytes of two numbers each, along the last axis, the first in the low four bits; ``shape`` counts numbers.
    """

    dtype: DType
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return stored_bytes(self.dtype, math.prod(self.shape))


def is_common(name: str, dtype: DType) -> bool:
    """Whether a tensor is the same in every precision that has it: it is neither quantized nor a scale."""
    return dtype not in _QUANTIZED and name.rpartition(".")[2] not in SCALE_KINDS


def stored_bytes(dtype: DType, num_elements: int) -> int:
    """Size of a tensor of so many numbers."""
    return num_elements // 2 if dtype in PACKED_DTYPES else num_elements * ITEM_SIZES[dtype]


class WeightPack:
    """A mapped pack: nothing is read before it is used, and processes share the pages.

    Args:
        path: the safetensors file.

    Raises:
        BundleError: the file is no pack of this library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.entries = _read_header(path)
            self._bytes = _map(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, Unreadable) as error:
            found = f"{path}: expected a weight pack, found one that cannot be read ({reason_of(error)})"
            hint = f"check the file's permissions, or {REBUILD}"
            raise BundleError(found, hint) from error

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, mapped."""
        entry = self.entries[name]
        return self._bytes[entry.offset : entry.offset + entry.num_bytes]

    def widened(self, name: str) -> NDArray[np.float32]:
        """The tensor, of a floating-point type of 16 bits or more, in float32, shaped; a view of the file where it is float32 there, else a copy."""
        entry = self.entries[name]
        return widen(self.raw(name), entry.dtype).reshape(entry.shape)


class PrecisionWeights:
    """The tensors of one precision, each mapped once: all of its own pack, and of other packs what precisions have in common.

    A weight that is quantized here may lie there in full, and the other way round: the own pack is asked first, and the quantized weights
    and scales of others are not seen.

    Args:
        paths: the packs; the first is its own.

    Raises:
        BundleError: a file is no pack of this library.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        own, *others = (WeightPack(path) for path in paths)
        self._packs = dict.fromkeys(own.entries, own)
        for pack in others:
            self._packs |= {name: pack for name, entry in pack.entries.items() if name not in self._packs and is_common(name, entry.dtype)}
        self.entries = {name: pack.entries[name] for name, pack in self._packs.items()}

    def pack_of(self, name: str) -> WeightPack:
        """The pack that holds a tensor."""
        return self._packs[name]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """See :meth:`WeightPack.raw`."""
        return self._packs[name].raw(name)

    def widened(self, name: str) -> NDArray[np.float32]:
        """See :meth:`WeightPack.widened`."""
        return self._packs[name].widened(name)


def widen(raw: NDArray[np.uint8], dtype: DType) -> NDArray[np.float32]:
    """Bytes of a floating-point type of 16 bits or more as float32, exactly."""
    if dtype == "bfloat16":  # the upper half of a float32
        wide = np.zeros((raw.size // 2, 2), "<u2")
        wide[:, 1] = raw.view("<u2")
        return wide.view("<f4")[:, 0]
    if dtype == "float16":
        return raw.view("<f2").astype(np.float32)
    if dtype != "float32":
        raise ValueError(f"expected float32, float16 or bfloat16, found {dtype}")
    return raw.view("<f4")


def _map(path: Path) -> NDArray[np.uint8]:
    """The file's bytes ``(n,)``, mapped; read into memory where the file system cannot map."""
    try:
        return np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning("%s cannot be mapped (%s): it is read into memory, which processes do not share", path, reason_of(error))
        return np.fromfile(path, np.uint8)


def _read_header(path: Path) -> dict[str, PackEntry]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = parse_json(decode_text(stream.read(length)))
    dtypes = {**SAFETENSORS_DTYPES, "U8": _packed_dtype(header.get("__metadata__", {}))}
    return {name: _read_entry(name, value, dtypes, 8 + length, size) for name, value in header.items() if name != "__metadata__"}


def _packed_dtype(metadata: Mapping[str, str]) -> DType:
    """The packed type of a file: the first word of what its metadata says of ``U8``."""
    named = metadata.get("U8", "int4").partition(",")[0]
    for dtype in PACKED_DTYPES:
        if dtype == named:
            return dtype
    raise ValueError(f"U8 stands for {named!r}")


def _read_entry(name: str, value: Any, dtypes: Mapping[str, DType], base: int, size: int) -> PackEntry:
    if value["dtype"] not in dtypes:
        raise ValueError(f"{name} has type {value['dtype']!r}")
    begin, end = value["data_offsets"]
    if any(type(number) is not int for number in (begin, end, *value["shape"])):
        raise ValueError(f"{name} of shape {value['shape']} at bytes {begin} to {end}")
    dtype, shape = dtypes[value["dtype"]], tuple(value["shape"])
    entry = PackEntry(dtype, (*shape[:-1], shape[-1] * 2) if dtype in PACKED_DTYPES else shape, base + begin)
    if min(entry.shape, default=0) < 0 or end - begin != entry.num_bytes or not 0 <= begin <= end <= size - base:
        raise ValueError(f"{name} of shape {entry.shape} at bytes {begin} to {end} of {size - base}")
    return entry

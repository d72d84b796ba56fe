"""Reads the headers of safetensors files: names, types, shapes and places.

The layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON
header, the data. A checkpoint has floating-point tensors; a weight pack has quantized ones too, and
says in its metadata what its bytes stand for.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
from numpy.typing import NDArray

from trimode.errors import CheckpointError
from trimode.formats.contract import DType
from trimode.formats.json_fields import is_integer, named, nothing_at, shown
from trimode.formats.texts import Unreadable, decode_text, parse_json, reason_of

ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
DOWNLOAD_HINT = "download the checkpoint again; the file is incomplete or was changed"
# Of every type in the format: others than ITEM_SIZES can be skipped, not read.
_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's reference implementation

SAFETENSORS_NAMES: dict[DType, str] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8e4m3fn": "F8_E4M3",
    "int8": "I8",
    # safetensors has no such type: two of them along the last axis are one byte, the first in the
    # low four bits
    "int4": "U8",
    "float4e2m1": "U8",  # likewise; the header says which of the two it is
}

SAFETENSORS_DTYPES: dict[str, DType] = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8e4m3fn",
    "I8": "int8",
}
PACKED_DTYPES: tuple[DType, ...] = ("int4", "float4e2m1")
"""Two numbers to a byte, ``U8`` to safetensors. A pack has one of them at most, and its metadata
says under ``U8`` which; int4 where it does not.
"""
NUMBER_BYTES: dict[DType, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "float8e4m3fn": 1,
    "int8": 1,
}
"""Bytes of one number, of types that are not packed."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        dtype: ``F32``, ``F16`` or ``BF16``.
        offset: bytes from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def chunks(self, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
        """Yield the tensor's raw bytes in order, ``chunk_bytes`` at a time.

        Raises:
            CheckpointError: the file has gone or become shorter since it was opened.
        """
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.offset)
                left = self.num_bytes
                while left:
                    data = stream.read(min(left, chunk_bytes))
                    if not data:
                        raise CheckpointError(
                            f"{self.file}: expected {left} more bytes, found the end of the file",
                            DOWNLOAD_HINT,
                        )
                    left -= len(data)
                    yield data
        except OSError as error:
            raise CheckpointError(
                f"{self.file}: expected a file, found one that cannot be read ({reason_of(error)})",
                "leave the checkpoint as it is while it is read",
            ) from error


def read_safetensors_header(
    path: Path, missing_hint: str = "download the missing file into the checkpoint folder"
) -> dict[str, TensorEntry]:
    """Read a safetensors header and check that the file holds exactly the bytes it promises.

    Entries may have any type of the format: see :func:`check_readable`.

    Raises:
        CheckpointError: the file is missing, unreadable or malformed.
    """
    try:
        with path.open("rb") as stream:
            return _read_entries(path, stream)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path}: expected a file, found {nothing_at(path)}", missing_hint
        ) from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: expected a file, found a folder", missing_hint) from error
    except (OSError, ValueError, Unreadable) as error:  # ValueError: a name with a NUL byte
        raise CheckpointError(
            f"{path}: expected a safetensors file, found one that cannot be read "
            f"({reason_of(error)})",
            DOWNLOAD_HINT,
        ) from error


def check_readable(name: str, entry: TensorEntry) -> None:
    """Refuse a tensor whose type is none of those that checkpoints of this family have.

    Raises:
        CheckpointError: names the tensor.
    """
    if entry.dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{entry.file}: expected {named(name)} to be one of {', '.join(ITEM_SIZES)}, "
            f"found {entry.dtype}",
            "start from the published 16-bit checkpoint; quantization is a step of its own",
        )


def to_float32(raw: bytes, dtype: str) -> NDArray[np.float32]:
    """Convert the bytes of an ``F32``, ``F16`` or ``BF16`` tensor.

    Each of these values is exact in float32.
    """
    if dtype == "F32":
        return np.frombuffer(raw, "<f4")
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _read_entries(path: Path, stream: BinaryIO) -> dict[str, TensorEntry]:
    size = _size_of(path)
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: expected a safetensors header of {length} bytes, found a file of {size} "
            "bytes",
            DOWNLOAD_HINT,
        )
    header = parse_json(decode_text(stream.read(length)), unique=True)
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object as header, found {type(header).__name__}",
            DOWNLOAD_HINT,
        )
    entries = {
        name: _entry(path, name, value, 8 + length)
        for name, value in header.items()
        if name != "__metadata__"
    }
    _check_layout(path, entries, 8 + length, size)
    return entries


def _size_of(path: Path) -> int:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise CheckpointError(f"{path}: expected a file, found something else", DOWNLOAD_HINT)
    return facts.st_size


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(dtype, str)
        or not _are_lengths(shape)
        or not _are_lengths(offsets)
        or len(offsets) != 2
    ):
        raise CheckpointError(
            f"{path}: expected dtype, shape and data_offsets for {named(name)}, found "
            f"{shown(value)}",
            DOWNLOAD_HINT,
        )
    if dtype not in _BITS:
        raise CheckpointError(
            f"{path}: expected {named(name)} to be one of {', '.join(ITEM_SIZES)}, found "
            f"{shown(dtype)}",
            "start from the published 16-bit checkpoint",
        )
    begin, end = offsets
    # Python's numbers: no shape overflows them
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise CheckpointError(
            f"{path}: expected {named(name)} to have the bytes of {dtype} {shown(shape)}, "
            f"found {end - begin}",
            DOWNLOAD_HINT,
        )
    return TensorEntry(path, dtype, tuple(shape), data_start + begin, end - begin)


def _are_lengths(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(is_integer(one) and one >= 0 for one in values)


def _check_layout(path: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    """Check that tensors follow each other without gaps.

    The first begins at ``start``, and the last ends the file.
    """
    end = start
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
    ):
        if entry.offset != end:
            raise CheckpointError(
                f"{path}: expected {named(name)} to begin at byte {end}, found {entry.offset}",
                DOWNLOAD_HINT,
            )
        end += entry.num_bytes
    if end != size:
        raise CheckpointError(f"{path}: expected {end} bytes, found {size}", DOWNLOAD_HINT)


@dataclass(frozen=True)
class PackEntry:
    """One tensor of the pack; ``offset`` is in bytes from the start of the file.

    A packed type lies in the file as bytes of two numbers each, along the last axis, the first in
    the low four bits; ``shape`` counts numbers.
    """

    dtype: DType
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return stored_bytes(self.dtype, math.prod(self.shape))


def stored_bytes(dtype: DType, num_elements: int) -> int:
    """Size of a tensor of so many numbers."""
    return num_elements // 2 if dtype in PACKED_DTYPES else num_elements * NUMBER_BYTES[dtype]


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


def read_pack_header(path: Path) -> dict[str, PackEntry]:
    """Read the place of each tensor in a weight pack.

    Raises ValueError, KeyError or TypeError if it is no pack.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = parse_json(decode_text(stream.read(length)))
    dtypes = {**SAFETENSORS_DTYPES, "U8": _packed_dtype(header.get("__metadata__", {}))}
    return {
        name: _read_pack_entry(name, value, dtypes, 8 + length, size)
        for name, value in header.items()
        if name != "__metadata__"
    }


def _packed_dtype(metadata: Mapping[str, str]) -> DType:
    """The packed type of a file: the first word of what its metadata says of ``U8``."""
    named = metadata.get("U8", "int4").partition(",")[0]
    for dtype in PACKED_DTYPES:
        if dtype == named:
            return dtype
    raise ValueError(f"U8 stands for {named!r}")


def _read_pack_entry(
    name: str, value: Any, dtypes: Mapping[str, DType], base: int, size: int
) -> PackEntry:
    if value["dtype"] not in dtypes:
        raise ValueError(f"{name} has type {value['dtype']!r}")
    begin, end = value["data_offsets"]
    if any(type(number) is not int for number in (begin, end, *value["shape"])):
        raise ValueError(f"{name} of shape {value['shape']} at bytes {begin} to {end}")
    dtype, shape = dtypes[value["dtype"]], tuple(value["shape"])
    entry = PackEntry(
        dtype, (*shape[:-1], shape[-1] * 2) if dtype in PACKED_DTYPES else shape, base + begin
    )
    if (
        min(entry.shape, default=0) < 0
        or end - begin != entry.num_bytes
        or not 0 <= begin <= end <= size - base
    ):
        raise ValueError(
            f"{name} of shape {entry.shape} at bytes {begin} to {end} of {size - base}"
        )
    return entry

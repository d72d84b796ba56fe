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
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from trimode.errors import CheckpointError
from trimode.formats.contract import DType
from trimode.formats.json_fields import is_integer, named, nothing_at, shown
from trimode.formats.texts import Unreadable, decode_text, parse_json, reason_of

DOWNLOAD_HINT = "download the checkpoint again; the file is incomplete or was changed"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's reference implementation
_BITS = {
    name: bits
    for bits, names in {
        4: "F4",
        6: "F6_E2M3 F6_E3M2",
        8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "I16 U16 F16 BF16",
        32: "I32 U32 F32",
        64: "I64 U64 F64 C64",
    }.items()
    for name in names.split()
}
"""Bits of a number, by the names of the format's types."""
SAFETENSORS_NAMES: dict[DType, str] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8e4m3fn": "F8_E4M3",
    "int8": "I8",
    "int4": "U8",
    "float4e2m1": "U8",
}
"""The format's name of each type of weights."""
PACKED_DTYPES: tuple[DType, ...] = ("int4", "float4e2m1")
"""Two numbers to a byte along the last axis, the first in the low four bits: ``U8`` to safetensors.

A pack has one of them at most, and its metadata says under ``U8`` which; int4 where it does not.
"""
_PLAIN: dict[DType, str] = {
    dtype: name for dtype, name in SAFETENSORS_NAMES.items() if dtype not in PACKED_DTYPES
}
NUMBER_BYTES: dict[DType, int] = {dtype: _BITS[name] // 8 for dtype, name in _PLAIN.items()} | {
    "int64": 8
}
"""Bytes of one number, of types that are not packed."""
ITEM_SIZES = {name: _BITS[name] // 8 for name in ("F32", "F16", "BF16")}
"""Bytes of one number, of the types that checkpoints of this family have."""
_DTYPES: dict[str, DType] = {name: dtype for dtype, name in _PLAIN.items()}


class Malformed(Unreadable):
    """Says that a file is no safetensors file.

    Attributes:
        hint: Next step for the owner of a checkpoint.
    """

    def __init__(self, reason: str, hint: str = DOWNLOAD_HINT) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        dtype: ``F32``, ``F16`` or ``BF16``.
        offset: Bytes from the start of the file.
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


class Header(NamedTuple):
    """Holds a file's tensors by name, and its metadata."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, Any]


def read_header(path: Path) -> Header:
    """Read the header, and check that the file holds what it promises.

    Entries may have any type of the format.

    Raises:
        OSError, ValueError: the file cannot be opened.
        Unreadable: it is no safetensors file.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
        raise Malformed("expected a file, found something else")  # a pipe would wait for a writer
    with path.open("rb") as stream:
        size, length = facts.st_size, int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise Malformed(
                f"expected a safetensors header of {length} bytes, found a file of {size} bytes"
            )
        header = parse_json(decode_text(stream.read(length)), unique=True)
    if not isinstance(header, dict):
        raise Malformed(f"expected a JSON object as header, found {type(header).__name__}")
    metadata, start = header.pop("__metadata__", None), 8 + length
    entries = {name: _entry(path, name, value, start) for name, value in header.items()}
    _check_layout(entries, start, size)
    return Header(entries, metadata if isinstance(metadata, dict) else {})


def read_safetensors_header(
    path: Path, missing_hint: str = "download the missing file into the checkpoint folder"
) -> dict[str, TensorEntry]:
    """Read the tensors of a checkpoint's file, of any type: see :func:`check_readable`.

    Raises:
        CheckpointError: the file is missing, unreadable or malformed.
    """
    try:
        return read_header(path).entries
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path}: expected a file, found {nothing_at(path)}", missing_hint
        ) from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: expected a file, found a folder", missing_hint) from error
    except Malformed as error:
        raise CheckpointError(f"{path}: {error.reason}", error.hint) from error
    except (OSError, ValueError, Unreadable) as error:  # ValueError: a name with a NUL byte
        raise CheckpointError(
            f"{path}: expected a safetensors file, found one that cannot be read "
            f"({reason_of(error)})",
            DOWNLOAD_HINT,
        ) from error


def check_readable(name: str, entry: TensorEntry) -> None:
    """Refuse a tensor of a type that checkpoints of this family lack.

    Raises:
        CheckpointError: the type is another; the tensor is named.
    """
    if entry.dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{entry.file}: expected {named(name)} to be one of {', '.join(ITEM_SIZES)}, "
            f"found {entry.dtype}",
            "start from the published 16-bit checkpoint; quantization is a step of its own",
        )


def to_float32(raw: bytes | NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Convert the bytes of an ``F32``, ``F16`` or ``BF16`` tensor, exactly.

    Returns:
        Numbers, ``(n,)``. Bytes of ``F32`` are not copied.
    """
    if dtype == "F32":
        return np.frombuffer(raw, "<f4")
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if dtype != "BF16":
        raise ValueError(f"expected float32, float16 or bfloat16, found {dtype}")
    wide = np.frombuffer(raw, "<u2").astype(np.uint32)  # bfloat16 is the upper half of a float32
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(dtype, str)
        or not _are_lengths(shape)
        or not _are_lengths(offsets)
        or len(offsets) != 2
    ):
        raise Malformed(
            f"expected dtype, shape and data_offsets for {named(name)}, found {shown(value)}"
        )
    if dtype not in _BITS:
        raise Malformed(
            f"expected {named(name)} to be one of {', '.join(ITEM_SIZES)}, found {shown(dtype)}",
            "start from the published 16-bit checkpoint",
        )
    begin, end = offsets
    # Python's numbers: no shape overflows them
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise Malformed(
            f"expected {named(name)} to have the bytes of {dtype} {shown(shape)}, "
            f"found {end - begin}"
        )
    return TensorEntry(path, dtype, tuple(shape), data_start + begin, end - begin)


def _are_lengths(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(is_integer(one) and one >= 0 for one in values)


def _check_layout(entries: dict[str, TensorEntry], start: int, size: int) -> None:
    """Check that tensors follow each other without gaps.

    The first begins at ``start``, and the last ends the file.
    """
    end = start
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
    ):
        if entry.offset != end:
            raise Malformed(f"expected {named(name)} to begin at byte {end}, found {entry.offset}")
        end += entry.num_bytes
    if end != size:
        raise Malformed(f"expected {end} bytes, found {size}")


@dataclass(frozen=True)
class PackEntry:
    """Says where one tensor of a weight pack lies.

    Attributes:
        dtype: Type of the numbers; a packed one lies as :data:`PACKED_DTYPES` says.
        shape: Shape in numbers.
        offset: Bytes from the start of the file.
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


def read_pack_header(path: Path) -> dict[str, PackEntry]:
    """Read the place of each tensor in a weight pack.

    Raises:
        OSError, ValueError: the file cannot be opened.
        Unreadable: it is no pack.
    """
    header = read_header(path)
    dtypes = _DTYPES | {"U8": _packed_dtype(header.metadata)}
    return {name: _pack_entry(name, entry, dtypes) for name, entry in header.entries.items()}


def _packed_dtype(metadata: Mapping[str, Any]) -> DType:
    """Find the packed type of a file in its metadata of ``U8``."""
    found = str(metadata.get("U8", "int4")).partition(",")[0]
    for dtype in PACKED_DTYPES:
        if dtype == found:
            return dtype
    raise Malformed(f"U8 stands for {found!r}")


def _pack_entry(name: str, entry: TensorEntry, dtypes: Mapping[str, DType]) -> PackEntry:
    dtype, shape = dtypes.get(entry.dtype), entry.shape
    if dtype is None or (dtype in PACKED_DTYPES and not shape):
        raise Malformed(f"{named(name)} has type {entry.dtype} and shape {list(shape)}")
    if dtype in PACKED_DTYPES:
        shape = (*shape[:-1], shape[-1] * 2)
    return PackEntry(dtype, shape, entry.offset)

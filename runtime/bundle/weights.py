"""Reads weight packs, whose tensors are bound to engines by name.

They are safetensors files (https://github.com/huggingface/safetensors). A bundle of several
precisions has a pack for each, and what they have in common lies in one of them.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimode.errors import BundleError
from trimode.formats.contract import DType
from trimode.formats.hints import REBUILD
from trimode.formats.safetensors import (
    PACKED_DTYPES,
    SAFETENSORS_NAMES,
    read_pack_header,
    to_float32,
)
from trimode.formats.texts import Unreadable, reason_of

logger = logging.getLogger("trimode.runtime")
SCALE_KINDS = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
"""How the names of scales end, behind the layer's."""
_QUANTIZED: tuple[DType, ...] = ("float8e4m3fn", "int8", *PACKED_DTYPES)


def is_common(name: str, dtype: DType) -> bool:
    """Tell whether a tensor is the same in every precision with it.

    Such a tensor is neither quantized nor a scale.
    """
    return dtype not in _QUANTIZED and name.rpartition(".")[2] not in SCALE_KINDS


class WeightPack:
    """Maps a pack: nothing is read early, and processes share pages.

    Args:
        path: Safetensors file.

    Raises:
        BundleError: the file is no pack of this library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.entries = read_pack_header(path)
            self._bytes = _map(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, Unreadable) as error:
            found = (
                f"{path}: expected a weight pack, "
                f"found one that cannot be read ({reason_of(error)})"
            )
            hint = f"check the file's permissions, or {REBUILD}"
            raise BundleError(found, hint) from error

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Map the bytes of a tensor."""
        entry = self.entries[name]
        return self._bytes[entry.offset : entry.offset + entry.num_bytes]

    def widened(self, name: str) -> NDArray[np.float32]:
        """Return a floating-point tensor in float32, shaped.

        Its type has 16 bits or more. It is a view of the file if it is float32 there, else a copy.
        """
        entry = self.entries[name]
        values = to_float32(self.raw(name), SAFETENSORS_NAMES[entry.dtype])
        return values.reshape(entry.shape)


class PrecisionWeights:
    """Maps the tensors of one precision, each once.

    These are all tensors of its own pack, and those of other packs that precisions have in common.
    A weight that is quantized here may lie there in full, and the other way round: the own pack is
    asked first, and the quantized weights and scales of others are not seen.

    Args:
        paths: Packs; the first is its own.

    Raises:
        BundleError: a file is no pack of this library.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        own, *others = (WeightPack(path) for path in paths)
        self._packs = dict.fromkeys(own.entries, own)
        for pack in others:
            self._packs |= {
                name: pack
                for name, entry in pack.entries.items()
                if name not in self._packs and is_common(name, entry.dtype)
            }
        self.entries = {name: pack.entries[name] for name, pack in self._packs.items()}

    def pack_of(self, name: str) -> WeightPack:
        """Return the pack that holds a tensor."""
        return self._packs[name]

    def raw(self, name: str) -> NDArray[np.uint8]:
        return self._packs[name].raw(name)

    def widened(self, name: str) -> NDArray[np.float32]:
        return self._packs[name].widened(name)


def _map(path: Path) -> NDArray[np.uint8]:
    """Map the bytes ``(n,)`` of a file.

    They are read into memory if the file system cannot map.
    """
    try:
        return np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning(
            "%s cannot be mapped (%s): it is read into memory, which processes do not share",
            path,
            reason_of(error),
        )
        return np.fromfile(path, np.uint8)

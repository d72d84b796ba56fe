"""Describes the form in which a prefix is copied between rows.

A prefix is the keys and values of a text's first tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trimode.errors import UsageError
from trimode.formats.contract import DType, ModelInfo, cache_specs
from trimode.formats.safetensors import NUMBER_BYTES

STORAGE: dict[DType, type[np.generic]] = {
    "float32": np.float32,
    "int64": np.int64,
    "float16": np.float16,
    "bfloat16": np.float16,
}
"""Numpy's type of each element type. It has no bfloat16: float16 has the same two bytes."""


class Rows(Protocol):
    """A cache as far as its bounds are checked."""

    num_rows: int

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        ...


@dataclass(frozen=True)
class SlotFormat:
    """What one slot of a row holds.

    Attributes:
        num_tensors: Tensors of keys and of values, those of all layers together.
        num_heads: Key/value heads of a tensor.
        head_dim: Numbers of a head.
        dtype: Element type as stored.
    """

    num_tensors: int
    num_heads: int
    head_dim: int
    dtype: DType

    @classmethod
    def of(cls, model: ModelInfo, dtype: DType) -> SlotFormat:
        """Return the format of a model's cache."""
        num_tensors = len(cache_specs(model, "past_key_values"))
        return cls(num_tensors, model.num_key_value_heads, model.head_dim, dtype)

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in one slot."""
        return self.head_dim * NUMBER_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one slot of a row, in all tensors together."""
        return self.num_tensors * self.num_heads * self.head_bytes

    def empty(self, length: int) -> NDArray[np.generic]:
        """Return room for ``length`` slots: ``(tensors, heads, length, head size)``."""
        shape = (self.num_tensors, self.num_heads, length, self.head_dim)
        return np.empty(shape, STORAGE[self.dtype])

    def length_of(self, arrays: Sequence[NDArray[np.generic]]) -> int:
        """Return how many slots exported arrays hold.

        Raises:
            UsageError: they are not of this format.
        """
        dtype = np.dtype(STORAGE[self.dtype])
        length = arrays[0].shape[1] if len(arrays) and arrays[0].ndim == 3 else 0
        shape = (self.num_heads, length, self.head_dim)
        found = {(array.shape, array.dtype) for array in arrays}
        if len(arrays) != self.num_tensors or found != {(shape, dtype)}:
            described = ", ".join(sorted(f"{kind} {size}" for size, kind in found)) or "none"
            raise UsageError(
                f"expected {self.num_tensors} arrays of {dtype} "
                f"({self.num_heads}, length, {self.head_dim}), "
                f"found {len(arrays)} of {described}",
                "import what export_prefix of the same target has returned",
            )
        return length


def check_slots(cache: Rows, row: int, start: int, length: int) -> None:
    """Raise :class:`UsageError` unless the row has slots ``start .. start + length``."""
    if not 0 <= row < cache.num_rows:
        raise UsageError(f"expected a row from 0 to {cache.num_rows - 1}, found {row}")
    if start < 0 or length < 0 or start + length > cache.capacity:
        raise UsageError(
            f"expected slots within the cache's {cache.capacity}, "
            f"found {length} from slot {start} on",
            "reserve the length first",
        )


def beyond_target(most: int, length: int) -> UsageError:
    """Return the error of a text longer than a target has slots."""
    return UsageError(
        f"expected at most {most} tokens, which the cache of this target holds, found {length}",
        "shorten the text, or build with a larger `max_length`",
    )


def check_same_session(ours: object, theirs: object) -> None:
    """Raise :class:`UsageError` unless two caches are of one session.

    Args:
        ours: Value that all caches of a session share, of the one.
        theirs: Same value of the other; None = it is of another kind.
    """
    if ours != theirs:
        raise UsageError(
            "expected a cache of the same session, found one of another",
            "copy between sessions with export_prefix and import_prefix",
        )

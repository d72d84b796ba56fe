"""Finds numbers that are not finite, in the bits that hold them.

A number is NaN or infinite where all bits of its exponent are set. Read as integers, such numbers
are the largest: two maxima, one with the sign bit and one without, find them in one pass over the
memory each, without a copy. That is several times as fast as hashing the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trimode.errors import CheckpointError

T = TypeVar("T")

_EXPONENTS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of the exponent, by the safetensors name of the type."""
_INTEGERS: dict[int, tuple[np.dtype[Any], np.dtype[Any]]] = {
    2: (np.dtype("<i2"), np.dtype("<u2")),
    4: (np.dtype("<i4"), np.dtype("<u4")),
}
_HINT = "download the checkpoint again, or train it again where it diverged"


class NotFinite(NamedTuple):
    """Holds the first number that is not finite.

    Its place is in the flat array; its name is ``NaN``, ``inf`` or ``-inf``.
    """

    offset: int
    value: str

    def at(self, shape: tuple[int, ...]) -> str:
        """Describe the place of a number: ``NaN at [3, 17]``.

        The place is left out for a single number.
        """
        place = (
            ", ".join(str(int(i)) for i in np.unravel_index(self.offset, shape)) if shape else ""
        )
        return f"{self.value} at [{place}]" if place else self.value


def first_not_finite(values: NDArray[Any] | bytes, dtype: str = "F32") -> NotFinite | None:
    """Find the first number that is NaN or infinite.

    Args:
        values: A float32 array of any shape, or raw bytes of ``dtype``.
        dtype: ``F32``, ``F16`` or ``BF16``.

    Returns:
        Place and name of the number; None where all are finite.
    """
    exponent = _EXPONENTS[dtype]
    signed, unsigned = _INTEGERS[4 if dtype == "F32" else 2]
    raw = np.frombuffer(values, unsigned) if isinstance(values, bytes) else values.view(unsigned)
    sign = 1 << (8 * unsigned.itemsize - 1)
    if not raw.size or (raw.view(signed).max() < exponent and raw.max() < (sign | exponent)):
        return None
    flat = raw.reshape(-1)
    index = int(np.flatnonzero((flat & exponent) == exponent)[0])
    bits = int(flat[index])
    if bits & (exponent & -exponent) - 1:
        return NotFinite(index, "NaN")
    return NotFinite(index, "-inf" if bits & sign else "inf")


class FiniteCheck:
    """Checks a tensor's bytes as they pass by.

    Args:
        name: Name of the tensor, for the message.
        shape: Shape of the tensor.
        dtype: ``F32``, ``F16`` or ``BF16``.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self._name, self._shape, self._dtype = name, shape, dtype
        self._seen = 0

    def pass_by(self, raw: bytes) -> bytes:
        """The same bytes, the next of the tensor.

        Raises:
            CheckpointError: a number among them is NaN or infinite.
        """
        found = first_not_finite(raw, self._dtype)
        if found is not None:
            where = NotFinite(self._seen + found.offset, found.value).at(self._shape)
            raise CheckpointError(f"{self._name}: expected finite weights, found {where}", _HINT)
        self._seen += len(raw) // (4 if self._dtype == "F32" else 2)
        return raw


def finite_or(other: T, value: float | None) -> float | T:
    """Return a number as JSON knows it, or ``other``.

    JSON knows no number that is not finite.
    """
    return other if value is None or not math.isfinite(value) else value


def largest(values: Sequence[float]) -> float:
    """Return the largest number, 0 if there are none.

    The result is NaN if one number is, which ``max`` would forget.
    """
    return float(np.max(values)) if len(values) else 0.0


def is_within(value: float | None, bound: float) -> bool:
    """Whether a number is at most ``bound``; NaN and infinity never are."""
    return value is not None and math.isfinite(value) and math.isfinite(bound) and value <= bound

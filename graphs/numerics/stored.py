"""Converts weights to the type that a bundle stores them in."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from trimode.errors import BuildError
from trimode.formats.contract import DType
from trimode.formats.finite import FiniteCheck, first_not_finite
from trimode.formats.safetensors import SAFETENSORS_NAMES, TensorEntry, to_float32

NUMPY_DTYPES: dict[DType, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_LARGEST: dict[DType, tuple[str, str, str]] = {
    "float16": ("65504", "fp16", "choose the precision bf16 or fp32"),
    "bfloat16": ("3.38953e+38", "bf16", "choose the precision fp32"),
}
"""Largest number of a type, its name among precisions, and what to do about a larger weight."""


def stored_as(
    dtype: DType, name: str, entry: TensorEntry, pieces: Iterator[bytes]
) -> Iterator[bytes]:
    """Yield a tensor's bytes in another type, or as they are.

    Args:
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        name: Name of the tensor, for messages.
        entry: Type and shape of the tensor.
        pieces: Bytes of the tensor in ``entry.dtype``, in order.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        BuildError: a weight is too large for ``dtype``.
    """
    finite = FiniteCheck(name, entry.shape, entry.dtype)
    for raw in map(finite.pass_by, pieces):
        is_same = entry.dtype == SAFETENSORS_NAMES[dtype]
        yield raw if is_same else _converted(raw, entry.dtype, dtype, name)


def _converted(raw: bytes, source: str, dtype: DType, name: str) -> bytes:
    """Finite numbers in another type.

    Raises:
        BuildError: one is too large for it.
    """
    wide = to_float32(raw, source)
    with np.errstate(over="ignore"):  # looked for below
        narrow = wide.astype(NUMPY_DTYPES[dtype])
    converted = narrow.tobytes()
    if dtype in _LARGEST and first_not_finite(converted, SAFETENSORS_NAMES[dtype]) is not None:
        most, precision, hint = _LARGEST[dtype]
        found = f"{float(np.abs(wide).max()):.6g}"
        raise BuildError(
            f"{name}: expected weights up to {most}, the largest of {precision}, found {found}",
            hint,
        )
    return converted

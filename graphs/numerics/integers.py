"""The arithmetic of :mod:`trimode.formats.calibration` in numpy.

One addition to it: a scale is rounded to the type it is stored in *before* a weight is divided by
it, so that rounding it costs no accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trimode.errors import BuildError
from trimode.formats.calibration import QuantizedPrecision
from trimode.formats.contract import DType
from trimode.graphs.numerics import nvfp4
from trimode.graphs.numerics.stored import NUMPY_DTYPES

Floats = NDArray[np.float32]
_SMALLEST: dict[DType, float] = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
_PIECE_ELEMENTS = 1 << 15
"""Numbers that are quantized at a time: the intermediate results then stay in the processor's
cache.
"""


@dataclass(frozen=True)
class Format:
    """Describes a type for weights.

    ``amax`` becomes ``largest``; numbers are kept from ``lowest`` to ``highest``.

    Of nvfp4 ``amax`` is that of the whole weight: block and number have a scale between them, which
    makes ``largest`` of ``highest``.
    """

    dtype: DType
    largest: float
    lowest: float
    highest: float


FORMATS: dict[QuantizedPrecision, Format] = {
    "fp8": Format("float8e4m3fn", 448, -448, 448),
    "int8": Format("int8", 127, -127, 127),
    "int4": Format("int4", 7, -8, 7),
    "nvfp4": Format("float4e2m1", nvfp4.GLOBAL_STEPS, -nvfp4.LARGEST_CODE, nvfp4.LARGEST_CODE),
}


def scale_of(amax: Floats, precision: QuantizedPrecision, stored: DType) -> Floats:
    """Give ``amax / largest`` as ``stored`` holds it, in float32.

    It is 1 where ``amax`` is 0. That of nvfp4, the global scale, is float32 in every pack.

    Raises:
        BuildError: a scale is too large for ``stored``.
    """
    return round_to(exact_scale(amax, precision), "float32" if precision == "nvfp4" else stored)


def exact_scale(amax: Floats, precision: QuantizedPrecision) -> Floats:
    """Give ``amax / largest`` in float32; 1 where ``amax`` is 0."""
    largest = np.float32(FORMATS[precision].largest)
    return np.where(amax == 0, np.float32(1), amax / largest).astype(np.float32)


def round_to(values: Floats, stored: DType) -> Floats:
    """Positive values as ``stored`` holds them, in float32; never zero.

    Raises:
        BuildError: one is too large for it.
    """
    with np.errstate(over="ignore"):  # looked for below
        rounded: Floats = values.astype(NUMPY_DTYPES[stored]).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise BuildError(
            f"expected scales that fit {stored}, found {float(values.max()):.6g}",
            "calibrate again, or build without targets that compute in float16, such as t4",
        )
    return np.asarray(np.maximum(rounded, np.float32(_SMALLEST[stored])), np.float32)


def largest_magnitudes(
    values: Floats, precision: QuantizedPrecision, block_size: int | None
) -> Floats:
    """Give the ``amax`` that round-to-nearest takes.

    It is of each row ``(rows,)``, of each row and block ``(rows, columns / block_size)`` (int4), or
    of everything ``()`` (nvfp4).
    """
    if precision == "nvfp4":
        return np.asarray(np.abs(values).max(), np.float32)
    if precision == "int4":
        assert block_size is not None
        values = values.reshape(values.shape[0], -1, block_size)
    largest: Floats = np.maximum(values.max(-1), -values.min(-1))
    return largest


def quantize(values: Floats, scale: Floats, precision: QuantizedPrecision) -> NDArray[np.uint8]:
    """Quantize rows of a weight to the bytes that the pack holds.

    The type is one whose scales are known beforehand (nvfp4: :mod:`.nvfp4`).

    Args:
        values: (rows, columns).
        scale: ``()``, ``(rows,)`` or ``(rows, blocks)``, positive.
        precision: The type.

    Returns:
        (rows, columns) bytes; for int4 (rows, columns / 2), two numbers each, the first in the low
            four bits.

    Raises:
        BuildError: a value is not finite, where the type is one of integers.
    """
    kept = FORMATS[precision]
    out = np.empty(
        (values.shape[0], values.shape[1] // 2 if precision == "int4" else values.shape[1]),
        np.uint8,
    )
    step = max(1, _PIECE_ELEMENTS // max(1, values.shape[1]))
    for begin in range(0, values.shape[0], step):
        piece = slice(begin, begin + step)
        scaled = _divide(values[piece], scale[piece] if scale.ndim else scale)
        if precision != "fp8":
            np.rint(scaled, out=scaled)
        np.clip(scaled, kept.lowest, kept.highest, out=scaled)
        out[piece] = _to_fp8(scaled) if precision == "fp8" else _to_integers(scaled, precision)
    return out


def dequantize(raw: NDArray[np.uint8], scale: Floats, precision: QuantizedPrecision) -> Floats:
    """What :func:`quantize` stands for, ``(rows, columns)``: the reverse, for comparisons."""
    if precision == "fp8":
        values = raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    elif precision == "int8":
        values = raw.view(np.int8).astype(np.float32)
    else:
        values = (
            np.stack((raw << np.uint8(4), raw & np.uint8(0xF0)), -1)
            .view(np.int8)
            .reshape(raw.shape[0], -1)
            >> 4
        )
        values = values.astype(np.float32)
    blocks = values.reshape(*scale.shape, -1) if scale.ndim else values
    return np.asarray(blocks * (scale[..., None] if scale.ndim else scale), np.float32).reshape(
        values.shape
    )


def round_trip(values: Floats, scale: Floats, precision: QuantizedPrecision) -> Floats:
    """Rows of a weight, quantized and back, ``(rows, columns)``.

    Raises:
        BuildError: a value is not finite, where the type has no code for it.
    """
    if precision == "nvfp4":
        return nvfp4.decode(*nvfp4.encode(values, scale), scale)
    return dequantize(quantize(values, scale, precision), scale, precision)


def _divide(values: Floats, scale: Floats) -> Floats:
    with np.errstate(over="ignore"):  # infinity saturates as any large number does
        if not scale.ndim:
            return values / scale
        return (values.reshape(*scale.shape, -1) / scale[..., None]).reshape(values.shape)


def _to_integers(scaled: Floats, precision: QuantizedPrecision) -> NDArray[np.uint8]:
    try:
        with np.errstate(invalid="raise"):
            whole = scaled.astype(np.int8).view(np.uint8)
    except FloatingPointError as error:
        raise BuildError("expected finite weights, found NaN", "check the checkpoint") from error
    if precision == "int8":
        return whole
    return (whole[:, 0::2] & np.uint8(15)) | (whole[:, 1::2] << np.uint8(4))


def _to_fp8(scaled: Floats) -> NDArray[np.uint8]:
    """Round values up to 448 to fp8, ties to even.

    It gives what ``astype(float8_e4m3fn)`` does, several times as fast.
    """
    if np.isnan(scaled).any():
        return scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    bits = scaled.view(np.int32)
    code = bits & np.int32(0x7FFFFFFF)
    # Below 2**-6 numbers are multiples of 2**-9.
    small = np.minimum(code.view(np.float32), np.float32(2**-6))
    small *= np.float32(512)
    tiny = np.rint(small, out=small).astype(np.int32)
    # Three of the 23 bits of mantissa stay: add just under half of the last one, and a little more
    # where it is odd. The exponent's bias goes from 127 to 7. Below 2**-6 that is less than the
    # multiple above, beyond it the multiple is 8, which is less than that.
    spare = small.view(np.int32)
    np.right_shift(code, 20, out=spare)
    spare &= np.int32(1)
    code += spare
    code += np.int32(0x7FFFF)
    code >>= np.int32(20)
    code -= np.int32(120 << 3)
    np.maximum(code, tiny, out=code)
    np.right_shift(bits, 24, out=spare)
    spare &= np.int32(0x80)
    code |= spare
    return code.astype(np.uint8)


def bytes_of(values: Floats, stored: DType) -> bytes:
    """Values in the bytes of a floating-point type."""
    return values.astype(NUMPY_DTYPES[stored]).tobytes()

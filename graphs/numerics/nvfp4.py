"""Quantizes to NVFP4 in numpy.

Numbers have four bits, in blocks of 16 with a scale of eight bits each, and one scale of 32 bits
over all.

A number is E2M1 (sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6), the
scale of a block E4M3, the *global* scale float32::

    global = amax / (6 * 448)
    block  = e4m3(amax of the block / (6 * global))
    code   = e2m1(value / (block * global))

``amax`` is of the whole weight, or of all inputs that a layer has seen. A code is rounded to
nearest, ties to the even code, and saturates. The largest block scale is then about 448, and
the largest code of a block 6 (https://arxiv.org/abs/2509.25149, section 2 and appendix C).

Weights are rounded as ModelOpt's ``NVFP4QTensor`` rounds them, bit for bit: a block's scale is
never below 2**-9, and 1 where the block is zero.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trimode.errors import BuildError

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK_SIZE = 16
"""Numbers that share a scale."""
LARGEST_CODE = 6.0
LARGEST_SCALE = 448.0
SMALLEST_SCALE = 2.0**-9
GLOBAL_STEPS = LARGEST_CODE * LARGEST_SCALE
"""How many global scales the largest number is."""
VALUES: Floats = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)
"""What the codes 0 to 15 stand for."""
PAIRS: Floats = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], -1)
"""What a byte stands for, ``(256, 2)``: the number in its low four bits comes first."""
_SMALLEST = np.finfo(np.float32).smallest_subnormal
_PIECE_ELEMENTS = 1 << 15
"""Numbers that are encoded at a time: the intermediate results then stay in the processor's
cache.
"""


def encode(values: Floats, global_scale: Floats) -> tuple[Bytes, Bytes]:
    """Quantize rows of a weight.

    Args:
        values: ``(rows, columns)``; columns are whole blocks.
        global_scale: ``()``, positive.

    Returns:
        Codes, ``(rows, columns / 2)``, two to a byte, the first in the low four bits, and block
            scales, ``(rows, columns / 16)``, bytes of E4M3.

    Raises:
        BuildError: a value is not a number.
    """
    rows, columns = values.shape
    codes, scales = (
        np.empty((rows, columns // 2), np.uint8),
        np.empty((rows, columns // BLOCK_SIZE), np.uint8),
    )
    step = max(1, _PIECE_ELEMENTS // max(1, columns))
    for begin in range(0, rows, step):
        piece = slice(begin, begin + step)
        blocks = values[piece].reshape(-1, columns // BLOCK_SIZE, BLOCK_SIZE)
        narrow = _block_scales(blocks, global_scale)
        scales[piece] = narrow.view(np.uint8)
        # Of a weight that is nearly zero the product may round to zero, by which nothing can be
        # divided.
        unit = np.maximum(narrow.astype(np.float32) * global_scale, _SMALLEST)
        with np.errstate(over="ignore"):  # infinity saturates as any large number does
            steps = blocks / unit[..., None]
        codes[piece] = _packed(steps.reshape(-1, columns))
    return codes, scales


def decode(codes: Bytes, scales: Bytes, global_scale: Floats) -> Floats:
    """What :func:`encode` stands for, ``(rows, columns)``."""
    values = PAIRS[codes].reshape(*scales.shape, BLOCK_SIZE)
    wide = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * global_scale
    return np.asarray(values * wide[..., None], np.float32).reshape(codes.shape[0], -1)


def _block_scales(blocks: Floats, global_scale: Floats) -> NDArray[ml_dtypes.float8_e4m3fn]:
    amax = np.abs(blocks).max(-1)
    if np.isnan(amax).any():
        raise BuildError("expected finite weights, found NaN", "check the checkpoint")
    with np.errstate(over="ignore"):  # clipped below
        exact = amax / (np.float32(LARGEST_CODE) * global_scale)
    exact[exact == 0] = 1
    narrow: NDArray[ml_dtypes.float8_e4m3fn] = np.clip(
        exact, np.float32(SMALLEST_SCALE), np.float32(LARGEST_SCALE)
    ).astype(ml_dtypes.float8_e4m3fn)
    return narrow


def _packed(steps: Floats) -> Bytes:
    """Return the codes of values, two to a byte.

    Values are in units of their block's scale.
    """
    magnitude = np.minimum(np.abs(steps), np.float32(LARGEST_CODE))
    # Below 1 numbers are multiples of a half. From there on one bit of mantissa stays: add just
    # under half of it, and a little more where it is odd. The exponent's bias goes from 127 to 1.
    # Below 1 that is at most the multiple above, beyond it the multiple is 2, which is at most
    # that.
    tiny = np.rint(np.minimum(magnitude, np.float32(1)) * np.float32(2)).astype(np.int32)
    bits = magnitude.view(np.int32)
    code = ((bits + np.int32(0x1FFFFF) + ((bits >> 22) & 1)) >> 22) - np.int32(126 << 1)
    whole: Bytes = np.maximum(code, tiny).astype(np.uint8) | (steps < 0).astype(
        np.uint8
    ) << np.uint8(3)
    return np.asarray(whole[:, 0::2] | (whole[:, 1::2] << np.uint8(4)), np.uint8)

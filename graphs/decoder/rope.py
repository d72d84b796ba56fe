"""Computes rotary position tables as the reference does.

The tables are data for the graphs, in float32 throughout.

YaRN changes the inverse frequencies at every position, so it lives in these tables alone and no
graph knows about it. Sources: Su et al. 2021 (RoPE, half-split layout), Peng et al. 2023 (YaRN),
Llama 4 (query scale).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.graphs.rope_config import RopeConfig

Float32 = NDArray[np.float32]


class RopeTables(NamedTuple):
    """Holds the position tables, all float32.

    ``cos``, ``sin``: (positions, head_dim / 2). ``query_scale``: (positions,), or None where the
    model has none.
    """

    cos: Float32
    sin: Float32
    query_scale: Float32 | None


def rope_tables(rope: RopeConfig, head_dim: int, num_positions: int) -> RopeTables:
    """Tables for positions ``0 .. num_positions - 1``."""
    positions = np.arange(num_positions, dtype=np.float32)
    # The reference multiplies in float32 too: at position 30,000 that rounding is 1e-3 rad, so a
    # float64 product would differ from it.
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    scale = np.float32(attention_factor(rope))
    return RopeTables(
        np.cos(angles) * scale, np.sin(angles) * scale, query_scale(rope, num_positions)
    )


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float32:
    """Return the inverse frequencies, (head_dim / 2,) float32, radians per position."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelength = np.float32(rope.theta) ** exponent  # over 2 pi
    extrapolated = np.float32(1) / wavelength
    if rope.rope_type == "default":
        return extrapolated
    low, high = _ramp_ends(rope, head_dim)
    index = np.arange(head_dim // 2, dtype=np.float32)
    ramp = np.clip((index - np.float32(low)) / np.float32(high - low), 0, 1)
    interpolated = np.float32(1) / (np.float32(rope.factor) * wavelength)
    mixed: Float32 = (interpolated * ramp + extrapolated * (1 - ramp)).astype(np.float32)
    return mixed


def attention_factor(rope: RopeConfig) -> float:
    """Give the multiplier of cos and sin.

    It is given, or ``m(mscale) / m(mscale_all_dim)``, or ``m(1)``, with ``m(s) = 0.1 s ln(factor) +
    1``.
    """
    if rope.rope_type == "default":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def m(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return m(rope.mscale) / m(rope.mscale_all_dim)
    return m(1.0)


def query_scale(rope: RopeConfig, num_positions: int) -> Float32 | None:
    """Scale queries by position; exactly 1 below the original length.

    It is ``1 + beta * ln(1 + floor(position / original))``.
    """
    if rope.query_scale_beta is None:
        return None
    laps = np.floor(np.arange(num_positions) / rope.original_max_position_embeddings).astype(
        np.float32
    )
    return (1 + np.float32(rope.query_scale_beta) * np.log1p(laps)).astype(np.float32)


def _ramp_ends(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Frequency indices between which YaRN moves from extrapolation to interpolation."""

    def index(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high

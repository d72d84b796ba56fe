"""What the layers' inputs looked like in each mode, and how much of each weight is left after quantization.

Neither asks ModelOpt: inputs are looked at as they come, weights are quantized here, in numpy, by the arithmetic that
:mod:`trimode.graphs.calibration` states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimode.errors import CheckpointError, UsageError
from trimode.graphs.calibration import QuantizedPrecision
from trimode.graphs.contract import Role

Weight = NDArray[np.float32]
LARGEST: dict[QuantizedPrecision, float] = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
SMALLEST: dict[QuantizedPrecision, float] = {"fp8": -448.0, "int8": -127.0, "int4": -8.0}
LOSSLESS_DB = 200.0
"""Said of a weight that quantization does not change; float32 itself is at about 150."""


class InputStatistics:
    """What the inputs of some layers are, by column and by mode.

    Args:
        names: the layers'.

    Attributes:
        amax: largest magnitude by layer and mode.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.amax: dict[str, dict[str, float]] = {name: {} for name in names}
        self._largest: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._num_forwards: dict[str, int] = {}

    def look(self, role: Role, name: str, x: Tensor) -> None:
        """Take in the input ``x (rows, in)`` of a layer in a forward.

        Raises:
            CheckpointError: it is not finite.
        """
        if not x.numel():
            return
        magnitude = x.abs()
        largest, mean = magnitude.amax(0), magnitude.mean(0)
        peak = float(largest.max())
        if not math.isfinite(peak):
            raise CheckpointError(f"{name}: expected finite inputs, found {peak} in a forward of {role}",
                                  "weights before this layer overflow or are damaged; download the checkpoint again")  # fmt: skip
        seen = self.amax[name]
        seen[role] = max(seen.get(role, 0.0), peak)
        self._largest[name] = torch.maximum(self._largest[name], largest) if name in self._largest else largest
        self._sum[name] = self._sum[name] + mean if name in self._sum else mean
        self._num_forwards[name] = self._num_forwards.get(name, 0) + 1

    def check_seen(self) -> None:
        """Raise :class:`UsageError` where a layer's input was zero all the time, or never came."""
        for name, by_role in self.amax.items():
            if not any(by_role.values()):
                raise UsageError(f"{name}: expected inputs other than zero, found none in {self._num_forwards.get(name, 0)} forwards",
                                 "no scale can be told from that; check the checkpoint, or use prompts that reach this layer")  # fmt: skip

    def largest(self, name: str) -> Tensor:
        """Largest magnitude of each column, ``(in,)``."""
        return self._largest[name]

    def mean(self, name: str) -> Tensor:
        """Mean magnitude of each column, ``(in,)``, in which every forward counts alike, however many rows it has."""
        return self._sum[name] / self._num_forwards[name]


def quantize_weight(weight: Weight, amax: Weight, precision: QuantizedPrecision, pre_quant_scale: Weight | None = None) -> Weight:
    """The weight as the graphs will see it: quantized and back, ``(out, in)``, float32.

    Args:
        weight: (out, in).
        amax: ``()``, ``(out,)`` or ``(out, in / block)``.
        precision: what to quantize to.
        pre_quant_scale: (in,), divided out before and multiplied back after; None = ones.
    """
    factor = np.float32(1) if pre_quant_scale is None else pre_quant_scale
    scale = per_weight(amax, weight.shape) / np.float32(LARGEST[precision])
    codes = np.clip(weight / factor / scale, SMALLEST[precision], LARGEST[precision])
    rounded = codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) if precision == "fp8" else np.rint(codes)
    result: Weight = rounded * scale * factor
    return result


def per_weight(amax: Weight, shape: tuple[int, ...]) -> Weight:
    """The amax of each weight, broadcastable to ``shape (out, in)``."""
    if amax.ndim == 2:
        return np.repeat(amax, shape[1] // amax.shape[1], 1)
    return amax[:, None] if amax.ndim == 1 else amax


def snr_db(weight: Weight, quantized: Weight) -> float:
    """Signal-to-noise ratio ``10 log10(sum w^2 / sum (w - w')^2)``, at most :data:`LOSSLESS_DB`."""
    signal = float(np.square(weight, dtype=np.float64).sum())
    noise = float(np.square(weight - quantized, dtype=np.float64).sum())
    if not noise or not signal:
        return LOSSLESS_DB
    return min(LOSSLESS_DB, 10 * math.log10(signal / noise))

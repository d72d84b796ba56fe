"""What the layers' inputs looked like in each mode, and how much of each weight is left after quantization.

Neither asks ModelOpt: inputs are seen through hooks of our own, weights are quantized here, in numpy, by the arithmetic that
:mod:`trimode.graphs.calibration` states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from trimode.errors import CheckpointError, UsageError
from trimode.graphs.calibration import QuantizedPrecision
from trimode.graphs.contract import Role

Weight = NDArray[np.float32]
LARGEST: dict[QuantizedPrecision, float] = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
SMALLEST: dict[QuantizedPrecision, float] = {"fp8": -448.0, "int8": -127.0, "int4": -8.0}
LOSSLESS_DB = 200.0
"""Said of a weight that quantization does not change; float32 itself is at about 150."""


class InputStatistics:
    """Largest magnitude of each layer's input, and rows, by mode.

    Args:
        layers: by the checkpoint's names.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._role: Role | None = None
        self.amax: dict[str, dict[str, float]] = {name: {} for name in layers}
        self.num_rows: dict[Role, int] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Look at the layers' inputs while the block runs."""
        handles = [layer.register_forward_pre_hook(self._hook_of(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def watch(self, role: Role, num_rows: int) -> Iterator[None]:
        """What runs in the block is a forward of ``role``, of ``num_rows`` tokens."""
        self._role = role
        self.num_rows[role] = self.num_rows.get(role, 0) + num_rows
        try:
            yield
        finally:
            self._role = None

    def check_seen(self) -> None:
        """Raise :class:`UsageError` where a layer's input was zero all the time, or never came."""
        for name, by_role in self.amax.items():
            if not any(by_role.values()):
                raise UsageError(f"{name}: expected inputs other than zero, found none in {sum(self.num_rows.values())} rows",
                                 "no scale can be told from that; check the checkpoint, or use prompts that reach this layer")  # fmt: skip

    def _hook_of(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: Tensor = inputs[0]
            if self._role is None or not x.numel():
                return
            peak = float(x.abs().amax())
            if not math.isfinite(peak):
                raise CheckpointError(f"{name}: expected finite inputs, found {peak} in a forward of {self._role}",
                                      "weights before this layer overflow or are damaged; download the checkpoint again")  # fmt: skip
            seen = self.amax[name]
            seen[self._role] = max(seen.get(self._role, 0.0), peak)

        return look


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

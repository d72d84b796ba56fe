"""What the layers' inputs looked like in each mode, and how much of each weight is left after quantization.

Neither asks ModelOpt: inputs are seen through hooks of our own, weights are quantized by :mod:`trimode.graphs.quantization`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from trimode.errors import CheckpointError, UsageError
from trimode.graphs.calibration import QuantizedPrecision
from trimode.graphs.contract import Role
from trimode.graphs.quantization import Floats, dequantize, quantize, scale_of

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


def quantize_weight(weight: Floats, amax: Floats, precision: QuantizedPrecision, pre_quant_scale: Floats | None = None) -> Floats:
    """The weight as the graphs will see it: quantized and back, ``(out, in)``, float32.

    Args:
        weight: (out, in).
        amax: ``()``, ``(out,)`` or ``(out, in / block)``.
        precision: what to quantize to.
        pre_quant_scale: (in,), divided out before and multiplied back after; None = ones.
    """
    factor = np.float32(1) if pre_quant_scale is None else pre_quant_scale
    scale = scale_of(amax, precision, "float32")
    return dequantize(quantize(weight / factor, scale, precision), scale, precision) * factor


def snr_db(weight: Floats, quantized: Floats) -> float:
    """Signal-to-noise ratio ``10 log10(sum w^2 / sum (w - w')^2)``, at most :data:`LOSSLESS_DB`."""
    signal = float(np.square(weight, dtype=np.float64).sum())
    noise = float(np.square(weight - quantized, dtype=np.float64).sum())
    if not noise or not signal:
        return LOSSLESS_DB
    return min(LOSSLESS_DB, 10 * math.log10(signal / noise))

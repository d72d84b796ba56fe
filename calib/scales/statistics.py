"""Gathers layers' inputs by mode, and the error of quantized weights.

Neither asks ModelOpt: inputs are observed as they come, weights are quantized by
:mod:`trimode.graphs.numerics.integers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from trimode.errors import CheckpointError, UsageError
from trimode.formats.calibration import QuantizedPrecision
from trimode.formats.contract import GraphName
from trimode.graphs.numerics.integers import Floats, round_trip, scale_of

LOSSLESS_DB = 200.0
"""Said of a weight that quantization does not change; float32 itself is at about 150."""


class InputStatistics:
    """Gathers the inputs of some layers, by column and by mode.

    Args:
        names: Names of the layers.

    Attributes:
        amax: Largest magnitude by layer and mode.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.amax: dict[str, dict[str, float]] = {name: {} for name in names}
        self._largest: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._num_forwards: dict[str, int] = {}

    def observe(self, graph_name: GraphName, name: str, x: Tensor) -> None:
        """Take in a layer's input ``x (rows, in)`` of one forward.

        Raises:
            CheckpointError: it is not finite.
        """
        if not x.numel():
            return
        magnitude = x.abs()
        largest, mean = magnitude.amax(0), magnitude.mean(0)
        peak = float(largest.max())
        if not math.isfinite(peak):
            raise CheckpointError(
                f"{name}: expected finite inputs, found {peak} in a forward of {graph_name}",
                "weights before this layer overflow or are damaged; download the checkpoint again",
            )
        seen = self.amax[name]
        seen[graph_name] = max(seen.get(graph_name, 0.0), peak)
        self._largest[name] = (
            torch.maximum(self._largest[name], largest) if name in self._largest else largest
        )
        self._sum[name] = self._sum[name] + mean if name in self._sum else mean
        self._num_forwards[name] = self._num_forwards.get(name, 0) + 1

    def check_seen(self) -> None:
        """Check that every layer has seen inputs other than zero.

        Raises:
            UsageError: a layer has not.
        """
        for name, by_graph in self.amax.items():
            if not any(by_graph.values()):
                raise UsageError(
                    f"{name}: expected inputs other than zero, "
                    f"found none in {self._num_forwards.get(name, 0)} forwards",
                    "no scale can be told from that; check the checkpoint, "
                    "or use prompts that reach this layer",
                )

    def largest(self, name: str) -> Tensor:
        """Return the largest magnitude of each column, ``(in,)``."""
        return self._largest[name]

    def mean(self, name: str) -> Tensor:
        """Average the magnitude of each column, ``(in,)``.

        Every forward counts alike, however many rows it has.
        """
        return self._sum[name] / self._num_forwards[name]


def quantize_weight(
    weight: Floats,
    amax: Floats,
    precision: QuantizedPrecision,
    pre_quant_scale: Floats | None = None,
) -> Floats:
    """Quantize a weight and back, as the graphs will see it.

    Args:
        weight: Weight, (out, in).
        amax: Largest magnitudes, ``()``, ``(out,)`` or ``(out, in / block)``.
        precision: Type to quantize to.
        pre_quant_scale: Factors (in,), divided out before and multiplied back after; None = ones.

    Returns:
        The weight (out, in) in float32.
    """
    factor = np.float32(1) if pre_quant_scale is None else pre_quant_scale
    scale = scale_of(amax, precision, "float32")
    return round_trip(weight / factor, scale, precision) * factor


def snr_db(weight: Floats, quantized: Floats) -> float:
    """Compute ``10 log10(sum w^2 / sum (w - w')^2)``, at most :data:`LOSSLESS_DB`."""
    signal = float(np.square(weight, dtype=np.float64).sum())
    noise = float(np.square(weight - quantized, dtype=np.float64).sum())
    if not noise or not signal:
        return LOSSLESS_DB
    return min(LOSSLESS_DB, 10 * math.log10(signal / noise))

"""Turns the scales of 8-bit types into constants of an engine.

With its scales constant TensorRT-RTX multiplies numbers of 8 bits and reads the weight once, as it
lies. With the scale of the weight an input of the engine, every forward transposes or expands the
weight first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from trimode.formats.contract import DType
from trimode.graphs.numerics.integers import Floats
from trimode.graphs.numerics.quantization import Quantization
from trimode.runtime.bundle.weights import PrecisionWeights

CONSTANT_SCALES = (".weight_scale", ".input_scale")
"""How the names of these scales end."""


class ScalesToConstants(ir.passes.InPlacePass):
    """Puts the values of scales into the graph.

    Args:
        values: Scales by name, as the pack holds them, widened to float32.
    """

    def __init__(self, values: Mapping[str, Floats]) -> None:
        super().__init__()
        self.values = values

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Give data to those that have none yet."""
        found = [
            value
            for name, value in model.graph.initializers.items()
            if name in self.values and value.const_value is None
        ]
        for value in found:
            assert value.name is not None
            assert value.dtype is not None
            data = self.values[value.name]
            if value.shape is None or tuple(value.shape.numpy()) != data.shape:
                raise ir.passes.PassError(
                    f"{value.name} has shape {value.shape}, its values {data.shape}"
                )
            value.const_value = ir.tensor(
                data.astype(value.dtype.numpy()), dtype=value.dtype, name=value.name
            )
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """None of them is without data."""
        for name, value in model.graph.initializers.items():
            if name in self.values and value.const_value is None:
                raise ir.passes.PostconditionError(f"{name} has no data")


def known_scales(quantization: Quantization, stored: DType) -> dict[str, Floats] | None:
    """The scales that need no weight to be read.

    They are as the pack will hold them in type ``stored``. None where a weight has to be read.
    """
    scales: dict[str, Floats] = {}
    for layer, given in quantization.layers.items():
        rounded = given.rounded(quantization.precision, stored)
        if rounded.weight is None:
            return None
        scales[f"{layer}.weight_scale"] = rounded.weight
        if rounded.input is not None:
            scales[f"{layer}.input_scale"] = rounded.input
    return scales


def read_scales(packs: Sequence[Path]) -> dict[str, Floats]:
    """Read the scales of a precision in 8 bits, in float32."""
    weights = PrecisionWeights(packs)
    return {
        name: weights.widened(name).copy()
        for name in weights.entries
        if name.endswith(CONSTANT_SCALES)
    }

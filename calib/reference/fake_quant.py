"""Computes the trunk as a quantized bundle does.

Weights have been quantized and back, inputs are quantized on the way.

Shared with the graphs are the scales and the arithmetic on weights
(:mod:`trimode.graphs.numerics.integers`); what happens to inputs is torch's. Float32 throughout.
Gradients pass a quantized input as if it had been left alone where it is not cut (straight through,
Bengio et al. 2013), so that a drafter can be trained behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimode.errors import CheckpointError
from trimode.formats.calibration import QuantizedPrecision
from trimode.formats.contract import DType
from trimode.formats.hints import CALIBRATE
from trimode.graphs.decoder.trunk import LowRankLinear, TriModeTrunk
from trimode.graphs.numerics.integers import FORMATS, Floats, round_trip
from trimode.graphs.numerics.nvfp4 import BLOCK_SIZE, GLOBAL_STEPS, LARGEST_CODE
from trimode.graphs.numerics.scales import LayerScales

CODE_RANGES: dict[DType, tuple[float, float]] = {
    "float8e4m3fn": (-448, 448),
    "int8": (-128, 127),
    "float4e2m1": (-6, 6),
}
"""Ranges of the types of inputs, in steps of a scale."""
SMALLEST_NORMAL = 2.0**-126
"""Stands in for a block's scale of 0, to divide by: the block's numbers are multiplied by 0
again.
"""


def quantize_trunk(
    trunk: TriModeTrunk, precision: QuantizedPrecision, layers: Mapping[str, LayerScales]
) -> None:
    """Quantize linear layers of a float32 trunk in place.

    The drafter's branch keeps reading the input as it was.

    Args:
        trunk: Trunk whose layers are replaced.
        precision: Type of the quantized weights.
        layers: Scales as the pack stores them, by the checkpoint's names without ``.weight``; none
            is left to be taken from the weight.

    Raises:
        CheckpointError: the trunk has no such layer, or the scales do not fit its weight.
        BuildError: a weight is not finite.
    """
    for name, scales in layers.items():
        linear = _find(trunk, name)
        _check_shapes(name, linear, scales)
        parent, _, attribute = name.rpartition(".")
        kind = QuantizedLowRankLinear if isinstance(linear, LowRankLinear) else QuantizedLinear
        setattr(trunk.get_submodule(parent), attribute, kind(linear, precision, scales))  # type: ignore[arg-type]


class InputQuantizer(nn.Module):
    """Applies ``pre_quant_scale``, QuantizeLinear and DequantizeLinear before a product.

    Those that the layer does not have are left out.

    Attributes:
        block_size: Number of inputs that share a scale of an int4 weight; None = other weights.
        is_rounded: Whether these blocks are rounded to int8, as on a CPU.
    """

    factor: Tensor | None
    scale: Tensor | None
    is_rounded: bool = False

    def __init__(
        self, precision: QuantizedPrecision, scales: LayerScales, device: torch.device
    ) -> None:
        super().__init__()
        self.precision = precision
        self.block_size = scales.block_size if precision == "int4" else None
        self.register_buffer(
            "factor",
            None if scales.pre_quant is None else torch.from_numpy(scales.pre_quant).to(device),
            persistent=False,
        )
        self.register_buffer(
            "scale",
            None if scales.input is None else torch.tensor(float(scales.input), device=device),
            persistent=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x (..., in)`` as the product reads it."""
        if self.factor is not None:
            x = x * self.factor
        if self.is_rounded:
            steps, scale = int8_steps(x, self.block_size)
            return (torch.round(steps) * scale).reshape(x.shape)
        if self.scale is None:
            return x
        if self.precision == "nvfp4":
            kept = torch.clamp(x, -GLOBAL_STEPS * self.scale, GLOBAL_STEPS * self.scale)
            return kept + (in_blocks(x, self.scale) - kept).detach()
        dtype = FORMATS[self.precision].dtype
        steps = torch.clamp(x / self.scale, *CODE_RANGES[dtype])
        return (steps + (nearest_code(steps, dtype) - steps).detach()) * self.scale


class QuantizedLinear(nn.Linear):
    """Multiplies a quantized input with a weight that holds quantized values."""

    def __init__(
        self, linear: nn.Linear, precision: QuantizedPrecision, scales: LayerScales
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = _quantized_weight(linear, precision, scales)
        self.quantizer = InputQuantizer(
            precision, _with_block_size(linear, scales), linear.weight.device
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x (..., in)``; the result is ``(..., out)``."""
        return functional.linear(self.quantizer(x), self.weight)


class QuantizedLowRankLinear(LowRankLinear):
    """Multiplies a quantized input, and adds the drafter's branch.

    The branch reads the input as it was.
    """

    def __init__(
        self, linear: LowRankLinear, precision: QuantizedPrecision, scales: LayerScales
    ) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, 0, 0.0)
        self.lora_A, self.lora_B, self.scaling = linear.lora_A, linear.lora_B, linear.scaling
        self.weight = _quantized_weight(linear, precision, scales)
        self.quantizer = InputQuantizer(
            precision, _with_block_size(linear, scales), linear.weight.device
        )

    def product(self, x: Tensor) -> Tensor:
        return functional.linear(self.quantizer(x), self.weight)


def int8_steps(x: Tensor, block_size: int | None) -> tuple[Tensor, Tensor]:
    """Divide each block of ``x (..., in)`` by its own scale.

    The largest magnitude in the block decides the scale.

    Returns:
        Steps from -127 to 127, ``(..., in / block_size, block_size)``, and scales, ``(..., in /
        block_size, 1)``.
    """
    blocks = x.reshape(*x.shape[:-1], -1, block_size or x.shape[-1])
    scale = torch.clamp(blocks.abs().amax(-1, keepdim=True) / 127, min=SMALLEST_NORMAL)
    return blocks / scale, scale


def in_blocks(x: Tensor, global_scale: Tensor) -> Tensor:
    """Quantize an input ``x (..., in)`` to NVFP4 and back to float32.

    Each block has the scale that its largest magnitude asks for, as E4M3 holds it.

    A block whose scale rounds to zero becomes zero, as in ModelOpt's kernel (``nvfp4_scalar_qdq``).
    """
    blocks, steps = blocks_of(x), steps_of_blocks(x, global_scale)
    scale = nearest_code(steps, "float8e4m3fn") * global_scale
    return (nearest_code(steps_in_blocks(blocks, scale), "float4e2m1") * scale).flatten(-2)


def blocks_of(x: Tensor) -> Tensor:
    """Reshape ``(..., in)`` to ``(..., in / 16, 16)``."""
    return x.reshape(*x.shape[:-1], -1, BLOCK_SIZE)


def steps_of_blocks(x: Tensor, global_scale: Tensor) -> Tensor:
    """Compute the scales of the blocks of ``x (..., in)``.

    They are ``(..., in / 16, 1)``, over the global one, and cut to E4M3's range.
    """
    largest = blocks_of(x).abs().amax(-1, keepdim=True)
    return torch.clamp(largest / (LARGEST_CODE * global_scale), *CODE_RANGES["float8e4m3fn"])


def steps_in_blocks(blocks: Tensor, scale: Tensor) -> Tensor:
    """Divide blocks ``(..., 16)`` by their scales, within E2M1's range."""
    return torch.clamp(blocks / torch.clamp(scale, min=SMALLEST_NORMAL), *CODE_RANGES["float4e2m1"])


def spacing_of_e2m1(steps: Tensor) -> Tensor:
    """Distance of neighbouring codes at each value of E2M1."""
    return torch.where(steps.abs() < 2, 0.5, torch.where(steps.abs() < 4, 1.0, 2.0))


def nearest_code(steps: Tensor, dtype: DType) -> Tensor:
    """Round to the nearest code of an input's type, ties to even."""
    if dtype == "float4e2m1":
        spacing = spacing_of_e2m1(steps)
        return torch.round(steps / spacing) * spacing
    return torch.round(steps) if dtype == "int8" else steps.to(torch.float8_e4m3fn).float()


def _find(trunk: TriModeTrunk, name: str) -> nn.Linear:
    try:
        linear = trunk.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(
            f"expected the model to have the linear layer {name}, found none",
            f"calibrate this checkpoint: {CALIBRATE}",
        )
    return linear


def _with_block_size(linear: nn.Linear, scales: LayerScales) -> LayerScales:
    """Scales that know how many inputs share one, by their shape."""
    if scales.weight is None or scales.weight.ndim != 2:
        return scales
    return replace(scales, block_size=linear.in_features // scales.weight.shape[1])


def _check_shapes(name: str, linear: nn.Linear, scales: LayerScales) -> None:
    assert scales.weight is not None
    rows, columns = linear.weight.shape
    shape = scales.weight.shape
    fits = shape in ((), (rows,)) or (
        len(shape) == 2 and shape[0] == rows and shape[1] > 0 and columns % shape[1] == 0
    )
    if not fits or (scales.pre_quant is not None and scales.pre_quant.shape != (columns,)):
        raise CheckpointError(
            f"{name}: expected scales for a weight of {[rows, columns]}, "
            f"found weight scales of shape {list(shape)}",
            f"calibrate this checkpoint: {CALIBRATE}",
        )


def _quantized_weight(
    linear: nn.Linear, precision: QuantizedPrecision, scales: LayerScales
) -> nn.Parameter:
    assert scales.weight is not None
    weight: Floats = linear.weight.detach().float().numpy(force=True)
    divided: Floats = weight if scales.pre_quant is None else weight / scales.pre_quant
    values = round_trip(divided, scales.weight, precision)
    return nn.Parameter(torch.from_numpy(values).to(linear.weight.device), requires_grad=False)

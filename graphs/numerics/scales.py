"""Holds the scales of layers, and says which layers have them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from trimode.formats.calibration import QuantizedPrecision, Scales
from trimode.formats.contract import DType
from trimode.graphs.checkpoint import expected_tensors
from trimode.graphs.config import ModelConfig
from trimode.graphs.numerics.integers import Floats, exact_scale, largest_magnitudes, round_to

BLOCK_PRECISIONS: tuple[QuantizedPrecision, ...] = ("int4", "nvfp4")
"""Those with a scale for each block of inputs."""
HEAD = "diffusion_head"
"""The output matrix, which is quantized only where it is asked for."""
KINDS = ("weight_amax", "input_amax", "pre_quant_scale")
"""How the names of a calibration's tensors end, behind the layer's."""
_AMAX = ".weight_amax"


@dataclass(frozen=True)
class LayerScales:
    """Holds the scales of one weight ``(out, in)``, float32 throughout.

    A scale is the number that one step of a quantized type stands for.

    Attributes:
        weight: Scales of the weight: ``()``, ``(out,)`` or, for int4, ``(out, in / block_size)``;
            for nvfp4 the global one. None = taken from the weight when it is read.
        input: Scale of the input, ``()``; None = the input stays as it is.
        pre_quant: Factors that multiply the input and divide the weight, ``(in,)``; None = there
            are none.
        block_size: Number of inputs that share a scale; None = all.
    """

    weight: Floats | None
    input: Floats | None = None
    pre_quant: Floats | None = None
    block_size: int | None = None

    @classmethod
    def from_amax(
        cls,
        precision: QuantizedPrecision,
        weight: Floats,
        input_: Floats | None = None,
        pre_quant: Floats | None = None,
        block_size: int | None = None,
    ) -> LayerScales:
        """Take the scales from largest magnitudes of weight and input."""
        return cls(
            exact_scale(weight, precision),
            None if input_ is None else exact_scale(input_, precision),
            pre_quant,
            block_size,
        )

    @classmethod
    def of_weight(
        cls, values: Floats, precision: QuantizedPrecision, block_size: int | None
    ) -> LayerScales:
        """Take the scales that round a weight ``(out, in)`` to nearest."""
        amax = largest_magnitudes(values, precision, block_size)
        return cls.from_amax(precision, amax, block_size=block_size)

    def rounded(self, precision: QuantizedPrecision, stored: DType) -> LayerScales:
        """Round the scales as a pack stores them.

        Those of nvfp4 stay float32.

        Raises:
            BuildError: a scale is too large for ``stored``.
        """
        kept: DType = "float32" if precision == "nvfp4" else stored
        return LayerScales(
            None if self.weight is None else round_to(self.weight, kept),
            None if self.input is None else round_to(self.input, kept),
            None if self.pre_quant is None else round_to(self.pre_quant, stored),
            self.block_size,
        )


def layer_scales(
    scales: Scales, precision: QuantizedPrecision, block_size: int | None = None
) -> dict[str, LayerScales]:
    """Group a calibration's largest magnitudes by layer, as exact scales.

    Args:
        scales: Tensors from :func:`trimode.formats.calibration.load_calibration`.
        precision: Type that the calibration is for.
        block_size: Number of inputs that share a scale; None = all.
    """
    names = [name.removesuffix(_AMAX) for name in scales if name.endswith(_AMAX)]
    return {
        name: LayerScales.from_amax(
            precision,
            scales[f"{name}{_AMAX}"],
            scales.get(f"{name}.input_amax"),
            scales.get(f"{name}.pre_quant_scale"),
            block_size if precision in BLOCK_PRECISIONS else None,
        )
        for name in names
    }


def linear_layers(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shapes ``(out, in)`` of the layers that can be quantized.

    These are all weights that hidden states are multiplied with, without the drafter's, in the
    model's order. The output matrix, :data:`HEAD`, is the last.
    """
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in expected_tensors(config).items()
        if len(shape) == 2 and "embed_tokens" not in name
    }


def linear_scales(
    scales: Scales,
    precision: QuantizedPrecision,
    stored: DType = "float32",
    leave_out: Container[str] = (),
) -> dict[str, LayerScales]:
    """Give a calibration's scales by layer, as a pack stores them.

    Args:
        scales: Tensors from :func:`trimode.formats.calibration.load_calibration`.
        precision: Type that the calibration is for.
        stored: Compute type of the bundle.
        leave_out: Layers that stay in high precision.

    Returns:
        Scales by layer, in alphabetical order.

    Raises:
        BuildError: a scale is too large for ``stored``.
    """
    layers = sorted(layer_scales(scales, precision).items())
    return {name: one.rounded(precision, stored) for name, one in layers if name not in leave_out}

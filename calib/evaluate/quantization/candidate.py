"""Quantizes a trunk, and counts the bytes of its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from trimode.calib.reference.fake_quant import quantize_trunk
from trimode.errors import UsageError
from trimode.formats.calibration import QuantizedPrecision, check_source, load_record
from trimode.formats.contract import DType
from trimode.formats.hints import CALIBRATE
from trimode.formats.safetensors import stored_bytes
from trimode.formats.texts import whole_text
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.numerics.integers import FORMATS, Floats
from trimode.graphs.numerics.nvfp4 import BLOCK_SIZE
from trimode.graphs.numerics.quantization import RTN, load_quantization
from trimode.graphs.numerics.scales import LayerScales

COMPUTE_TYPE: DType = "bfloat16"
"""Compute type of GPUs: the type of scales, and of weights that are not quantized."""

ROUNDED: dict[str, QuantizedPrecision] = {
    "rtn-int8": "int8",
    "rtn-int4": "int4",
    "rtn-nvfp4": "nvfp4",
}
"""Weights rounded to nearest, in the place of a calibration."""


@dataclass(frozen=True)
class Candidate:
    """Describes a way to quantize a checkpoint.

    Attributes:
        name: Name that the caller gave.
        precision: Type of the quantized weights.
        algorithm: Algorithm that found the scales.
        block_size: Inputs that share a scale; None if blocks are not used.
        layers: Scales of the layers to quantize, by the checkpoint's names without ``.weight``. If
            weights are rounded to nearest, they are taken from the weights.
        scales_sha256: Digest of the calibration's scales.
        source_sha256: Digest of the checkpoint that was calibrated.
    """

    name: str
    precision: QuantizedPrecision
    algorithm: str
    block_size: int | None
    layers: Mapping[str, LayerScales]
    scales_sha256: str | None = None
    source_sha256: str | None = None

    def check_source(self, sha256: str) -> None:
        """Raise :class:`CheckpointError` where another checkpoint was calibrated."""
        check_source(self.name, self.source_sha256, sha256)

    def linear_scales(
        self, trunk: TriModeTrunk, leave_out: Iterable[str] = ()
    ) -> dict[str, LayerScales]:
        """Return scales by layer, rounded to :data:`COMPUTE_TYPE` as a GPU's pack.

        Args:
            trunk: Trunk of the checkpoint, not quantized.
            leave_out: Layers that stay in high precision.

        Raises:
            BuildError: a scale is too large.
        """
        left = self.layers.keys() - set(leave_out)
        return {
            layer: self._known(trunk, layer).rounded(self.precision, COMPUTE_TYPE)
            for layer in sorted(left)
        }

    def _known(self, trunk: TriModeTrunk, layer: str) -> LayerScales:
        """Return a layer's scales, from its weights if none are known."""
        scales = self.layers[layer]
        if scales.weight is not None:
            return scales
        return LayerScales.of_weight(_weight_of(trunk, layer), self.precision, self.block_size)


def quantized_copy(
    trunk: TriModeTrunk, precision: QuantizedPrecision, layers: Mapping[str, LayerScales]
) -> TriModeTrunk:
    """Copy a trunk with these layers quantized; share the other weights.

    Raises:
        CheckpointError: the trunk has no such layer, or the scales do not fit its weight.
        BuildError: a weight is not finite.
    """
    shared = {id(tensor): tensor for tensor in chain(trunk.parameters(), trunk.buffers())}
    quantized = copy.deepcopy(trunk, shared)
    quantize_trunk(quantized, precision, layers)
    return quantized


def weight_bytes(
    checkpoint: Checkpoint,
    stored: DType,
    precision: QuantizedPrecision | None = None,
    layers: Mapping[str, LayerScales] | None = None,
) -> int:
    """Count the bytes that the weights take in a pack.

    These are codes, scales, and all else in ``stored``, without the position tables, which never
    change.

    Args:
        checkpoint: Checkpoint whose weights are counted.
        stored: Type of the scales and of the weights that are not quantized.
        precision: Type of the quantized weights; None = there are none.
        layers: Scales of the quantized layers, by name.
    """
    total = 0
    for name, entry in checkpoint.tensors.items():
        scales = (layers or {}).get(name.removesuffix(".weight"))
        if precision is None or scales is None:
            total += stored_bytes(stored, math.prod(entry.shape))
            continue
        total += stored_bytes(FORMATS[precision].dtype, math.prod(entry.shape)) + _scale_bytes(
            scales, entry.shape, stored, precision
        )
    return total


def _scale_bytes(
    scales: LayerScales, shape: tuple[int, ...], stored: DType, precision: QuantizedPrecision
) -> int:
    numbers = sum(
        values.size
        for values in (scales.weight, scales.input, scales.pre_quant)
        if values is not None
    )
    if precision != "nvfp4":
        return stored_bytes(stored, numbers)
    return stored_bytes("float32", numbers) + stored_bytes(
        "float8e4m3fn", math.prod(shape) // BLOCK_SIZE
    )


def _weight_of(trunk: TriModeTrunk, layer: str) -> Floats:
    return np.asarray(
        trunk.get_parameter(f"{layer}.weight").detach().float().numpy(force=True), np.float32
    )


def read_candidate(name: str, checkpoint: Checkpoint) -> Candidate:
    """Read a calibration folder, or a name of :data:`ROUNDED`.

    It is checked against the checkpoint as a build checks it.

    Raises:
        UsageError: a rounding that does not exist, or that the checkpoint's shapes rule out.
        CheckpointError: a calibration that cannot be read or does not fit the checkpoint's weights.
    """
    if name == RTN or (name.startswith(f"{RTN}-") and name not in ROUNDED):
        names = tuple(ROUNDED)
        found = (
            f"`calibrations`: expected a folder, {', '.join(names[:-1])} or {names[-1]}, "
            f"found {name}"
        )
        command = CALIBRATE.replace("PRECISION", "fp8")
        raise UsageError(found, f"fp8 quantizes inputs too, whose scales take data: {command}")
    if name in ROUNDED:
        quantization = load_quantization(RTN, ROUNDED[name], checkpoint)
    else:
        quantization = load_quantization(Path(name), load_record(Path(name)).precision, checkpoint)
    record = quantization.record
    return Candidate(
        whole_text(name),
        quantization.precision,
        record.algorithm,
        record.block_size,
        quantization.layers,
        record.scales_sha256,
        quantization.source_sha256,
    )

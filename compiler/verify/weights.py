"""Quantizes the checkpoint's weights by the bundle's scales.

The result is the reference of a quantized precision.

What the bundle holds of the weights themselves is not used: it is compared with what comes out,
number by number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trimode.calib.reference.fake_quant import quantize_trunk
from trimode.calib.reference.torch_session import load_trunk
from trimode.errors import BundleError, UsageError
from trimode.formats.calibration import QuantizedPrecision, load_calibration
from trimode.formats.contract import DType
from trimode.formats.hints import REBUILD
from trimode.formats.manifest import CalibrationRecord
from trimode.formats.verification import ScalesParity, WeightsParity
from trimode.graphs.checkpoint import Checkpoint, Read
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.numerics.integers import Floats, dequantize
from trimode.graphs.numerics.nvfp4 import decode
from trimode.graphs.numerics.scales import LayerScales, linear_scales
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.bundle.weights import PrecisionWeights

_RTN = "rtn"


def load_quantized_trunk(
    bundle: Bundle,
    precision: QuantizedPrecision,
    checkpoint: Checkpoint,
    read: Read,
    calibration: Path | None,
) -> tuple[TriModeTrunk, WeightsParity, ScalesParity | None]:
    """Load a checkpoint's trunk quantized by a bundle's scales.

    Also compares the bundle's weights with it, and the scales with their origin.

    Args:
        bundle: Bundle whose chosen precision is ``precision``.
        precision: Precision of linear layers.
        checkpoint: Checkpoint that the bundle was built from.
        read: Function that reads the checkpoint's tensors; each is read once, in order.
        calibration: Folder of the calibration that the bundle was built by; None compares only
            scales that are rounded to nearest.

    Raises:
        UsageError: ``calibration`` is another one.
        BundleError: a scale is no positive number.
        CheckpointError: the scales do not fit the checkpoint's layers, or the calibration cannot be
            read.
    """
    record = bundle.chosen.calibration
    assert record is not None
    given = _read_calibration(calibration, record, precision, bundle.manifest.dtype)
    weights = bundle.weights()
    layers = stored_scales(weights)
    trunk = load_trunk(
        checkpoint,
        bundle.manifest.model.num_positions,
        bundle.manifest.dtype,
        read,
        {f"{layer}.weight" for layer in layers},
    )
    if record.name == _RTN and record.scales_sha256 is None:
        given = nearest_scales(trunk, layers, precision, record.block_size, bundle.manifest.dtype)
    quantize_trunk(trunk, precision, layers)
    return (
        trunk,
        compare_weights(weights, layers, precision, trunk),
        None if given is None else compare_scales(layers, given, record.name),
    )


def stored_scales(weights: PrecisionWeights) -> dict[str, LayerScales]:
    """The scales of every quantized layer as the packs hold them.

    Raises:
        BundleError: one is no positive number.
    """

    def read(name: str) -> Floats | None:
        if name not in weights.entries:
            return None
        values = np.array(weights.widened(name))
        if not np.isfinite(values).all() or (values <= 0).any():
            raise BundleError(f"{name}: expected positive numbers, found others", REBUILD)
        return values

    layers = {}
    for name in weights.entries:
        layer, _, kind = name.rpartition(".")
        # of nvfp4 those of the blocks, which come from the weights: the global one is what is given
        if kind == "weight_scale":
            scale = read(f"{name}_2") if f"{name}_2" in weights.entries else read(name)
            assert scale is not None
            layers[layer] = LayerScales(
                scale, read(f"{layer}.input_scale"), read(f"{layer}.pre_quant_scale")
            )
    return layers


def nearest_scales(
    trunk: TriModeTrunk,
    layers: Mapping[str, LayerScales],
    precision: QuantizedPrecision,
    block_size: int | None,
    stored: DType,
) -> dict[str, LayerScales]:
    """The scales of rounding to nearest, from weights that are not quantized yet."""
    weights = {layer: trunk.get_parameter(f"{layer}.weight").numpy(force=True) for layer in layers}
    return {
        layer: LayerScales.of_weight(values, precision, block_size).rounded(precision, stored)
        for layer, values in weights.items()
    }


def compare_weights(
    weights: PrecisionWeights,
    layers: Mapping[str, LayerScales],
    precision: QuantizedPrecision,
    trunk: TriModeTrunk,
) -> WeightsParity:
    """What the packs' numbers stand for against the reference's weights, bit for bit."""
    differs: dict[str, int] = {}
    num_compared = 0
    for layer, scales in layers.items():
        expected = trunk.get_parameter(f"{layer}.weight").numpy(force=True)
        found = _held(weights, layer, scales, precision, expected.shape[0])
        num_compared += expected.size
        if num_other := int((found.view(np.int32) != expected.view(np.int32)).sum()):
            differs[layer] = num_other
    return WeightsParity(
        num_layers=len(layers), num_compared=num_compared, differs=differs, passed=not differs
    )


def _held(
    weights: PrecisionWeights,
    layer: str,
    scales: LayerScales,
    precision: QuantizedPrecision,
    rows: int,
) -> Floats:
    """What the packs' numbers of a layer stand for, ``(out, in)``."""
    assert scales.weight is not None
    raw = weights.raw(f"{layer}.weight").reshape(rows, -1)
    if precision == "nvfp4":
        return decode(raw, weights.raw(f"{layer}.weight_scale").reshape(rows, -1), scales.weight)
    return dequantize(raw, scales.weight, precision)


def compare_scales(
    layers: Mapping[str, LayerScales], given: Mapping[str, LayerScales], name: str
) -> ScalesParity:
    """The packs' scales against those of the calibration, bit for bit."""
    differs = []
    for layer in sorted({*layers, *given}):
        if layer not in layers or layer not in given:
            differs.append(layer)
            continue
        for kind in ("weight", "input", "pre_quant"):
            found, expected = getattr(layers[layer], kind), getattr(given[layer], kind)
            if (found is None) != (expected is None) or (
                found is not None and not np.array_equal(found, expected)
            ):
                differs.append(f"{layer}.{kind}_scale")
    return ScalesParity(
        calibration=name, num_layers=len(layers), differs=tuple(differs), passed=not differs
    )


def _read_calibration(
    folder: Path | None, record: CalibrationRecord, precision: QuantizedPrecision, stored: DType
) -> dict[str, LayerScales] | None:
    if folder is None:
        return None
    found, scales = load_calibration(folder)
    if found.scales_sha256 != record.scales_sha256:
        raise UsageError(
            f"{folder}: expected the calibration that the bundle was built by ({record.name}),"
            " found another",
            "pass that one, or leave `calibration` out",
        )
    return linear_scales(scales, precision, stored)

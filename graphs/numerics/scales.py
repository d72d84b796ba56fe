"""Finds which weights a build quantizes, and with which scales.

Scales come from a calibration, or from the weights alone (round to nearest).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trimode.errors import CheckpointError, UsageError
from trimode.formats.calibration import (
    SCALES,
    QuantizedPrecision,
    Scales,
    check_source,
    load_calibration,
)
from trimode.formats.hints import CALIBRATE
from trimode.formats.manifest import CalibrationRecord
from trimode.formats.texts import name_of
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.numerics.nvfp4 import BLOCK_SIZE

RTN: Literal["rtn"] = "rtn"
_RTN_BLOCK_SIZES = (128, 64, 32, 16)
BLOCK_PRECISIONS: tuple[QuantizedPrecision, ...] = ("int4", "nvfp4")
"""Those with a scale for each block of inputs."""
_KINDS = ("weight_amax", "input_amax", "pre_quant_scale")
_HEAD = "diffusion_head"
_MAKE_AGAIN = f"calibrate this checkpoint: {CALIBRATE}"


@dataclass(frozen=True)
class LayerScales:
    """What is known about one weight ``(out, in)``, float32 throughout.

    Attributes:
        weight_amax: ``()``, ``(out,)`` or ``(out, in / block_size)`` (int4); None = taken from the
        weight when it is read.
        block_size: inputs that share a scale; None = all.
        input_amax: ``()``; None = the input stays as it is.
        pre_quant_scale: ``(in,)``, which multiplies the input and divides the weight; None = there
            is none.
    """

    weight_amax: NDArray[np.float32] | None
    block_size: int | None = None
    input_amax: NDArray[np.float32] | None = None
    pre_quant_scale: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Quantization:
    """What to quantize.

    Attributes:
        layers: by the layer's name, without ``.weight``.
        record: for the manifest.
        source_sha256: base digest of the checkpoint that was calibrated; None = any will do.
    """

    precision: QuantizedPrecision
    layers: Mapping[str, LayerScales]
    record: CalibrationRecord
    source_sha256: str | None

    def check_source(self, sha256: str) -> None:
        """Raise :class:`CheckpointError` where other weights were calibrated.

        ``sha256`` is a base digest.
        """
        check_source(self.record.name, self.source_sha256, sha256)


def load_quantization(
    calibration: Path | Literal["rtn"] | None, precision: QuantizedPrecision, checkpoint: Checkpoint
) -> Quantization:
    """The scales for a build in ``precision``.

    Raises:
        UsageError: no calibration, one for another precision, or ``rtn`` for a type that needs
        data.
        CheckpointError: a calibration that cannot be read or does not fit the checkpoint's weights.
    """
    command = f"trimode calibrate CHECKPOINT --precision {precision} --data PROMPTS.jsonl -o CAL"
    if calibration is None:
        other = (
            ""
            if precision == "fp8"
            else "; or pass --calibration rtn to round the weights to nearest, without data"
        )
        raise UsageError(
            f"--precision {precision}: expected --calibration, found none",
            f"make one with `{command}`{other}",
        )
    if calibration == RTN:
        if precision == "fp8":
            raise UsageError(
                "--calibration rtn: expected --precision int8, int4 or nvfp4, found fp8",
                f"fp8 quantizes inputs too: run `{command}`",
            )
        return _round_to_nearest(precision, checkpoint)
    assert isinstance(calibration, Path)
    record, scales = load_calibration(calibration)
    if record.precision != precision:
        raise UsageError(
            f"{calibration}: expected a calibration for {precision}, "
            f"found one for {record.precision}",
            f"run `{command}`",
        )
    manifest = CalibrationRecord(
        name=name_of(calibration),
        algorithm=record.algorithm,
        block_size=record.block_size,
        scales_sha256=record.scales_sha256,
    )
    layers = _read_layers(scales, precision, record.block_size, checkpoint, calibration)
    return Quantization(precision, layers, manifest, record.source_sha256)


def _round_to_nearest(precision: QuantizedPrecision, checkpoint: Checkpoint) -> Quantization:
    """Choose every linear layer but the head.

    For int4 and nvfp4 their inputs have to divide into blocks, of int4 the largest that fit all.
    """
    shapes = {name: shape for name, shape in _linear_layers(checkpoint).items() if name != _HEAD}
    block_size = None
    if precision in BLOCK_PRECISIONS:
        sizes = _RTN_BLOCK_SIZES if precision == "int4" else (BLOCK_SIZE,)
        block_size = next(
            (size for size in sizes if all(shape[1] % size == 0 for shape in shapes.values())), None
        )
        if block_size is None:
            found = ", ".join(map(str, sorted({shape[1] for shape in shapes.values()})))
            raise UsageError(
                f"--precision {precision}: expected layers whose inputs are multiples of "
                f"{_RTN_BLOCK_SIZES[-1]}, found {found}",
                "pass --precision int8",
            )
    record = CalibrationRecord(name=RTN, algorithm=RTN, block_size=block_size, scales_sha256=None)
    return Quantization(
        precision, {name: LayerScales(None, block_size) for name in shapes}, record, None
    )


def _linear_layers(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that are multiplied with hidden states, without the adapter's."""
    return {
        name.removesuffix(".weight"): entry.shape
        for name, entry in checkpoint.tensors.items()
        if len(entry.shape) == 2 and "embed_tokens" not in name and ".lora_" not in name
    }


def _read_layers(
    scales: Scales,
    precision: QuantizedPrecision,
    block_size: int | None,
    checkpoint: Checkpoint,
    folder: Path,
) -> dict[str, LayerScales]:
    known = _linear_layers(checkpoint)
    layers: dict[str, LayerScales] = {}
    for name in scales:
        layer, _, kind = name.rpartition(".")
        if kind not in _KINDS or layer not in known:
            raise CheckpointError(
                f"{folder / SCALES}: expected scales of this checkpoint's linear layers, "
                f"found {name}",
                _MAKE_AGAIN,
            )
        layers.setdefault(
            layer, _layer_scales(scales, layer, known[layer], precision, block_size, folder)
        )
    if not layers:
        raise CheckpointError(
            f"{folder / SCALES}: expected the scales of at least one layer, found none", _MAKE_AGAIN
        )
    return layers


def _layer_scales(
    scales: Scales,
    layer: str,
    shape: tuple[int, ...],
    precision: QuantizedPrecision,
    block_size: int | None,
    folder: Path,
) -> LayerScales:
    rows, columns = shape
    wanted: dict[str, list[tuple[int, ...]]] = {
        "weight_amax": [(), (rows,)],
        "input_amax": [()],
        "pre_quant_scale": [(columns,)],
    }
    if precision == "nvfp4":
        if block_size != BLOCK_SIZE or columns % BLOCK_SIZE:
            raise CheckpointError(
                f"{folder}: expected {layer} to have inputs in blocks of {BLOCK_SIZE}, "
                f"found {columns} inputs and blocks of {block_size}",
                _MAKE_AGAIN,
            )
        wanted |= {"weight_amax": [()], "pre_quant_scale": []}
    if precision == "int4":
        if block_size is None or block_size % 2 or columns % block_size:
            raise CheckpointError(
                f"{folder}: expected {layer} to have inputs in whole blocks, "
                f"found {columns} inputs and blocks of {block_size}",
                "calibrate with a --block-size that is even and divides every layer's inputs",
            )
        wanted |= {"weight_amax": [(rows, columns // block_size)], "input_amax": []}
    found = {kind: scales.get(f"{layer}.{kind}") for kind in _KINDS}
    for kind, values in found.items():
        if (values is None and kind == "weight_amax") or (
            values is not None and values.shape not in wanted[kind]
        ):
            expected = " or ".join(str(list(one)) for one in wanted[kind]) or "nothing"
            what = "nothing" if values is None else str(list(values.shape))
            raise CheckpointError(
                f"{folder / SCALES}: expected {layer}.{kind} of shape {expected} "
                f"for a weight of {list(shape)} in {precision}, "
                f"found {what}",
                _MAKE_AGAIN,
            )
    return LayerScales(
        found["weight_amax"],
        block_size if precision in BLOCK_PRECISIONS else None,
        found["input_amax"],
        found["pre_quant_scale"],
    )

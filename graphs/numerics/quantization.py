"""Says what a build quantizes: which layers, with which scales.

Scales come from a calibration, or from the weights alone (round to nearest).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
from trimode.graphs.numerics.scales import (
    BLOCK_PRECISIONS,
    HEAD,
    KINDS,
    LayerScales,
    layer_scales,
    linear_layers,
)

RTN: Literal["rtn"] = "rtn"
_RTN_BLOCK_SIZES = (128, 64, 32, 16)
_MAKE_AGAIN = f"calibrate this checkpoint: {CALIBRATE}"


@dataclass(frozen=True)
class Quantization:
    """Says what to quantize.

    Attributes:
        precision: Type of the quantized weights.
        layers: Scales by the layer's name, without ``.weight``.
        record: Record of the calibration, for the manifest.
        source_sha256: Base digest of the checkpoint that was calibrated; None = any will do.
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
    calibration: Path | Literal["rtn"] | None,
    precision: QuantizedPrecision,
    checkpoint: Checkpoint,
    *,
    quantizes_head: bool = False,
) -> Quantization:
    """Read the scales for a build in ``precision``.

    ``quantizes_head`` lets ``rtn`` quantize the output head too.

    Raises:
        UsageError: no calibration, one for another precision, or ``rtn`` for a type that needs
            data.
        CheckpointError: the calibration cannot be read or does not fit the checkpoint's weights.
    """
    command = f"trimode calibrate CHECKPOINT --precision {precision} --data PROMPTS.jsonl -o CAL"
    if calibration is None:
        other = (
            ""
            if precision == "fp8"
            else "; or pass `calibration` rtn to round the weights to nearest, without data"
        )
        raise UsageError(
            f"`precision` {precision}: expected `calibration`, found none",
            f"make one with `{command}`{other}",
        )
    if calibration == RTN:
        if precision == "fp8":
            raise UsageError(
                "`calibration` rtn: expected `precision` int8, int4 or nvfp4, found fp8",
                f"fp8 quantizes inputs too: run `{command}`",
            )
        return _round_to_nearest(precision, checkpoint, quantizes_head=quantizes_head)
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


def _round_to_nearest(
    precision: QuantizedPrecision, checkpoint: Checkpoint, *, quantizes_head: bool
) -> Quantization:
    """Choose every linear layer, the head only where asked.

    For int4 and nvfp4 their inputs have to divide into blocks, of int4 the largest that fit all.
    """
    shapes = linear_layers(checkpoint.config)
    if not quantizes_head:
        del shapes[HEAD]
    block_size = None
    if precision in BLOCK_PRECISIONS:
        sizes = _RTN_BLOCK_SIZES if precision == "int4" else (BLOCK_SIZE,)
        block_size = next(
            (size for size in sizes if all(shape[1] % size == 0 for shape in shapes.values())), None
        )
        if block_size is None:
            found = ", ".join(map(str, sorted({shape[1] for shape in shapes.values()})))
            raise UsageError(
                f"`precision` {precision}: expected layers whose inputs are multiples of "
                f"{_RTN_BLOCK_SIZES[-1]}, found {found}",
                "pass `precision` int8",
            )
    record = CalibrationRecord(
        name=RTN,
        algorithm=RTN,
        block_size=block_size,
        scales_sha256=None,
        quantizes_head=quantizes_head,
    )
    return Quantization(
        precision, {name: LayerScales(None, block_size=block_size) for name in shapes}, record, None
    )


def _read_layers(
    scales: Scales,
    precision: QuantizedPrecision,
    block_size: int | None,
    checkpoint: Checkpoint,
    folder: Path,
) -> dict[str, LayerScales]:
    known = linear_layers(checkpoint.config)
    for name in scales:
        layer, _, kind = name.rpartition(".")
        if kind not in KINDS or layer not in known:
            raise CheckpointError(
                f"{folder / SCALES}: expected scales of this checkpoint's linear layers, "
                f"found {name}",
                _MAKE_AGAIN,
            )
        _check_shapes(scales, layer, known[layer], precision, block_size, folder)
    if not scales:
        raise CheckpointError(
            f"{folder / SCALES}: expected the scales of at least one layer, found none", _MAKE_AGAIN
        )
    return layer_scales(scales, precision, block_size)


def _check_shapes(
    scales: Scales,
    layer: str,
    shape: tuple[int, ...],
    precision: QuantizedPrecision,
    block_size: int | None,
    folder: Path,
) -> None:
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
                "calibrate with an even block size that divides every layer's inputs",
            )
        wanted |= {"weight_amax": [(rows, columns // block_size)], "input_amax": []}
    found = {kind: scales.get(f"{layer}.{kind}") for kind in KINDS}
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

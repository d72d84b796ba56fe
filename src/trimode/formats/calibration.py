"""Reads and writes calibrations for the compiler.

A calibration is a folder with ``calibration.json`` and ``scales.safetensors``.

For each quantized linear layer, named as in the checkpoint without ``.weight``
(``encoder.layers.0.mlp.gate_proj``), float32 tensors:

==================== ============================================
========================================================== ``.weight_amax``     ``()``, ``(out,)``
or ``(out, in / block)``  largest magnitude that the weight's quantized type represents
``.input_amax``      ``()``                                       the same of the layer's input; not
int4 ``.pre_quant_scale`` ``(in,)``                                    optional: the input is
multiplied by it, each weight row divided ====================
============================================
==========================================================

The arithmetic that follows from it, with ``w = weight / pre_quant_scale`` and ``x = input *
pre_quant_scale``:

- fp8: ``s = amax / 448``, ``q = e4m3(w / s)`` to nearest even, saturating; weights and inputs
- int8: ``s = amax / 127``, ``q = clip(rint(w / s), -127, 127)``; weights and inputs, but that an
  input beyond its amax may become -128, where ONNX's QuantizeLinear saturates
- int4: ``s = amax / 7``, one for each row and block of ``block_size`` inputs, ``q = clip(rint(w /
  s), -8, 7)``; weights only
- nvfp4: ``g = amax / 2688``, for each row and block of 16 inputs ``s = e4m3(amax of the block / (6
  g))``, ``q = e2m1(w / (s g))``; weights, and inputs, whose block scales are taken anew in every
  forward: see :mod:`trimode.graphs.numerics.nvfp4`

A scale, but those of nvfp4, is rounded to the type that the graph computes in before anything is
divided by it. A layer that is not named stays in high precision.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from trimode.errors import CheckpointError
from trimode.formats.contract import Role
from trimode.formats.files import staged_replacement
from trimode.formats.hints import CALIBRATE
from trimode.formats.record import OtherVersion, Record, read_record
from trimode.formats.texts import Unreadable, read_bytes, reason_of

SCHEMA_VERSION = 2
"""2 added ``sensitivity``; version 1 is read as it was."""
READABLE_VERSIONS = (1, 2)
RECORD = "calibration.json"
SCALES = "scales.safetensors"
QuantizedPrecision = Literal["fp8", "int8", "int4", "nvfp4"]
_HINT = f"make one with {CALIBRATE}"
Scales = dict[str, NDArray[np.float32]]


class CalibrationDataRecord(Record):
    """The texts that were run.

    Attributes:
        sha256: Digest of the data file.
        num_tokens: rows that the layers saw, by mode.
    """

    sha256: str
    num_samples: int
    seed: int
    num_tokens: dict[Role, int]


class LayerRecord(Record):
    """Statistics of one quantized layer, for people; ``input_amax`` as seen in each mode alone."""

    input_amax: dict[str, float]
    weight_snr_db: float


class SensitivityRecord(Record):
    """Holds the decisions of a sensitivity search, and its measurements.

    Attributes:
        kept: layers without scales, the most sensitive first.
        ranking: every layer that could be quantized, the most sensitive first; see
        :func:`trimode.calib.evaluate.quantization.sensitivity.rank_layers`.
        max_drop: most points that a mode's exact match may lose.
        drops: points that it loses with ``kept`` in high precision, by mode; negative where it
        gains.
        drops_if_none_kept: the same with every layer quantized.
        data: Prompts that were answered; ``num_tokens`` counts the rows that ranked the
        layers.
        max_new_tokens: Most tokens of each answer.
        scales_sha256: Digest of the scales that the search began with.
    """

    kept: tuple[str, ...]
    ranking: dict[str, float]
    max_drop: float
    drops: dict[str, float]
    drops_if_none_kept: dict[str, float]
    data: CalibrationDataRecord
    max_new_tokens: int
    scales_sha256: str


class Calibration(Record):
    """The contents of ``calibration.json``.

    Attributes:
        algorithm: ModelOpt's name of it, or ``rtn``; with ``+sensitivity`` where layers were left
        out by a search.
        block_size: inputs that share a scale; None where blocks are not used.
        source_sha256: digest of the checkpoint without its adapter,
        :meth:`trimode.graphs.identity.SourceDigest.base_hexdigest`.
        scales_sha256: Digest of ``scales.safetensors``.
        sensitivity: Record of the search that left layers out, if any.
    """

    schema_version: int
    trimode_version: str
    precision: QuantizedPrecision
    algorithm: str
    block_size: int | None
    source_name: str
    source_sha256: str
    scales_sha256: str
    data: CalibrationDataRecord | None
    layers: dict[str, LayerRecord]
    libraries: dict[str, str]
    sensitivity: SensitivityRecord | None = None


class ScalesRecord(Record):
    """The calibration that weights were quantized with, as what was made of them names it."""

    name: str
    precision: QuantizedPrecision
    scales_sha256: str


class PromptsRecord(Record):
    """The prompts of a training: the digest of their file, and how many of them each part has."""

    sha256: str
    num_train: int
    num_validation: int
    num_held_out: int


def save_calibration(folder: Path, calibration: Calibration, scales: Scales) -> None:
    """Write both files, all or nothing; fill in ``scales_sha256``.

    Replaces an earlier calibration in ``folder``.
    """
    with staged_replacement(folder, RECORD) as staged:
        data = save(scales)
        (staged / SCALES).write_bytes(data)  # save_file hides what the system says of a full disk
        digest = hashlib.sha256(data).hexdigest()
        record = calibration.model_copy(update={"scales_sha256": digest})
        (staged / RECORD).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_record(folder: Path) -> Calibration:
    """Read ``calibration.json`` without the scales.

    Raises:
        CheckpointError: missing, damaged or of another schema.
    """
    try:
        return read_record(folder / RECORD, Calibration, READABLE_VERSIONS)
    except OtherVersion as error:
        raise CheckpointError(
            f"{folder}: {error.reason.replace('expected', 'expected a calibration of', 1)}", _HINT
        ) from error
    except Unreadable as error:
        raise _no_calibration(folder / RECORD, error) from error


def load_calibration(folder: Path) -> tuple[Calibration, Scales]:
    """Read a calibration.

    Raises:
        CheckpointError: missing, damaged, of another schema, or with scales that are not finite and
            positive.
    """
    record = load_record(folder)
    scales, digest = _read_scales(folder / SCALES)
    if digest != record.scales_sha256:
        raise CheckpointError(
            f"{folder / SCALES}: expected the file that {RECORD} describes, found another", _HINT
        )
    for name, values in scales.items():
        if values.dtype != np.float32 or not np.isfinite(values).all() or (values <= 0).any():
            raise CheckpointError(
                f"{folder / SCALES}: expected {name} to be positive float32 numbers, found "
                f"{values.dtype} with others",
                _HINT,
            )
    return record, scales


def check_source(name: str, calibrated_sha256: str | None, sha256: str) -> None:
    """Raise :class:`CheckpointError` where a calibration is of another checkpoint.

    Args:
        name: Name of the calibration, for the message.
        calibrated_sha256: digest of the checkpoint that was calibrated; None = any will do.
        sha256: digest of the checkpoint at hand.
    """
    if calibrated_sha256 not in (None, sha256):
        raise CheckpointError(
            f"{name}: expected a calibration of this checkpoint ({sha256[:16]}…), found one "
            "of another "
            f"({(calibrated_sha256 or '')[:16]}…)",
            f"calibrate this checkpoint: {CALIBRATE}",
        )


def _read_scales(file: Path) -> tuple[Scales, str]:
    """The tensors by name, in alphabetical order, and the file's digest."""
    try:
        data = read_bytes(file)
        # the library gives them in any order
        return dict(sorted(load(data).items())), hashlib.sha256(data).hexdigest()
    except Unreadable as error:
        raise _no_calibration(file, error) from error
    except (
        SafetensorError,
        ValueError,
        LookupError,
        TypeError,
    ) as error:  # the library does not know every type
        raise _no_calibration(file, Unreadable(reason_of(error))) from error


def _no_calibration(file: Path, error: Unreadable) -> CheckpointError:
    if error.is_missing:
        return CheckpointError(
            f"{file.parent}: expected a calibration with {RECORD} and {SCALES}, found none", _HINT
        )
    return CheckpointError(
        f"{file}: expected a calibration that can be read, found: {error.reason}", _HINT
    )

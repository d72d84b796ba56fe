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
from trimode.formats.contract import GraphName
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
    """Names the texts that were run.

    Attributes:
        sha256: Digest of the data file.
        num_samples: Number of texts drawn from it.
        seed: Seed of the draw.
        num_tokens: Number of tokens that the layers saw, by graph.
    """

    sha256: str
    num_samples: int
    seed: int
    num_tokens: dict[GraphName, int]


class LayerRecord(Record):
    """Holds statistics of one quantized layer, for people.

    Attributes:
        input_amax: Largest magnitude of the input, by mode, each as seen in that mode alone.
        weight_snr_db: Signal-to-noise ratio of the quantized weight, in decibels.
    """

    input_amax: dict[str, float]
    weight_snr_db: float


class SensitivityRecord(Record):
    """Holds the decisions of a sensitivity search, and its measurements.

    Attributes:
        kept: Layers without scales, the most sensitive first.
        ranking: Score of every layer that could be quantized, the most sensitive first; see
            :func:`trimode.calib.evaluate.quantization.sensitivity.rank_layers`.
        max_drop: Limit on the points of exact match that a mode may lose.
        drops: Points that a mode loses with ``kept`` in high precision; negative where it gains.
        drops_if_none_kept: Points that a mode loses with every layer quantized.
        data: Prompts that were answered; ``num_tokens`` counts the tokens that ranked the layers.
        max_new_tokens: Limit on the tokens of each answer.
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
    """Holds the contents of ``calibration.json``.

    Attributes:
        schema_version: Version of this schema.
        trimode_version: Version of the library that wrote the file.
        precision: Type that the layers are quantized to.
        algorithm: ModelOpt's name of the algorithm, or ``rtn``; ``+sensitivity`` is added where a
            search left layers out.
        block_size: Number of inputs that share a scale; None without blocks.
        source_name: Name of the checkpoint's folder.
        source_sha256: Digest of the checkpoint without its adapter,
            :meth:`trimode.graphs.identity.SourceDigest.base_hexdigest`.
        scales_sha256: Digest of ``scales.safetensors``.
        data: Texts that were run; None where none were needed.
        layers: Statistics of the quantized layers, by name.
        libraries: Versions of the libraries that took part.
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
    """Names the calibration that weights were quantized with."""

    name: str
    precision: QuantizedPrecision
    scales_sha256: str


class PromptsRecord(Record):
    """Counts the prompts of a training.

    Attributes:
        sha256: Digest of the file of prompts.
        num_train: Number of prompts to train on.
        num_validation: Number of prompts that decide what is kept.
        num_held_out: Number of prompts that the result is measured on.
    """

    sha256: str
    num_train: int
    num_validation: int
    num_held_out: int


def save_calibration(folder: Path, calibration: Calibration, scales: Scales) -> None:
    """Write both files, all or nothing, over an earlier calibration.

    Args:
        folder: Folder to write.
        calibration: Record to write; ``scales_sha256`` is filled in.
        scales: Tensors to write.
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
        CheckpointError: it is missing, damaged or of another schema.
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
    """Read a calibration and its scales.

    Raises:
        CheckpointError: it is missing, damaged or of another schema, or a scale is not finite and
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
    """Refuse a calibration of another checkpoint.

    Args:
        name: Name of the calibration, for the message.
        calibrated_sha256: Digest of the checkpoint that was calibrated; None = any will do.
        sha256: Digest of the checkpoint at hand.

    Raises:
        CheckpointError: the digests differ.
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

"""Plans a build whose calibration is not there yet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trimode.compiler.options import BuildOptions
from trimode.compiler.plan import BuildPlan, make_plan
from trimode.compiler.targets import choose_precision, resolve_targets
from trimode.formats.manifest import CalibrationRecord
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.numerics.quantization import RTN, Quantization
from trimode.graphs.numerics.scales import HEAD, LayerScales, linear_layers


def plan_uncalibrated(checkpoint: Checkpoint, options: BuildOptions) -> BuildPlan:
    """Plan a build, and assume a calibration where there is none.

    Then all linear layers but the head are quantized. That is what a calibration quantizes unless
    it is told otherwise. Rounding to nearest stands for it; for fp8, one scale a tensor for weights
    and inputs.

    Raises:
        UsageError: an option is out of range, or a target cannot run the precision.
        CheckpointError: the calibration cannot be read or does not fit the checkpoint.
    """
    if options.calibration is not None or options.precision not in ("fp8", "int8", "int4", "nvfp4"):
        return make_plan(checkpoint, options)
    if options.precision != "fp8":
        return make_plan(checkpoint, replace(options, calibration=RTN))
    choose_precision("fp8", resolve_targets(options.targets))
    dense = make_plan(checkpoint, replace(options, precision=None))  # engines differ in scales only
    quantization = _assumed_fp8(checkpoint)
    return replace(dense, options=options, precision="fp8", quantization=quantization)


def _assumed_fp8(checkpoint: Checkpoint) -> Quantization:
    one = LayerScales(np.ones((), np.float32), np.ones((), np.float32))
    layers = {name: one for name in linear_layers(checkpoint.config) if name != HEAD}
    record = CalibrationRecord(
        name="assumed", algorithm="max", block_size=None, scales_sha256="0" * 64
    )
    return Quantization("fp8", layers, record, None)

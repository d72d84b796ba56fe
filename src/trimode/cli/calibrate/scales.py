"""``trimode calibrate``: prompts through a checkpoint to scales, and what to say about it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trimode.cli.options import calibrate as options
from trimode.cli.options.shared import (
    CheckpointPath,
    Device,
    Json,
    Raw,
    System,
    Thinking,
    usual_style,
)
from trimode.cli.parse import need
from trimode.cli.prompt_options import prompt_style

if TYPE_CHECKING:
    from trimode.formats.calibration import Calibration, QuantizedPrecision
    from trimode.formats.contract import Role
    from trimode.runtime.text.prompts import PromptStyle


def scales(
    checkpoint: CheckpointPath,
    *,
    output: options.CalibrationOutput,
    precision: options.ScalesPrecision,
    data: options.Prompts,
    samples: options.Samples = None,
    modes: options.Graphs = "ar,draft,verify",
    max_new_tokens: options.DecodedTokens = 128,
    seed: options.SamplingSeed = 0,
    block_size: options.BlockSize = None,
    per_channel: options.PerChannel = False,
    quantize_head: options.QuantizeHead = False,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    memory: options.Memory = None,
    resume: options.ScalesResume = False,
    as_json: Json = False,
) -> None:
    """Find the scales for a quantized build, from prompts answered in every mode."""
    need("calibration", "compile", "torch", "safetensors", "ml_dtypes")
    need("calibration", "calib", "modelopt", "requests")
    request = CalibrateRequest(
        precision=precision,
        data=data,
        num_samples=samples,
        modes=modes,
        max_new_tokens=max_new_tokens,
        seed=seed,
        block_size=block_size,
        is_per_channel=per_channel,
        quantizes_head=quantize_head,
        device=device,
        as_json=as_json,
        memory_gib=memory,
        resume=resume,
        style=prompt_style(raw, system, enable_thinking),
    )
    run_calibrate(checkpoint, output, request)


@dataclass(frozen=True)
class CalibrateRequest:
    """Holds what a user asks of ``trimode calibrate scales``."""

    precision: str
    data: Path
    num_samples: int | None
    modes: str
    max_new_tokens: int
    seed: int
    block_size: int | None
    is_per_channel: bool
    quantizes_head: bool
    device: str
    as_json: bool
    memory_gib: float | None = None
    resume: bool = False
    style: PromptStyle = field(default_factory=usual_style)


def run_calibrate(checkpoint_path: Path, output: Path, request: CalibrateRequest) -> None:
    """Calibrate with progress on stderr; report there or as JSON on stdout.

    ``output`` is written whole or not at all.
    """
    from trimode.calib.scales.job import calibrate, check_output
    from trimode.calib.scales.settings import QuantizeSettings
    from trimode.calib.scales.work_folder import check_work_folder, work_folder_of
    from trimode.cli.console import RichProgress
    from trimode.cli.output import print_json
    from trimode.formats.files import check_apart, sha256_of
    from trimode.graphs.checkpoint import describe_model, open_checkpoint
    from trimode.runtime.text.codec import TextCodec
    from trimode.runtime.text.prompts import encode_prompts, read_prompts_file

    settings = QuantizeSettings(
        precision=cast("QuantizedPrecision", request.precision),
        modes=cast(
            "tuple[Role, ...]",
            tuple(part.strip() for part in request.modes.split(",") if part.strip()),
        ),
        num_samples=request.num_samples,
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
        block_size=request.block_size,
        is_per_channel=request.is_per_channel,
        quantizes_head=request.quantizes_head,
        device=request.device,
        memory_gib=request.memory_gib,
    )
    settings.check()
    request.style.check()
    check_output(output)
    check_apart(output, checkpoint_path, request.data)
    check_work_folder(work_folder_of(output), resume=request.resume)
    checkpoint = open_checkpoint(checkpoint_path)
    model, prompts = describe_model(checkpoint), read_prompts_file(request.data, request.style)
    texts = encode_prompts(request.data, prompts, cache(partial(TextCodec, checkpoint_path)), model)
    data_sha256 = sha256_of(request.data)
    try:
        with RichProgress() as progress:
            calibration = calibrate(
                checkpoint,
                model,
                texts,
                data_sha256,
                output,
                settings,
                progress,
                resume=request.resume,
            )
    except KeyboardInterrupt:
        if work_folder_of(output).exists():
            sys.stderr.write(
                "interrupted; repeat the command with --resume to go on, the work so far is "
                f"in {work_folder_of(output)}\n"
            )
        raise
    if request.as_json:
        print_json(_as_data(output, calibration))
    sys.stderr.write(_in_words(output, calibration) + "\n")


def _as_data(output: Path, calibration: Calibration) -> dict[str, Any]:
    assert calibration.data is not None
    return {
        "calibration": str(output),
        "precision": calibration.precision,
        "algorithm": calibration.algorithm,
        "block_size": calibration.block_size,
        "num_layers": len(calibration.layers),
        "num_samples": calibration.data.num_samples,
        "num_tokens": calibration.data.num_tokens,
        "worst_weight_snr_db": min(layer.weight_snr_db for layer in calibration.layers.values()),
    }


def _in_words(output: Path, calibration: Calibration) -> str:
    assert calibration.data is not None
    rows = ", ".join(f"{count} {role}" for role, count in calibration.data.num_tokens.items())
    worst = min(calibration.layers, key=lambda name: calibration.layers[name].weight_snr_db)
    return (
        f"wrote {output}: {calibration.precision} ({calibration.algorithm}) scales of "
        f"{len(calibration.layers)} layers "
        f"from {calibration.data.num_samples} prompts ({rows} rows); lowest weight SNR "
        f"{calibration.layers[worst].weight_snr_db:.1f} dB, {worst}"
    )

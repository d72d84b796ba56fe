"""Implements ``trimode calibrate scales``."""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trimode.cli.calibrate.training import says_how_to_resume
from trimode.cli.flags import flags_in_errors
from trimode.cli.options import calibrate as options
from trimode.cli.options.shared import CheckpointPath, Device, Json, Raw, System, Thinking
from trimode.cli.parse import need, parse_names
from trimode.cli.prompt_options import prompt_style

if TYPE_CHECKING:
    from trimode.calib.scales.settings import QuantizeSettings
    from trimode.formats.calibration import Calibration, QuantizedPrecision
    from trimode.formats.contract import GraphName
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
    """Find the scales for a quantized build.

    The model answers the prompts in every mode.
    """
    need("calibration", "compile", "torch", "safetensors", "ml_dtypes")
    need("calibration", "calib", "modelopt", "requests")
    from trimode.calib.scales.settings import QuantizeSettings

    settings = QuantizeSettings(
        precision=cast("QuantizedPrecision", precision),  # its check refuses any other
        modes=cast("tuple[GraphName, ...]", parse_names(modes)),
        num_samples=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        block_size=block_size,
        is_per_channel=per_channel,
        quantizes_head=quantize_head,
        device=device,
        memory_gib=memory,
    )
    run_calibrate(
        checkpoint,
        output,
        data,
        settings,
        style=prompt_style(raw, system, enable_thinking),
        resume=resume,
        as_json=as_json,
    )


def run_calibrate(
    checkpoint_path: Path,
    output: Path,
    data: Path,
    settings: QuantizeSettings,
    *,
    style: PromptStyle,
    resume: bool = False,
    as_json: bool = False,
) -> None:
    """Calibrate with progress on stderr; report there or as JSON on stdout.

    ``output`` is written whole or not at all.
    """
    from trimode.cli.output import print_json

    with flags_in_errors():
        calibration = _calibrate(checkpoint_path, output, data, settings, style, resume=resume)
    if as_json:
        print_json(_as_data(output, calibration))
    sys.stderr.write(_in_words(output, calibration) + "\n")


def _calibrate(
    checkpoint_path: Path,
    output: Path,
    data: Path,
    settings: QuantizeSettings,
    style: PromptStyle,
    *,
    resume: bool,
) -> Calibration:
    from trimode.calib.data.prompts import Prompts
    from trimode.calib.scales.job import CALIBRATION, ScalesJob
    from trimode.cli.console import RichProgress
    from trimode.formats.files import sha256_of
    from trimode.graphs.checkpoint import describe_model, open_checkpoint
    from trimode.runtime.text.codec import TextCodec
    from trimode.runtime.text.prompts import encode_prompts, read_prompts_file

    settings.check()
    style.check()
    CALIBRATION.check_run(output, checkpoint_path, data, resume=resume)
    checkpoint = open_checkpoint(checkpoint_path)
    model, codec = describe_model(checkpoint), cache(partial(TextCodec, checkpoint_path))
    texts = encode_prompts(data, read_prompts_file(data, style), codec, model)
    prompts = Prompts(texts, sha256_of(data))
    with says_how_to_resume(CALIBRATION, output), RichProgress() as progress:
        return ScalesJob(
            checkpoint, model, prompts, output, settings, progress, resume=resume
        ).run()


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
    rows = ", ".join(
        f"{count} {graph_name}" for graph_name, count in calibration.data.num_tokens.items()
    )
    worst = min(calibration.layers, key=lambda name: calibration.layers[name].weight_snr_db)
    return (
        f"wrote {output}: {calibration.precision} ({calibration.algorithm}) scales of "
        f"{len(calibration.layers)} layers "
        f"from {calibration.data.num_samples} prompts ({rows} rows); lowest weight SNR "
        f"{calibration.layers[worst].weight_snr_db:.1f} dB, {worst}"
    )

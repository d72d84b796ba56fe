"""Implements ``trimode calibrate sensitivity``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimode.cli.calibrate.questions import Inputs, read_inputs
from trimode.cli.flags import flags_in_errors
from trimode.cli.options import calibrate as options
from trimode.cli.options.shared import CheckpointPath, Device, Json, Raw, System, Thinking
from trimode.cli.parse import need, parse_modes
from trimode.cli.prompt_options import prompt_style

if TYPE_CHECKING:
    from trimode.calib.evaluate.quantization.questions import QualitySettings
    from trimode.calib.evaluate.quantization.sensitivity import DropLimit
    from trimode.formats.calibration import SensitivityRecord
    from trimode.runtime.text.prompts import PromptStyle


def sensitivity(
    checkpoint: CheckpointPath,
    *,
    output: options.CalibrationOutput,
    calibration: options.BaseCalibration,
    data: options.Questions,
    max_drop: options.MaxDrop,
    samples: options.Samples = None,
    ranking_samples: options.RankingSamples = 8,
    modes: options.BudgetModes = "ar,diffusion,linear-spec",
    max_new_tokens: options.DecodedTokens = 128,
    seed: options.SamplingSeed = 0,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Keep the most sensitive layers in high precision, within a budget."""
    need("the sensitivity search", "compile", "torch", "safetensors", "ml_dtypes")
    from trimode.calib.evaluate.quantization.questions import QualitySettings
    from trimode.calib.evaluate.quantization.sensitivity import DropLimit

    run_sensitivity(
        checkpoint,
        output,
        data,
        calibration,
        DropLimit(max_drop, ranking_samples),
        QualitySettings(parse_modes(modes), samples, max_new_tokens, seed, device),
        style=prompt_style(raw, system, enable_thinking),
        as_json=as_json,
    )


def run_sensitivity(
    checkpoint_path: Path,
    output: Path,
    data: Path,
    calibration_path: Path,
    limit: DropLimit,
    settings: QualitySettings,
    *,
    style: PromptStyle,
    as_json: bool = False,
) -> None:
    """Search, write the calibration, and name the kept layers.

    Errors are raised before anything is written.
    """
    from trimode.calib.evaluate.quantization.sensitivity import save_without
    from trimode.calib.scales.job import CALIBRATION
    from trimode.cli.output import print_json
    from trimode.formats.calibration import load_calibration
    from trimode.formats.files import check_apart

    with flags_in_errors():
        settings.check()
        style.check()
        limit.check()
        CALIBRATION.check(output)
        check_apart(output, checkpoint_path, data)
        calibration, scales = load_calibration(calibration_path)
        inputs = read_inputs(checkpoint_path, [str(calibration_path)], data, style)
        found = _search(inputs, limit, settings)
    record = save_without(output, calibration, scales, found)
    if as_json:
        print_json(_as_data(output, record.algorithm, found))
    else:
        sys.stdout.write("".join(f"{name}\n" for name in found.kept))
    sys.stderr.write(_in_words(output, found) + "\n")


def _search(inputs: Inputs, limit: DropLimit, settings: QualitySettings) -> SensitivityRecord:
    from trimode.calib.evaluate.quantization.sensitivity import search
    from trimode.cli.console import RichProgress

    with RichProgress() as progress:
        return search(
            inputs.checkpoint,
            inputs.model,
            inputs.candidates[0],
            inputs.questions,
            inputs.sha256,
            limit,
            settings,
            progress=progress,
            to_text=inputs.to_text,
        )


def _as_data(output: Path, algorithm: str, found: SensitivityRecord) -> dict[str, Any]:
    return {"calibration": str(output), "algorithm": algorithm, **found.model_dump(mode="json")}


def _in_words(output: Path, found: SensitivityRecord) -> str:
    count = found.data.num_samples
    words = (
        f"wrote {output}: {len(found.kept)} of {len(found.ranking)} layers stay in high "
        f"precision; over {count} questions exact match drops by "
        f"{_points(found.drops)} points, {_points(found.drops_if_none_kept)} with every layer "
        "quantized"
    )
    if 0 < found.max_drop < 100 / count:
        words += (
            f"\nnote: one of {count} questions is {100 / count:.2g} points, so a budget of "
            f"{found.max_drop:g} allows none to be lost"
        )
    return words


def _points(drops: dict[str, float]) -> str:
    return ", ".join(f"{drop:.2g} ({mode})" for mode, drop in drops.items())

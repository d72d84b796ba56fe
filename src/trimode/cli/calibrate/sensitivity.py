"""``trimode calibrate sensitivity``: keeps the worst layers in high precision."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from trimode.cli.parse import need, parse_modes
from trimode.cli.prompt_options import prompt_style

if TYPE_CHECKING:
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
    """Keep the most sensitive layers in high precision, to stay within a budget."""
    need("the sensitivity search", "compile", "torch", "safetensors", "ml_dtypes")
    request = SensitivityRequest(
        calibration=calibration,
        data=data,
        max_drop=max_drop,
        num_samples=samples,
        ranking_samples=ranking_samples,
        modes=modes,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device,
        as_json=as_json,
        style=prompt_style(raw, system, enable_thinking),
    )
    run_sensitivity(checkpoint, output, request)


@dataclass(frozen=True)
class SensitivityRequest:
    """Holds what a user asks of ``trimode calibrate sensitivity``."""

    calibration: Path
    data: Path
    max_drop: float
    num_samples: int | None
    ranking_samples: int
    modes: str
    max_new_tokens: int
    seed: int
    device: str
    as_json: bool
    style: PromptStyle = field(default_factory=usual_style)


def run_sensitivity(checkpoint_path: Path, output: Path, request: SensitivityRequest) -> None:
    """Search, write the calibration, and name the kept layers.

    Errors are raised before anything is written.
    """
    from trimode.calib.evaluate.quantization.candidate import read_candidate
    from trimode.calib.evaluate.quantization.questions import QualitySettings, read_questions
    from trimode.calib.evaluate.quantization.sensitivity import DropLimit, save_without, search
    from trimode.calib.scales.job import check_output
    from trimode.cli.console import RichProgress
    from trimode.cli.output import print_json
    from trimode.formats.calibration import load_calibration
    from trimode.formats.files import check_apart, sha256_of
    from trimode.graphs.checkpoint import describe_model, open_checkpoint

    settings = QualitySettings(
        parse_modes(request.modes),
        request.num_samples,
        request.max_new_tokens,
        request.seed,
        request.device,
    )
    budget = DropLimit(request.max_drop, request.ranking_samples)
    settings.check()
    request.style.check()
    budget.check()
    check_output(output)
    check_apart(output, checkpoint_path, request.data)
    checkpoint = open_checkpoint(checkpoint_path)
    calibration, scales = load_calibration(request.calibration)
    candidate = read_candidate(str(request.calibration), checkpoint)
    model = describe_model(checkpoint)
    questions, to_text = read_questions(request.data, request.style, checkpoint_path, model)
    with RichProgress() as progress:
        sha256 = sha256_of(request.data)
        found = search(
            checkpoint,
            model,
            candidate,
            questions,
            sha256,
            budget,
            settings,
            progress=progress,
            to_text=to_text,
        )
    record = save_without(output, calibration, scales, found)
    if request.as_json:
        print_json(_as_data(output, record.algorithm, found))
    else:
        sys.stdout.write("".join(f"{name}\n" for name in found.kept))
    sys.stderr.write(_in_words(output, found) + "\n")


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

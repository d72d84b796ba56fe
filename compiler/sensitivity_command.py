"""``trimode calibrate sensitivity``: a calibration and a budget in; a calibration that leaves the worst layers in high precision out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.calib.quality.questions import QualitySettings
from trimode.calib.quality.sensitivity import Budget, save_without, search
from trimode.calib.quantize.job import check_output
from trimode.compiler.console import RichProgress
from trimode.compiler.output import print_json
from trimode.compiler.plan import describe_model
from trimode.compiler.report_command import parse_modes, read_candidate, read_questions
from trimode.files import check_apart
from trimode.graphs.calibration import SensitivityRecord, load_calibration
from trimode.graphs.checkpoint import open_checkpoint
from trimode.runtime.bundle import sha256_of
from trimode.runtime.prompts import USUAL_STYLE, PromptStyle


@dataclass(frozen=True)
class SensitivityRequest:
    """The command line's options, in its order."""

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
    style: PromptStyle = USUAL_STYLE


def run_sensitivity(checkpoint_path: Path, output: Path, request: SensitivityRequest) -> None:
    """Search, write the calibration, say what was kept. Errors are raised before anything is written."""
    settings = QualitySettings(parse_modes(request.modes), request.num_samples, request.max_new_tokens, request.seed, request.device)
    budget = Budget(request.max_drop, request.ranking_samples)
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
        found = search(checkpoint, model, candidate, questions, sha256, budget, settings, progress, to_text)
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
    words = (f"wrote {output}: {len(found.kept)} of {len(found.ranking)} layers stay in high precision; over {count} questions exact match drops by "
             f"{_points(found.drops)} points, {_points(found.drops_if_none_kept)} with every layer quantized")  # fmt: skip
    if 0 < found.max_drop < 100 / count:
        words += f"\nnote: one of {count} questions is {100 / count:.2g} points, so a budget of {found.max_drop:g} allows none to be lost"
    return words


def _points(drops: dict[str, float]) -> str:
    return ", ".join(f"{drop:.2g} ({mode})" for mode, drop in drops.items())

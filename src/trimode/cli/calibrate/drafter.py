"""``trimode calibrate drafter``: trains a drafter adapter from prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trimode.cli.options import calibrate, training
from trimode.cli.options.shared import CheckpointPath, Device, Json, Raw, System, Thinking
from trimode.cli.parse import need
from trimode.cli.prompt_options import prompt_style

if TYPE_CHECKING:
    from trimode.calib.drafter.settings import DrafterJobSettings
    from trimode.cli.calibrate.training import TrainingRequest
    from trimode.formats.drafter import Comparison, DrafterRecord, Drafting


def drafter(
    checkpoint: CheckpointPath,
    *,
    output: calibrate.AdapterOutput,
    data: calibrate.TrainingPrompts,
    calibration: calibrate.DrafterCalibration = None,
    dtype: calibrate.ServedDtype = "float32",
    steps: training.DrafterSteps = None,
    minutes: training.DrafterMinutes = None,
    samples: calibrate.TrainingSamples = None,
    held_out: calibrate.HeldOut = None,
    block_length: training.BlockLength = None,
    rank: training.Rank = None,
    alpha: training.Alpha = None,
    from_scratch: training.FromScratch = False,
    learning_rate: training.DrafterLearningRate = None,
    batch_size: training.TextBatch = 8,
    seed: calibrate.DrafterSeed = 0,
    max_new_tokens: calibrate.AnswerLength = 256,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    resume: calibrate.Resume = False,
    as_json: Json = False,
) -> None:
    """Train a drafter adapter on the model's own answers, for `trimode build --drafter`."""
    need("training", "compile", "torch", "safetensors", "ml_dtypes")
    from trimode.calib.drafter.settings import DrafterJobSettings
    from trimode.cli.calibrate.training import TrainingRequest

    settings = DrafterJobSettings(
        dtype=dtype,  # type: ignore[arg-type]  # its check refuses any other type
        steps=steps,
        minutes=minutes,
        num_samples=samples,
        num_held_out=held_out,
        block_length=block_length,
        rank=rank,
        alpha=alpha,
        from_scratch=from_scratch,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        max_new_tokens=max_new_tokens,
        device=device,
    )
    style = prompt_style(raw, system, enable_thinking)
    request = TrainingRequest(data, calibration, resume, as_json, style)
    run_drafter(checkpoint, output, request, settings)


def run_drafter(
    checkpoint_path: Path, output: Path, request: TrainingRequest, settings: DrafterJobSettings
) -> None:
    """Train with progress on stderr, and print the comparison.

    Errors are raised before anything is written.
    """
    from trimode.calib.drafter.job import check_output, train_adapter
    from trimode.calib.training.run_state import check_state, state_file
    from trimode.cli.calibrate.training import train_on_prompts
    from trimode.cli.output import print_json
    from trimode.formats.files import check_apart
    from trimode.graphs.checkpoint import open_checkpoint

    settings.check()
    request.style.check()
    check_output(output)
    check_apart(output, checkpoint_path, request.data, request.calibration)
    check_state(state_file(output), resume=request.resume)
    checkpoint = open_checkpoint(checkpoint_path)
    settings.shape(checkpoint.drafter)
    record = train_on_prompts(train_adapter, checkpoint, output, request, settings)
    if request.as_json:
        print_json(record)
    else:
        _show(record)
    sys.stderr.write(in_words(output, record) + "\n")


def in_words(output: Path, record: DrafterRecord) -> str:
    """What was written, and whether it is any better than what was there before."""
    before, name = _before(record.held_out)
    trained = record.held_out.trained
    change = (
        f"{_number(before.acceptance_length)} -> {_number(trained.acceptance_length)} tokens "
        f"a cycle on {trained.num_prompts} held-out prompts"
    )
    if record.kept != "trained":
        which = (
            "a copy of the checkpoint's adapter"
            if record.kept == "checkpoint"
            else "an untrained adapter, which changes nothing"
        )
        lines = [
            f"training did NOT help: the trained adapter drafts no better than {name} on the "
            f"validation prompts ({change})",
            f"wrote {output}: {which}",
        ]
    elif (trained.acceptance_length or 0) <= (before.acceptance_length or 0):
        lines = [
            f"wrote {output}: the trained adapter, better than {name} on the validation "
            f"prompts but NOT on those held out ({change})"
        ]
    else:
        lines = [f"wrote {output}: the trained adapter, better than {name} ({change})"]
    unlike = sum(
        one.num_unlike
        for one in (record.held_out.no_drafter, record.held_out.checkpoint, trained)
        if one is not None
    )
    if unlike:
        lines.append(
            f"{unlike} answers of self-speculation differ from the autoregressive ones: "
            "rounding decided between equal tokens"
        )
    return "\n".join(lines)


def _before(comparison: Comparison) -> tuple[Drafting, str]:
    """What the trained adapter has to beat."""
    if comparison.checkpoint is None:
        return comparison.no_drafter, "no adapter"
    return comparison.checkpoint, "the checkpoint's"


def _show(record: DrafterRecord) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # in a file or a pipe, lines are not broken at 80 columns
    scales = (
        f"{record.calibration.precision} ({record.calibration.name})"
        if record.calibration
        else "not quantized"
    )
    console.print(
        f"{record.source_name}, {scales}, {record.dtype}; block {record.block_length}; "
        f"{record.training.steps} steps on "
        f"{record.prompts.num_train} prompts, loss {record.training.first_loss:.3f} -> "
        f"{record.training.loss:.3f}"
    )
    table = Table(
        "prompts",
        "adapter",
        "acceptance length",
        "tokens per forward",
        "tokens",
        "like AR",
        box=None,
        header_style="bold",
    )
    for name, comparison in (("held out", record.held_out), ("validation", record.validation)):
        rows = (
            ("none", comparison.no_drafter),
            ("the checkpoint's", comparison.checkpoint),
            ("trained", comparison.trained),
        )
        for adapter, one in rows:
            if one is not None:
                alike = f"{one.num_prompts - one.num_unlike}/{one.num_prompts}"
                table.add_row(
                    name,
                    adapter,
                    _number(one.acceptance_length),
                    f"{one.tokens_per_forward:.3f}",
                    str(one.num_tokens),
                    alike,
                )
    console.print(table)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"

"""``trimode calibrate drafter``: prompts through a checkpoint to an adapter, and what to say about
it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimode.cli.options import (
    AnswerLength,
    CheckpointPath,
    Device,
    HeldOut,
    Json,
    Raw,
    Resume,
    ServedDtype,
    System,
    Thinking,
    TrainingData,
    TrainingSamples,
)
from trimode.cli.parse import need

if TYPE_CHECKING:
    from trimode.calib.drafter.settings import DrafterJobSettings
    from trimode.cli.calibrate.training import TrainingRequest
    from trimode.formats.drafter import Comparison, DrafterRecord, Drafting


def drafter(
    checkpoint: CheckpointPath,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="ADAPTER",
            help="Folder to write, or a trained adapter to replace.",
        ),
    ],
    data: TrainingData,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Scales of the bundle that the drafter is for; if left out nothing is quantized.",
        ),
    ] = None,
    dtype: ServedDtype = "float32",
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of training; 300 if neither this nor --minutes is given."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Time for the training, without writing answers and measuring."),
    ] = None,
    samples: TrainingSamples = None,
    held_out: HeldOut = None,
    block_length: Annotated[
        int | None,
        typer.Option(help="Slots of a block that will be drafted; the model's if left out."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of a fresh adapter; needed where the checkpoint has none.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Of a fresh adapter, whose branch is scaled by alpha / rank; 4 times the rank if left out."
        ),
    ] = None,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch", help="Begin with a fresh adapter, not with the checkpoint's."
        ),
    ] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Its peak; 2e-3 for a fresh adapter, 5e-4 for one that is there."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a step.")] = 8,
    seed: Annotated[
        int, typer.Option(help="Of the draw, of a fresh adapter and of what is trained on.")
    ] = 0,
    max_new_tokens: AnswerLength = 256,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train the drafter's adapter on what the model itself answers, quantized if it will be; for
    `trimode build --drafter`.
    """
    need("training", "compile", "torch", "safetensors", "ml_dtypes")
    from trimode.calib.drafter.settings import DrafterJobSettings
    from trimode.cli.calibrate.training import TrainingRequest
    from trimode.runtime.text.prompts import PromptStyle

    settings = DrafterJobSettings(
        dtype,
        steps,
        minutes,
        samples,
        held_out,
        block_length,
        rank,
        alpha,
        from_scratch,
        learning_rate,
        batch_size,
        seed,
        max_new_tokens,
        device,  # type: ignore[arg-type]  # its check refuses any other type
    )
    run_drafter(
        checkpoint,
        output,
        TrainingRequest(
            data, calibration, resume, as_json, PromptStyle(raw, system, enable_thinking)
        ),
        settings,
    )


def run_drafter(
    checkpoint_path: Path, output: Path, request: TrainingRequest, settings: DrafterJobSettings
) -> None:
    """Train, with progress on stderr; print the comparison. Errors are raised before anything is
    written.
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
    change = f"{_number(before.acceptance_length)} -> {_number(trained.acceptance_length)} tokens a cycle on {trained.num_prompts} held-out prompts"
    if record.kept != "trained":
        which = (
            "a copy of the checkpoint's adapter"
            if record.kept == "checkpoint"
            else "an untrained adapter, which changes nothing"
        )
        lines = [
            f"training did NOT help: the trained adapter drafts no better than {name} on the validation prompts ({change})",
            f"wrote {output}: {which}",
        ]
    elif (trained.acceptance_length or 0) <= (before.acceptance_length or 0):
        lines = [
            f"wrote {output}: the trained adapter, better than {name} on the validation prompts but NOT on those held out ({change})"
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
            f"{unlike} answers of self-speculation differ from the autoregressive ones: rounding decided between equal tokens"
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
        f"{record.source_name}, {scales}, {record.dtype}; block {record.block_length}; {record.training.steps} steps on "
        f"{record.prompts.num_train} prompts, loss {record.training.first_loss:.3f} -> {record.training.loss:.3f}"
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

"""Implements ``trimode calibrate drafter``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trimode.cli.calibrate.training import TrainingCommand, run_training
from trimode.cli.options import calibrate, training
from trimode.cli.options.shared import CheckpointPath, Device, Json, Raw, System, Thinking
from trimode.cli.parse import need
from trimode.cli.prompt_options import prompt_style

if TYPE_CHECKING:
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
    """Train a drafter adapter on the model's own answers.

    The adapter is for `trimode build --drafter`.
    """
    need("training", "compile", "torch", "safetensors", "ml_dtypes")
    from trimode.calib.drafter.settings import DrafterJobSettings

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
    run_training(
        drafter_command(),
        checkpoint,
        output,
        data,
        settings,
        style=prompt_style(raw, system, enable_thinking),
        calibration=calibration,
        resume=resume,
        as_json=as_json,
    )


def drafter_command() -> TrainingCommand[DrafterRecord]:
    """Return the training, imported when it is needed."""
    from trimode.calib.drafter.job import ADAPTER, DrafterJob

    return TrainingCommand(DrafterJob, ADAPTER, _show, in_words)


def in_words(output: Path, record: DrafterRecord) -> str:
    """Say what was written, and whether it beats what was before."""
    before, name = _before(record.held_out)
    trained = record.held_out.trained
    change = (
        f"{_length(before)} -> {_length(trained)} tokens "
        f"a cycle on {trained.num_prompts} held-out prompts"
    )
    lines = [*_verdict(output, record, name, change), *_note_on_unlike(record.held_out)]
    return "\n".join(lines)


def _verdict(output: Path, record: DrafterRecord, name: str, change: str) -> Iterator[str]:
    """Yield what became of the trained adapter.

    ``name`` is the name of what it has to beat.
    """
    before, trained = _before(record.held_out)[0], record.held_out.trained
    if record.kept != "trained":
        yield (
            f"training did NOT help: the trained adapter drafts no better than {name} on the "
            f"validation prompts ({change})"
        )
        is_copy = record.kept == "checkpoint"
        untrained = "an untrained adapter, which changes nothing"
        which = "a copy of the checkpoint's adapter" if is_copy else untrained
        yield f"wrote {output}: {which}"
    elif (trained.acceptance_length or 0) <= (before.acceptance_length or 0):
        yield (
            f"wrote {output}: the trained adapter, better than {name} on the validation "
            f"prompts but NOT on those held out ({change})"
        )
    else:
        yield f"wrote {output}: the trained adapter, better than {name} ({change})"


def _note_on_unlike(held_out: Comparison) -> Iterator[str]:
    compared = (held_out.no_drafter, held_out.checkpoint, held_out.trained)
    unlike = sum(one.num_unlike for one in compared if one is not None)
    if unlike:
        yield (
            f"{unlike} answers of self-speculation differ from the autoregressive ones: "
            "rounding decided between equal tokens"
        )


def _length(one: Drafting) -> str:
    return "none" if one.acceptance_length is None else f"{one.acceptance_length:.3f}"


def _before(comparison: Comparison) -> tuple[Drafting, str]:
    """Return what the trained adapter has to beat, and its name."""
    if comparison.checkpoint is None:
        return comparison.no_drafter, "no adapter"
    return comparison.checkpoint, "the checkpoint's"


def _show(record: DrafterRecord) -> None:
    from trimode.cli.tables import decimal, plain_table, table_console

    console = table_console()
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
    table = plain_table(
        "prompts", "adapter", "acceptance length", "tokens per forward", "tokens", "like AR"
    )
    for prompts, adapter, one in _rows(record):
        table.add_row(
            prompts,
            adapter,
            decimal(one.acceptance_length, 3),
            f"{one.tokens_per_forward:.3f}",
            str(one.num_tokens),
            f"{one.num_prompts - one.num_unlike}/{one.num_prompts}",
        )
    console.print(table)


def _rows(record: DrafterRecord) -> Iterator[tuple[str, str, Drafting]]:
    """Yield the prompts, the adapter and the figures of each row."""
    for prompts, comparison in (("held out", record.held_out), ("validation", record.validation)):
        yield prompts, "none", comparison.no_drafter
        if comparison.checkpoint is not None:
            yield prompts, "the checkpoint's", comparison.checkpoint
        yield prompts, "trained", comparison.trained

"""``trimode calibrate drafter``: prompts through a checkpoint to an adapter, and what to say about it."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trimode.calib.drafter_job.job import check_output, train_adapter
from trimode.calib.drafter_job.measure import Drafting
from trimode.calib.drafter_job.record import Comparison, DrafterRecord
from trimode.calib.drafter_job.settings import DrafterJobSettings
from trimode.calib.jobs.state import check_state, state_file
from trimode.compiler.output import print_json
from trimode.compiler.training_command import TrainingRequest, train_on_prompts
from trimode.files import check_apart
from trimode.graphs.checkpoint import open_checkpoint


def run_drafter(checkpoint_path: Path, output: Path, request: TrainingRequest, settings: DrafterJobSettings) -> None:
    """Train, with progress on stderr; print the comparison. Errors are raised before anything is written."""
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
        which = "a copy of the checkpoint's adapter" if record.kept == "checkpoint" else "an untrained adapter, which changes nothing"
        lines = [f"training did NOT help: the trained adapter drafts no better than {name} on the validation prompts ({change})",
                 f"wrote {output}: {which}"]  # fmt: skip
    elif (trained.acceptance_length or 0) <= (before.acceptance_length or 0):
        lines = [f"wrote {output}: the trained adapter, better than {name} on the validation prompts but NOT on those held out ({change})"]
    else:
        lines = [f"wrote {output}: the trained adapter, better than {name} ({change})"]
    unlike = sum(one.num_unlike for one in (record.held_out.no_drafter, record.held_out.checkpoint, trained) if one is not None)
    if unlike:
        lines.append(f"{unlike} answers of self-speculation differ from the autoregressive ones: rounding decided between equal tokens")
    return "\n".join(lines)


def _before(comparison: Comparison) -> tuple[Drafting, str]:
    """What the trained adapter has to beat."""
    if comparison.checkpoint is None:
        return comparison.no_drafter, "no adapter"
    return comparison.checkpoint, "the checkpoint's"


def _show(record: DrafterRecord) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # in a file or a pipe, lines are not broken at 80 columns
    scales = f"{record.calibration.precision} ({record.calibration.name})" if record.calibration else "not quantized"
    console.print(f"{record.source_name}, {scales}, {record.dtype}; block {record.block_length}; {record.training.steps} steps on "
                  f"{record.prompts.num_train} prompts, loss {record.training.first_loss:.3f} -> {record.training.loss:.3f}")  # fmt: skip
    table = Table("prompts", "adapter", "acceptance length", "tokens per forward", "tokens", "like AR", box=None, header_style="bold")
    for name, comparison in (("held out", record.held_out), ("validation", record.validation)):
        rows = (("none", comparison.no_drafter), ("the checkpoint's", comparison.checkpoint), ("trained", comparison.trained))
        for adapter, one in rows:
            if one is not None:
                alike = f"{one.num_prompts - one.num_unlike}/{one.num_prompts}"
                table.add_row(name, adapter, _number(one.acceptance_length), f"{one.tokens_per_forward:.3f}", str(one.num_tokens), alike)
    console.print(table)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"

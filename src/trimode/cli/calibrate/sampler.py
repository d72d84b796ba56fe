"""``trimode calibrate sampler``: trains a sampler from prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trimode.cli.options import calibrate, training
from trimode.cli.options.shared import CheckpointPath, Device, Json, Raw, System, Thinking
from trimode.cli.parse import need, parse_ints
from trimode.cli.prompt_options import prompt_style

if TYPE_CHECKING:
    from rich.table import Table

    from trimode.calib.sampler.settings import SamplerJobSettings
    from trimode.cli.calibrate.training import TrainingRequest
    from trimode.formats.sampler import DenoisingRecord, SamplerFile, ScoresRecord


def sampler(
    checkpoint: CheckpointPath,
    *,
    output: calibrate.SamplerOutput,
    data: calibrate.TrainingPrompts,
    calibration: calibrate.SamplerCalibration = None,
    dtype: calibrate.ServedDtype = "float32",
    steps: training.SamplerSteps = None,
    minutes: training.SamplerMinutes = None,
    samples: calibrate.TrainingSamples = None,
    held_out: calibrate.HeldOut = None,
    target: training.LabelTarget = "serial",
    block_length: training.BlockLengths = "8,32",
    d_model: training.ModelWidth = 192,
    layers: training.Layers = 4,
    heads: training.Heads = 8,
    feed_forward: training.FeedForward = 384,
    learning_rate: training.SamplerLearningRate = 1e-3,
    batch_size: training.SlotBatch = 1024,
    seed: calibrate.SamplerSeed = 0,
    max_new_tokens: calibrate.AnswerLength = 256,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    resume: calibrate.Resume = False,
    as_json: Json = False,
) -> None:
    """Train a sampler of block diffusion, for `trimode build --sampler`."""
    need("training", "compile", "torch", "safetensors", "ml_dtypes")
    from trimode.calib.sampler.settings import SamplerJobSettings
    from trimode.cli.calibrate.training import TrainingRequest

    settings = SamplerJobSettings(
        dtype=dtype,  # type: ignore[arg-type]  # its check refuses any other type
        steps=steps,
        minutes=minutes,
        num_samples=samples,
        num_held_out=held_out,
        target=target,  # type: ignore[arg-type]  # its check refuses any other target
        block_lengths=tuple(parse_ints(block_length)),
        d_model=d_model,
        num_layers=layers,
        num_heads=heads,
        feed_forward=feed_forward,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        max_new_tokens=max_new_tokens,
        device=device,
    )
    style = prompt_style(raw, system, enable_thinking)
    request = TrainingRequest(data, calibration, resume, as_json, style)
    run_sampler(checkpoint, output, request, settings)


def run_sampler(
    checkpoint_path: Path, output: Path, request: TrainingRequest, settings: SamplerJobSettings
) -> None:
    """Train with progress on stderr, and print the comparison.

    Errors are raised before anything is written.
    """
    from trimode.calib.sampler.job import check_output, train_sampler
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
    record = train_on_prompts(train_sampler, checkpoint, output, request, settings)
    if request.as_json:
        print_json(record)
    else:
        _show(record)
    sys.stderr.write(
        "\n".join(
            [
                f"wrote {output}: fills slots from a score of {record.threshold:g}",
                *map(_in_words, _compared(record)),
            ]
        )
        + "\n"
    )


def _compared(record: SamplerFile) -> list[tuple[DenoisingRecord, DenoisingRecord]]:
    """Pair the usual confidence threshold with the sampler's own, by block length.

    Both are measured over the held-out texts.
    """
    from trimode.calib.sampler.measure import USUAL_CONFIDENCE

    rows = {(row.block_length, row.sampler, row.threshold): row for row in record.held_out}
    return [
        (rows[length, "threshold", USUAL_CONFIDENCE], rows[length, "learned", record.threshold])
        for length in record.block_lengths
    ]


def _in_words(pair: tuple[DenoisingRecord, DenoisingRecord]) -> str:
    """Whether the sampler is any better than the rule that it is to replace."""
    from trimode.calib.sampler.measure import share_right

    rule, learned = pair
    faster, as_good = (
        learned.tokens_per_forward > rule.tokens_per_forward,
        share_right(learned) >= share_right(rule),
    )
    verdict = (
        "better"
        if faster and as_good
        else "NOT better: no faster"
        if as_good
        else "NOT better: fewer texts are right"
    )
    what = "like the target" if rule.exact_match is None else "answered right"
    return (
        f"block {rule.block_length}, {rule.num_texts} held-out prompts: "
        f"{rule.tokens_per_forward:.2f} -> {learned.tokens_per_forward:.2f} tokens "
        f"per forward, {_share(share_right(rule))} -> {_share(share_right(learned))} {what}; "
        f"{verdict} than a threshold of "
        f"{rule.threshold:g} on the probability"
    )


def _show(record: SamplerFile) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # in a file or a pipe, lines are not broken at 80 columns
    training = record.training
    console.print(
        f"{record.source_name}, {record.num_parameters / 1e6:.2f} M parameters; target "
        f"{record.target}; {training.steps} steps on "
        f"{training.num_states} states of {record.prompts.num_train} prompts; loss on "
        f"{record.prompts.num_validation} others "
        f"{training.untrained_loss:.4f} -> {training.best_loss:.4f} after {training.best_step}"
    )
    console.print(_scores_table(record.scores))
    headings = (
        "block",
        "fills by",
        "from",
        "like the target",
        "answered right",
        "tokens per forward",
        "forwards",
    )
    table = Table(*headings, title="held-out texts", box=None, header_style="bold")
    for row in record.held_out:
        what = "score" if row.sampler == "learned" else "probability"
        table.add_row(
            str(row.block_length),
            what,
            f"{row.threshold:g}",
            _share(row.same_as_target),
            _share(row.exact_match),
            f"{row.tokens_per_forward:.2f}",
            str(row.num_forwards),
        )
    console.print(table)


def _scores_table(scores: tuple[ScoresRecord, ...]) -> Table:
    from rich.table import Table

    headings = ("block", "slots", "right", "judged by", "AUC", "cross-entropy", "calibration error")
    table = Table(*headings, title="held-out states", box=None, header_style="bold")
    for row in scores:
        common = (str(row.block_length), str(row.num_slots), _share(row.share_right))
        table.add_row(
            *common,
            "probability",
            _number(row.confidence_auc),
            f"{row.confidence_loss:.4f}",
            f"{row.confidence_calibration_error:.4f}",
        )
        table.add_row(
            *common, "score", _number(row.auc), f"{row.loss:.4f}", f"{row.calibration_error:.4f}"
        )
    return table


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f}%"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"

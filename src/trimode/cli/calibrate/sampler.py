"""Implements ``trimode calibrate sampler``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimode.cli.calibrate.training import TrainingCommand, run_training
from trimode.cli.options import calibrate, training
from trimode.cli.options.shared import CheckpointPath, Device, Json, Raw, System, Thinking
from trimode.cli.parse import need, parse_ints
from trimode.cli.prompt_options import prompt_style

if TYPE_CHECKING:
    from rich.table import Table

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
    """Train a sampler of block diffusion on the model's own answers.

    The sampler is for `trimode build --sampler`.
    """
    need("training", "compile", "torch", "safetensors", "ml_dtypes")
    from trimode.calib.sampler.settings import SamplerJobSettings

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
    run_training(
        sampler_command(),
        checkpoint,
        output,
        data,
        settings,
        style=prompt_style(raw, system, enable_thinking),
        calibration=calibration,
        resume=resume,
        as_json=as_json,
    )


def sampler_command() -> TrainingCommand[SamplerFile]:
    """Return the training, imported when it is needed."""
    from trimode.calib.sampler.job import SAMPLER, SamplerJob

    return TrainingCommand(SamplerJob, SAMPLER, _show, _summary)


def _summary(output: Path, record: SamplerFile) -> str:
    written = f"wrote {output}: fills slots from a score of {record.threshold:g}"
    return "\n".join([written, *map(_in_words, _compared(record))])


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
    """Say whether the sampler is better than the rule it replaces."""
    from trimode.calib.sampler.measure import share_right
    from trimode.cli.tables import percent

    rule, learned = pair
    what = "like the target" if rule.exact_match is None else "answered right"
    return (
        f"block {rule.block_length}, {rule.num_texts} held-out prompts: "
        f"{rule.tokens_per_forward:.2f} -> {learned.tokens_per_forward:.2f} tokens per forward, "
        f"{percent(share_right(rule))} -> {percent(share_right(learned))} {what}; "
        f"{_verdict(rule, learned)} than a threshold of {rule.threshold:g} on the probability"
    )


def _verdict(rule: DenoisingRecord, learned: DenoisingRecord) -> str:
    from trimode.calib.sampler.measure import share_right

    if share_right(learned) < share_right(rule):
        return "NOT better: fewer texts are right"
    if learned.tokens_per_forward <= rule.tokens_per_forward:
        return "NOT better: no faster"
    return "better"


def _show(record: SamplerFile) -> None:
    from trimode.cli.tables import table_console

    console, training = table_console(), record.training
    console.print(
        f"{record.source_name}, {record.num_parameters / 1e6:.2f} M parameters; target "
        f"{record.target}; {training.steps} steps on "
        f"{training.num_states} states of {record.prompts.num_train} prompts; loss on "
        f"{record.prompts.num_validation} others "
        f"{training.untrained_loss:.4f} -> {training.best_loss:.4f} after {training.best_step}"
    )
    console.print(_scores_table(record.scores))
    console.print(_texts_table(record.held_out))


def _texts_table(rows: tuple[DenoisingRecord, ...]) -> Table:
    from trimode.cli.tables import percent, plain_table

    headings = ("block", "fills by", "from", "like the target", "answered right")
    table = plain_table(*headings, "tokens per forward", "forwards", title="held-out texts")
    for row in rows:
        table.add_row(
            str(row.block_length),
            "score" if row.sampler == "learned" else "probability",
            f"{row.threshold:g}",
            percent(row.same_as_target),
            percent(row.exact_match, "unknown"),
            f"{row.tokens_per_forward:.2f}",
            str(row.num_forwards),
        )
    return table


def _scores_table(scores: tuple[ScoresRecord, ...]) -> Table:
    from trimode.cli.tables import decimal, percent, plain_table

    headings = ("block", "slots", "right", "judged by", "AUC", "cross-entropy", "calibration error")
    table = plain_table(*headings, title="held-out states")
    for row in scores:
        common = (str(row.block_length), str(row.num_slots), percent(row.share_right))
        judged = (row.confidence_auc, row.confidence_loss, row.confidence_calibration_error)
        table.add_row(*common, "probability", *(decimal(value, 4) for value in judged))
        judged = (row.auc, row.loss, row.calibration_error)
        table.add_row(*common, "score", *(decimal(value, 4) for value in judged))
    return table

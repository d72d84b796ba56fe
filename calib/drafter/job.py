"""The training of a drafter from beginning to end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import trimode
from trimode.calib.data.prompts import Prompts, Split, split_texts
from trimode.calib.drafter.adapter import Adapter, adapter_of, blank_adapter, install_adapter
from trimode.calib.drafter.answers import Written, batches, long_enough, write_answer
from trimode.calib.drafter.measure import measure
from trimode.calib.drafter.settings import FRESH_RATE, REPAIR_RATE, DrafterJobSettings
from trimode.calib.drafter.training import DrafterProgress, DrafterSettings, DrafterTraining
from trimode.calib.reference.device import check_device
from trimode.calib.reference.served import ServedTrunk, load_served
from trimode.calib.reference.torch_session import TorchSession
from trimode.calib.training.checkpoint_writer import write_adapter, write_json
from trimode.calib.training.loop import run_training
from trimode.calib.training.records import scales_record, versions
from trimode.calib.training.run_state import (
    RunState,
    check_state,
    identity_of,
    state_file,
    write_missing,
)
from trimode.formats.calibration import PromptsRecord
from trimode.formats.contract import ModelInfo
from trimode.formats.drafter import (
    RECORD,
    SCHEMA_VERSION,
    Comparison,
    DrafterRecord,
    DrafterTrainingRecord,
    Kept,
)
from trimode.formats.files import check_apart, check_replaceable, staged_replacement
from trimode.formats.texts import name_of
from trimode.graphs.adapter import Drafter
from trimode.graphs.checkpoint import Checkpoint
from trimode.progress import Progress
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.text.prompts import Text

LIBRARIES = ("torch", "numpy", "safetensors")


@dataclass(frozen=True)
class _Job:
    """What every step of a run needs."""

    checkpoint: Checkpoint
    model: ModelInfo
    settings: DrafterJobSettings
    served: ServedTrunk
    progress: Progress

    @property
    def block_length(self) -> int:
        return self.settings.block_length or self.model.block_size

    @property
    def starts_fresh(self) -> bool:
        return self.settings.from_scratch or self.checkpoint.drafter is None


@dataclass(frozen=True)
class _Answers:
    train: list[Written]
    validation: list[Written]
    held_out: list[Written]


@dataclass(frozen=True)
class _Adapters:
    """Holds three adapters: before, untrained, trained.

    The one before is None where the checkpoint has none. The untrained one has the new shape.
    """

    checkpoint: Adapter | None
    untrained: Adapter
    trained: Adapter


@dataclass(frozen=True)
class _Run:
    """What a run began with and what came of it."""

    prompts: Prompts
    answers: _Answers
    done: DrafterProgress
    held_out: Comparison
    validation: Comparison
    kept: Kept
    chosen: Adapter


def train_adapter(
    checkpoint: Checkpoint,
    model: ModelInfo,
    prompts: Prompts,
    output: Path,
    settings: DrafterJobSettings,
    progress: Progress,
    *,
    calibration: Path | None = None,
    resume: bool = False,
) -> DrafterRecord:
    """Train a drafter adapter, and write it to the folder ``output``.

    It is trained against the model as it will be served.

    Takes four bytes of memory a parameter, and what a step needs. Ctrl-C leaves a state beside
    ``output`` that ``resume`` takes up: the run then ends with the same bytes as if it had not been
    interrupted, where the budget is one of steps.

    Args:
        checkpoint: Checkpoint whose drafter is trained.
        model: Facts that decoding needs.
        prompts: Prompts that the model answers, to train on the answers.
        output: new, empty, or an earlier output, which is replaced whole.
        settings: Choices of the caller.
        progress: Display of the stages.
        calibration: folder of the scales that the bundle will have; None = its weights are not
        quantized.
        resume: take up the run that was interrupted.

    Raises:
        UsageError: a setting or a prompt cannot be used, ``output`` is something else, or the
        answers are too short to draft.
        CheckpointError: the checkpoint or the calibration cannot be read, or do not belong
        together.
        DeviceError: the device is not here.
        BuildError: the training diverged.
    """
    settings.check()
    shape = settings.shape(checkpoint.drafter)
    check_output(output)
    check_apart(output, checkpoint.path, calibration)
    check_state(state_file(output), resume=resume)
    check_device(settings.device)
    split = split_texts(
        prompts.texts, settings.num_samples, settings.num_held_out, settings.seed, model
    )
    advance = progress.stage("read checkpoint", 1)
    # A window of twice the longest block may begin at the last token.
    served = load_served(
        checkpoint, model.max_length + 2 * model.max_block_length, settings.dtype, calibration
    )
    served.trunk.to(settings.device)
    advance(1)
    job = _Job(checkpoint, model, settings, served, progress)
    state = RunState(
        state_file(output),
        identity_of(asdict(settings), served.sha256, served.calibration, prompts.sha256),
        resume=resume,
    )
    answers = _write_answers(job, split, state)
    adapters, done = _train(job, answers, shape, state)
    held_out = _compare(job, answers.held_out, adapters, "measure")
    validation = _compare(job, answers.validation, adapters, "decide")
    kept = _choose(validation)
    chosen = {
        "trained": adapters.trained,
        "checkpoint": adapters.checkpoint,
        "untrained": adapters.untrained,
    }[kept]
    assert chosen is not None
    record = _record(
        job, _Run(prompts, answers, done, held_out, validation, kept, chosen), calibration
    )
    record = _write(output, job, chosen, record)
    state.discard()
    return record


def check_output(output: Path) -> None:
    """Raise :class:`UsageError` where ``output`` is neither empty nor an earlier output."""
    check_replaceable(output, RECORD, "a trained adapter")


def _write_answers(job: _Job, split: Split, state: RunState) -> _Answers:
    """Have the model answer every prompt that the state has no answer of."""
    session, texts = TorchSession(job.served.trunk), split.texts

    def write(_number: int, text: Text) -> Text:
        return write_answer(session, job.model, text, job.settings.max_new_tokens)

    write_missing(state, texts, write, job.progress.stage("write answers", len(texts)))
    written = iter(
        [Written(text, answer) for text, answer in zip(texts, state.written, strict=True)]
    )
    return _Answers(
        train=long_enough([next(written) for _ in split.train], "train on"),
        validation=long_enough([next(written) for _ in split.validation], "decide by"),
        held_out=long_enough([next(written) for _ in split.held_out], "measure with"),
    )


def _train(
    job: _Job, answers: _Answers, shape: Drafter, state: RunState
) -> tuple[_Adapters, DrafterProgress]:
    """Train in the trunk, from where the state stands."""
    trunk, settings, own = job.served.trunk, job.settings, job.checkpoint.drafter
    before = None if own is None else adapter_of(trunk, own.alpha)
    untrained = blank_adapter(trunk, shape.rank, shape.alpha)
    if job.starts_fresh:
        install_adapter(trunk, untrained)
    training = DrafterTraining(trunk, _training_settings(job), from_scratch=job.starts_fresh)
    if job.starts_fresh:
        untrained = adapter_of(trunk, shape.alpha)
    if state.training is not None:
        training.load(state.training)
    source = batches(
        answers.train,
        settings.batch_size,
        settings.seed,
        settings.device,
        first=training.progress.step,
    )
    done = run_training(
        training,
        partial(training.run, source, settings.budget),
        settings.budget,
        state,
        job.progress,
    )
    trained = adapter_of(trunk, shape.alpha).rounded(settings.dtype)
    return _Adapters(before, untrained.rounded(settings.dtype), trained), done


def _training_settings(job: _Job) -> DrafterSettings:
    """In float32, whose greedy tokens are those that the answers were written with."""
    rate = job.settings.learning_rate or (FRESH_RATE if job.starts_fresh else REPAIR_RATE)
    return DrafterSettings(
        learning_rate=rate, seed=job.settings.seed, autocast=False, block_length=job.block_length
    )


def _compare(job: _Job, written: Sequence[Written], adapters: _Adapters, stage: str) -> Comparison:
    """Draft with each adapter in turn; the trunk is left with the trained one."""
    session, trunk = TorchSession(job.served.trunk), job.served.trunk
    advance = job.progress.stage(stage, len(written) * (2 if adapters.checkpoint is None else 3))
    options = DecodeOptions(job.settings.max_new_tokens, job.block_length, threshold=0.0)
    before = None
    if adapters.checkpoint is not None:
        install_adapter(trunk, adapters.checkpoint)
        before = measure(session, job.model, written, options, advance)
    install_adapter(trunk, adapters.trained)
    trained = measure(session, job.model, written, options, advance)
    no_drafter = measure(session, job.model, written, replace(options, use_drafter=False), advance)
    return Comparison(no_drafter=no_drafter, checkpoint=before, trained=trained)


def _choose(validation: Comparison) -> Kept:
    """The trained adapter where it drafts better than the one before."""
    before = validation.checkpoint or validation.no_drafter
    if (validation.trained.acceptance_length or 0) > (before.acceptance_length or 0):
        return "trained"
    return "untrained" if validation.checkpoint is None else "checkpoint"


def _record(job: _Job, run: _Run, calibration: Path | None) -> DrafterRecord:
    """What the folder says of the run; the adapter's digest is added when it is written."""
    answers, done = run.answers, run.done
    return DrafterRecord(
        schema_version=SCHEMA_VERSION,
        trimode_version=trimode.__version__,
        source_name=name_of(job.checkpoint.path),
        source_sha256=job.served.base_sha256,
        checkpoint_sha256=job.served.sha256,
        calibration=scales_record(job.served, calibration),
        dtype=job.settings.dtype,
        rank=run.chosen.rank,
        alpha=run.chosen.alpha,
        block_length=job.block_length,
        settings=asdict(job.settings),
        prompts=PromptsRecord(
            sha256=run.prompts.sha256,
            num_train=len(answers.train),
            num_validation=len(answers.validation),
            num_held_out=len(answers.held_out),
        ),
        training=DrafterTrainingRecord(
            steps=done.step,
            seconds=done.seconds,
            first_loss=done.first_loss,
            loss=done.loss,
            accepted=done.accepted,
        ),
        held_out=run.held_out,
        validation=run.validation,
        kept=run.kept,
        adapter_sha256="",
        libraries=versions(LIBRARIES),
    )


def _write(output: Path, job: _Job, adapter: Adapter, record: DrafterRecord) -> DrafterRecord:
    """The folder, all or nothing."""
    install_adapter(job.served.trunk, adapter)
    with staged_replacement(output, RECORD) as staged:
        write_adapter(staged, job.served.trunk)
        digest = hashlib.sha256((staged / "adapter_model.safetensors").read_bytes()).hexdigest()
        record = record.model_copy(update={"adapter_sha256": digest})
        write_json(staged / RECORD, record.model_dump(mode="json"))
    return record

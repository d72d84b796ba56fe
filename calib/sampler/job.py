"""The training of a sampler from beginning to end."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

import trimode
from trimode.calib.data.prompts import Prompts, Split, split_texts
from trimode.calib.reference.device import check_device
from trimode.calib.reference.served import ServedTrunk, load_served
from trimode.calib.reference.torch_session import TorchSession
from trimode.calib.sampler.measure import choose_threshold, measure_scores, measure_texts
from trimode.calib.sampler.scorer import TorchScorer
from trimode.calib.sampler.settings import SamplerJobSettings
from trimode.calib.sampler.training import SamplerProgress, SamplerTraining, new_sampler
from trimode.calib.sampler.trajectories import StateRecorder, States, join, write_states
from trimode.calib.training.checkpoint_writer import write_json
from trimode.calib.training.loop import run_training
from trimode.calib.training.records import scales_record, versions
from trimode.calib.training.run_state import (
    RunState,
    check_state,
    identity_of,
    state_file,
    write_missing,
)
from trimode.errors import UsageError
from trimode.formats.calibration import PromptsRecord
from trimode.formats.contract import TOP_K, ModelInfo
from trimode.formats.files import check_apart, check_replaceable, staged_replacement
from trimode.formats.sampler import (
    RECORD,
    SCHEMA_VERSION,
    WEIGHTS,
    DenoisingRecord,
    SamplerFile,
    SamplerTrainingRecord,
    ShapeRecord,
)
from trimode.formats.texts import name_of
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.sampler.network import BlockSampler, token_semantics
from trimode.progress import Progress
from trimode.runtime.text.prompts import Text

LIBRARIES = ("torch", "numpy", "safetensors")


@dataclass(frozen=True)
class _Job:
    """What every step of a run needs."""

    checkpoint: Checkpoint
    model: ModelInfo
    settings: SamplerJobSettings
    served: ServedTrunk
    progress: Progress


@dataclass(frozen=True)
class _Data:
    """States by block length: to train on, to decide by, and of held-out texts."""

    train: dict[int, States]
    validation: dict[int, States]
    held_out: dict[int, States]


@dataclass(frozen=True)
class _Run:
    """What a run began with and what came of it."""

    prompts: Prompts
    split: Split
    data: _Data
    sampler: BlockSampler
    done: SamplerProgress
    held_out: tuple[DenoisingRecord, ...]
    validation: tuple[DenoisingRecord, ...]


def train_sampler(
    checkpoint: Checkpoint,
    model: ModelInfo,
    prompts: Prompts,
    output: Path,
    settings: SamplerJobSettings,
    progress: Progress,
    *,
    calibration: Path | None = None,
    resume: bool = False,
) -> SamplerFile:
    """Train a sampler on a checkpoint's block diffusion, and write it to ``output``.

    Takes four bytes of memory a parameter, and 48 a slot of the states. Ctrl-C leaves a state
    beside ``output`` that ``resume`` takes up: the run then ends with the same bytes as if it had
    not been interrupted, where the budget is one of steps.

    Args:
        checkpoint: Checkpoint that denoises.
        model: Facts that decoding needs.
        prompts: what the model answers; right answers, where they are known, decide the threshold
        and are measured by.
        output: new, empty, or an earlier output, which is replaced whole.
        settings: Choices of the caller.
        progress: Display of the stages.
        calibration: folder of the scales that the bundle will have; None = its weights are not
        quantized.
        resume: take up the run that was interrupted.

    Raises:
        UsageError: a setting or a prompt cannot be used, or ``output`` is something else.
        CheckpointError: the checkpoint or the calibration cannot be read, or do not belong
        together.
        DeviceError: the device is not here.
        BuildError: the training diverged.
    """
    settings.check()
    check_output(output)
    check_apart(output, checkpoint.path, calibration)
    check_state(state_file(output), resume=resume)
    check_device(settings.device)
    if model.vocab_size < TOP_K:
        raise UsageError(
            f"expected a vocabulary of at least {TOP_K} tokens, found {model.vocab_size}",
            "the sampler looks at so many candidates",
        )
    split = split_texts(
        prompts.texts, settings.num_samples, settings.num_held_out, settings.seed, model
    )
    advance = progress.stage("read checkpoint", 1)
    served = load_served(
        checkpoint, model.max_length + model.max_block_length, settings.dtype, calibration
    )
    served.trunk.to(settings.device)
    advance(1)
    job = _Job(checkpoint, model, settings, served, progress)
    state = RunState(
        state_file(output),
        identity_of(asdict(settings), served.base_sha256, served.calibration, prompts.sha256),
        resume=resume,
    )
    data = _write_states(job, split, state)
    sampler, done = _train(job, data, state)
    scorer = TorchScorer(sampler)
    validation = _answer(job, split.validation, scorer, prompts, "decide")
    held_out = _answer(job, split.held_out, scorer, prompts, "measure")
    record = _record(
        job, _Run(prompts, split, data, sampler, done, held_out, validation), calibration
    )
    record = _write(output, sampler, record)
    state.discard()
    return record


def check_output(output: Path) -> None:
    """Raise :class:`UsageError` where ``output`` is neither empty nor an earlier output."""
    check_replaceable(output, RECORD, "a trained sampler")


def _write_states(job: _Job, split: Split, state: RunState) -> _Data:
    """Denoise every prompt whose states the run's state does not have.

    Block lengths may come in any order: each prompt has a seed of its own.
    """
    session, settings, texts = (
        StateRecorder(TorchSession(job.served.trunk)),
        job.settings,
        split.texts,
    )

    def write(number: int, text: Text) -> dict[int, tuple[Tensor, ...]]:
        rng = random.Random(f"{settings.seed} {number}")
        return {
            length: tuple(
                write_states(
                    session, job.model, text, length, settings.max_new_tokens, settings.target, rng
                )
            )
            for length in settings.block_lengths
        }

    write_missing(state, texts, write, job.progress.stage("write states", len(texts)))
    first, last = len(split.train), len(split.train) + len(split.validation)
    parts = (state.written[:first], state.written[first:last], state.written[last:])
    return _Data(*(_by_length(settings, part) for part in parts))


def _by_length(
    settings: SamplerJobSettings, written: Sequence[dict[int, Any]]
) -> dict[int, States]:
    return {
        length: join([States(*one[length]) for one in written]) for length in settings.block_lengths
    }


def _train(job: _Job, data: _Data, state: RunState) -> tuple[BlockSampler, SamplerProgress]:
    """Train, from where the run's state stands."""
    settings, mask = job.settings, job.model.mask_token_id
    table = token_semantics(job.served.trunk.encoder.embed_tokens.weight)
    sampler = new_sampler(settings.shape, table, data.train, mask, settings.seed).to(
        settings.device
    )
    training = SamplerTraining(
        sampler,
        data.train,
        data.validation,
        mask,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    if state.training is not None:
        training.load(state.training)
    done = run_training(
        training, partial(training.run, settings.budget), settings.budget, state, job.progress
    )
    return sampler.cpu().eval(), done


def _answer(
    job: _Job, texts: Sequence[Text], scorer: TorchScorer, prompts: Prompts, stage: str
) -> tuple[DenoisingRecord, ...]:
    session, settings = TorchSession(job.served.trunk), job.settings
    advance = job.progress.stage(stage, len(texts) * len(settings.block_lengths))
    return tuple(
        record
        for length in settings.block_lengths
        for record in measure_texts(
            session,
            job.model,
            texts,
            block_length=length,
            max_new_tokens=settings.max_new_tokens,
            target=settings.target,
            scorer=scorer,
            is_right=prompts.is_right,
            advance=advance,
        )
    )


def _record(job: _Job, run: _Run, calibration: Path | None) -> SamplerFile:
    """What the folder says of the run; the weights' digest is added when they are written."""
    settings, model, split, done = job.settings, job.model, run.split, run.done
    return SamplerFile(
        schema_version=SCHEMA_VERSION,
        trimode_version=trimode.__version__,
        source_name=name_of(job.checkpoint.path),
        source_sha256=job.served.base_sha256,
        calibration=scales_record(job.served, calibration),
        dtype=settings.dtype,
        target=settings.target,
        vocab_size=model.vocab_size,
        mask_token_id=model.mask_token_id,
        shape=ShapeRecord(**asdict(settings.shape)),
        num_parameters=sum(parameter.numel() for parameter in run.sampler.parameters()),
        block_lengths=settings.block_lengths,
        threshold=choose_threshold(run.validation),
        # as it will be read back: JSON has no tuples
        settings=json.loads(json.dumps(asdict(settings))),
        prompts=PromptsRecord(
            sha256=run.prompts.sha256,
            num_train=len(split.train),
            num_validation=len(split.validation),
            num_held_out=len(split.held_out),
        ),
        training=SamplerTrainingRecord(
            num_states=sum(len(part.blocks) for part in run.data.train.values()),
            steps=done.step,
            seconds=done.seconds,
            first_loss=done.first_loss,
            loss=done.loss,
            untrained_loss=done.untrained_loss,
            best_loss=done.best_loss,
            best_step=done.best_step,
        ),
        scores=tuple(
            measure_scores(run.sampler, part, model.mask_token_id)
            for part in run.data.held_out.values()
        ),
        held_out=run.held_out,
        validation=run.validation,
        sampler_sha256="",
        libraries=versions(LIBRARIES),
    )


def _write(output: Path, sampler: BlockSampler, record: SamplerFile) -> SamplerFile:
    """The folder, all or nothing."""
    with staged_replacement(output, RECORD) as staged:
        data = save({name: tensor.contiguous() for name, tensor in sampler.state_dict().items()})
        (staged / WEIGHTS).write_bytes(data)
        record = record.model_copy(update={"sampler_sha256": hashlib.sha256(data).hexdigest()})
        write_json(staged / RECORD, record.model_dump(mode="json"))
    return record

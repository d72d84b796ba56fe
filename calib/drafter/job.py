"""Trains a drafter adapter, from the checks to its record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import trimode
from trimode.calib.drafter.adapter import Adapter, adapter_of, blank_adapter, install_adapter
from trimode.calib.drafter.answers import Written, batches, long_enough, write_answer
from trimode.calib.drafter.measure import measure
from trimode.calib.drafter.settings import FRESH_RATE, REPAIR_RATE, DrafterJobSettings
from trimode.calib.drafter.training import DrafterProgress, DrafterSettings, DrafterTraining
from trimode.calib.jobs.job import OutputKind
from trimode.calib.reference.torch_session import TorchSession
from trimode.calib.training.checkpoint_writer import write_adapter, write_json
from trimode.calib.training.job import TrainingJob
from trimode.calib.training.loop import run_training
from trimode.calib.training.run_state import RunState
from trimode.formats.drafter import (
    RECORD,
    SCHEMA_VERSION,
    Comparison,
    DrafterRecord,
    DrafterTrainingRecord,
    Kept,
)
from trimode.formats.files import staged_replacement
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.text.prompts import Text

ADAPTER = OutputKind(RECORD, "a trained adapter", RunState)


@dataclass(frozen=True)
class _Answers:
    train: list[Written]
    validation: list[Written]
    held_out: list[Written]


@dataclass(frozen=True)
class _Adapters:
    """Holds the adapters to choose from, and the training's progress.

    The one before is None if the checkpoint has none. The untrained one has the new shape.
    """

    checkpoint: Adapter | None
    untrained: Adapter
    trained: Adapter
    done: DrafterProgress


@dataclass(frozen=True)
class _Choice:
    """Holds the comparisons, and the adapter that they decide for."""

    held_out: Comparison
    validation: Comparison
    kept: Kept
    adapter: Adapter


class DrafterJob(TrainingJob[DrafterJobSettings, _Answers, _Adapters, _Choice, DrafterRecord]):
    """Trains a drafter adapter on answers that the model writes.

    Raises a :class:`UsageError` also if the answers are too short to draft.
    """

    kind = ADAPTER

    @property
    def block_length(self) -> int:
        return self.settings.block_length or self.model.block_size

    @property
    def starts_fresh(self) -> bool:
        return self.settings.from_scratch or self.checkpoint.drafter is None

    @property
    def longest_window(self) -> int:
        """Twice the longest block, which may begin at the last token."""
        return 2 * self.model.max_block_length

    @property
    def run_sha256(self) -> str:
        """Digest of the checkpoint and the adapter that training may begin with."""
        return self.served.sha256

    def check(self) -> None:
        """Check what every training checks, and the adapter's shape."""
        super().check()
        self.shape = self.settings.shape(self.checkpoint.drafter)

    def write(self, work: RunState) -> _Answers:
        """Have the model answer the prompts that lack an answer."""
        session, split = TorchSession(self.served.trunk), self.split

        def write(_number: int, text: Text) -> Text:
            return write_answer(session, self.model, text, self.settings.max_new_tokens)

        answers = self.write_each(work, "write answers", write)
        written = iter([Written(*pair) for pair in zip(split.texts, answers, strict=True)])
        return _Answers(
            train=long_enough([next(written) for _ in split.train], "train on"),
            validation=long_enough([next(written) for _ in split.validation], "decide by"),
            held_out=long_enough([next(written) for _ in split.held_out], "measure with"),
        )

    def learn(self, work: RunState, data: _Answers) -> _Adapters:
        """Train in the trunk, from where the state stands."""
        trunk, settings, own = self.served.trunk, self.settings, self.checkpoint.drafter
        before = None if own is None else adapter_of(trunk, own.alpha)
        training, untrained = self._begin_training()
        if work.training is not None:
            training.load(work.training)
        source = batches(
            data.train,
            settings.batch_size,
            settings.seed,
            settings.device,
            first=training.progress.step,
        )
        done = run_training(
            training,
            partial(training.run, source, settings.budget),
            settings.budget,
            work,
            self.progress,
        )
        trained = adapter_of(trunk, self.shape.alpha)
        dtype = settings.dtype
        return _Adapters(before, untrained.rounded(dtype), trained.rounded(dtype), done)

    def _begin_training(self) -> tuple[DrafterTraining, Adapter]:
        """Install the adapter to train; return the training and an untrained adapter."""
        trunk = self.served.trunk
        untrained = blank_adapter(trunk, self.shape.rank, self.shape.alpha)
        if self.starts_fresh:
            install_adapter(trunk, untrained)
        rate = self.settings.learning_rate or (FRESH_RATE if self.starts_fresh else REPAIR_RATE)
        # In float32, whose greedy tokens are those that the answers were written with.
        settings = DrafterSettings(
            learning_rate=rate,
            seed=self.settings.seed,
            autocast=False,
            block_length=self.block_length,
        )
        training = DrafterTraining(trunk, settings, from_scratch=self.starts_fresh)
        return training, adapter_of(trunk, self.shape.alpha) if self.starts_fresh else untrained

    def measure(self, data: _Answers, learned: _Adapters) -> _Choice:
        """Compare the adapters; what drafts best on the validation prompts is kept."""
        held_out = self._compare(data.held_out, learned, "measure")
        validation = self._compare(data.validation, learned, "decide")
        if _drafts_better(validation):
            return _Choice(held_out, validation, "trained", learned.trained)
        if learned.checkpoint is None:
            return _Choice(held_out, validation, "untrained", learned.untrained)
        return _Choice(held_out, validation, "checkpoint", learned.checkpoint)

    def _compare(self, written: Sequence[Written], adapters: _Adapters, stage: str) -> Comparison:
        """Draft with each adapter in turn; leave the trained one installed."""
        session, trunk = TorchSession(self.served.trunk), self.served.trunk
        num_runs = len(written) * (2 if adapters.checkpoint is None else 3)
        advance = self.progress.stage(stage, num_runs)
        options = DecodeOptions(self.settings.max_new_tokens, self.block_length, threshold=0.0)
        drafting = partial(measure, session, self.model, written, advance=advance)
        before = None
        if adapters.checkpoint is not None:
            install_adapter(trunk, adapters.checkpoint)
            before = drafting(options)
        install_adapter(trunk, adapters.trained)
        trained = drafting(options)
        no_drafter = drafting(replace(options, use_drafter=False))
        return Comparison(no_drafter=no_drafter, checkpoint=before, trained=trained)

    def record(self, data: _Answers, learned: _Adapters, measured: _Choice) -> DrafterRecord:
        """Write the chosen adapter and its record, all or nothing."""
        install_adapter(self.served.trunk, measured.adapter)
        with staged_replacement(self.output, RECORD) as staged:
            write_adapter(staged, self.served.trunk)
            digest = hashlib.sha256((staged / "adapter_model.safetensors").read_bytes())
            record = self._describe(data, learned.done, measured, digest.hexdigest())
            write_json(staged / RECORD, record.model_dump(mode="json"))
        return record

    def _describe(
        self, data: _Answers, done: DrafterProgress, choice: _Choice, adapter_sha256: str
    ) -> DrafterRecord:
        return DrafterRecord(
            schema_version=SCHEMA_VERSION,
            trimode_version=trimode.__version__,
            **self.common_record(),
            checkpoint_sha256=self.served.sha256,
            rank=choice.adapter.rank,
            alpha=choice.adapter.alpha,
            block_length=self.block_length,
            settings=asdict(self.settings),
            prompts=self.prompts_record(len(data.train), len(data.validation), len(data.held_out)),
            training=DrafterTrainingRecord(
                steps=done.step,
                seconds=done.seconds,
                first_loss=done.first_loss,
                loss=done.loss,
                accepted=done.accepted,
            ),
            held_out=choice.held_out,
            validation=choice.validation,
            kept=choice.kept,
            adapter_sha256=adapter_sha256,
        )


def _drafts_better(validation: Comparison) -> bool:
    """Tell whether the trained adapter drafts better than the one before."""
    before = validation.checkpoint or validation.no_drafter
    return (validation.trained.acceptance_length or 0) > (before.acceptance_length or 0)

"""Trains a sampler, from the checks to its record."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from safetensors.torch import save
from torch import Tensor

import trimode
from trimode.calib.jobs.job import OutputKind
from trimode.calib.reference.torch_session import TorchSession
from trimode.calib.sampler.measure import choose_threshold, measure_scores, measure_texts
from trimode.calib.sampler.scorer import TorchScorer
from trimode.calib.sampler.settings import SamplerJobSettings
from trimode.calib.sampler.training import SamplerProgress, SamplerTraining, new_sampler
from trimode.calib.sampler.trajectories import StateRecorder, States, join, write_states
from trimode.calib.training.checkpoint_writer import write_json
from trimode.calib.training.job import TrainingJob
from trimode.calib.training.loop import run_training
from trimode.calib.training.run_state import RunState
from trimode.errors import UsageError
from trimode.formats.contract import TOP_K
from trimode.formats.files import staged_replacement
from trimode.formats.sampler import (
    RECORD,
    SCHEMA_VERSION,
    WEIGHTS,
    DenoisingRecord,
    SamplerFile,
    SamplerTrainingRecord,
    ShapeRecord,
)
from trimode.graphs.sampler.network import BlockSampler, token_semantics
from trimode.runtime.text.prompts import Text

SAMPLER = OutputKind(RECORD, "a trained sampler", RunState)


@dataclass(frozen=True)
class _Data:
    """Holds states by block length, for each part of the prompts."""

    train: dict[int, States]
    validation: dict[int, States]
    held_out: dict[int, States]


@dataclass(frozen=True)
class _Trained:
    """Holds a trained network, and the training's progress."""

    sampler: BlockSampler
    done: SamplerProgress


@dataclass(frozen=True)
class _Measured:
    held_out: tuple[DenoisingRecord, ...]
    validation: tuple[DenoisingRecord, ...]


class SamplerJob(TrainingJob[SamplerJobSettings, _Data, _Trained, _Measured, SamplerFile]):
    """Trains a sampler on a checkpoint's block diffusion.

    It takes 48 bytes for each slot of a state. Right answers, where they are known, decide the
    threshold and are measured by.
    """

    kind = SAMPLER

    @property
    def longest_window(self) -> int:
        """The longest block, which may begin at the last token."""
        return self.model.max_block_length

    def check(self) -> None:
        """Check what every training checks, and the vocabulary."""
        super().check()
        if self.model.vocab_size < TOP_K:
            raise UsageError(
                f"expected a vocabulary of at least {TOP_K} tokens, found {self.model.vocab_size}",
                "the sampler looks at so many candidates",
            )

    def write(self, work: RunState) -> _Data:
        """Denoise every prompt whose states the run's state does not have.

        Block lengths may come in any order: each prompt has a seed of its own.
        """
        session, chosen = StateRecorder(TorchSession(self.served.trunk)), self.settings

        def write(number: int, text: Text) -> dict[int, tuple[Tensor, ...]]:
            rng = random.Random(f"{chosen.seed} {number}")
            limits = chosen.max_new_tokens, chosen.target, rng
            return {
                length: tuple(write_states(session, self.model, text, length, *limits))
                for length in chosen.block_lengths
            }

        written, split = self.write_each(work, "write states", write), self.split
        first, last = len(split.train), len(split.train) + len(split.validation)
        parts = (written[:first], written[first:last], written[last:])
        return _Data(*(self._by_length(part) for part in parts))

    def _by_length(self, written: Sequence[dict[int, Any]]) -> dict[int, States]:
        return {
            length: join([States(*one[length]) for one in written])
            for length in self.settings.block_lengths
        }

    def learn(self, work: RunState, data: _Data) -> _Trained:
        """Train, from where the run's state stands."""
        settings, mask = self.settings, self.model.mask_token_id
        table = token_semantics(self.served.trunk.encoder.embed_tokens.weight)
        sampler = new_sampler(settings.shape, table, data.train, mask, settings.seed)
        training = SamplerTraining(
            sampler.to(settings.device),
            data.train,
            data.validation,
            mask,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        if work.training is not None:
            training.load(work.training)
        run = partial(training.run, settings.budget)
        done = run_training(training, run, settings.budget, work, self.progress)
        return _Trained(sampler.cpu().eval(), done)

    def measure(self, data: _Data, learned: _Trained) -> _Measured:  # noqa: ARG002  # texts, no states
        """Denoise the validation and held-out prompts by scores and by probabilities."""
        scorer = TorchScorer(learned.sampler)
        validation = self._answer(self.split.validation, scorer, "decide")
        return _Measured(self._answer(self.split.held_out, scorer, "measure"), validation)

    def _answer(
        self, texts: Sequence[Text], scorer: TorchScorer, stage: str
    ) -> tuple[DenoisingRecord, ...]:
        session, settings = TorchSession(self.served.trunk), self.settings
        advance = self.progress.stage(stage, len(texts) * len(settings.block_lengths))
        return tuple(
            record
            for length in settings.block_lengths
            for record in measure_texts(
                session,
                self.model,
                texts,
                block_length=length,
                max_new_tokens=settings.max_new_tokens,
                target=settings.target,
                scorer=scorer,
                is_right=self.prompts.is_right,
                advance=advance,
            )
        )

    def record(self, data: _Data, learned: _Trained, measured: _Measured) -> SamplerFile:
        """Write the network and its record, all or nothing."""
        state = learned.sampler.state_dict()
        weights = save({name: tensor.contiguous() for name, tensor in state.items()})
        digest = hashlib.sha256(weights).hexdigest()
        record = self._describe(data, learned, measured, digest)
        with staged_replacement(self.output, RECORD) as staged:
            (staged / WEIGHTS).write_bytes(weights)
            write_json(staged / RECORD, record.model_dump(mode="json"))
        return record

    def _describe(
        self, data: _Data, learned: _Trained, measured: _Measured, sampler_sha256: str
    ) -> SamplerFile:
        settings, model, split = self.settings, self.model, self.split
        return SamplerFile(
            schema_version=SCHEMA_VERSION,
            trimode_version=trimode.__version__,
            **self.common_record(),
            target=settings.target,
            vocab_size=model.vocab_size,
            mask_token_id=model.mask_token_id,
            shape=ShapeRecord(**asdict(settings.shape)),
            num_parameters=sum(one.numel() for one in learned.sampler.parameters()),
            block_lengths=settings.block_lengths,
            threshold=choose_threshold(measured.validation),
            # as it will be read back: JSON has no tuples
            settings=json.loads(json.dumps(asdict(settings))),
            prompts=self.prompts_record(
                len(split.train), len(split.validation), len(split.held_out)
            ),
            training=_training_record(data, learned.done),
            scores=tuple(
                measure_scores(learned.sampler, part, model.mask_token_id)
                for part in data.held_out.values()
            ),
            held_out=measured.held_out,
            validation=measured.validation,
            sampler_sha256=sampler_sha256,
        )


def _training_record(data: _Data, done: SamplerProgress) -> SamplerTrainingRecord:
    return SamplerTrainingRecord(
        num_states=sum(len(part.blocks) for part in data.train.values()),
        steps=done.step,
        seconds=done.seconds,
        first_loss=done.first_loss,
        loss=done.loss,
        untrained_loss=done.untrained_loss,
        best_loss=done.best_loss,
        best_step=done.best_step,
    )

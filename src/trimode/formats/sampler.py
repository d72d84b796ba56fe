"""Reads and writes trained samplers for the compiler.

A sampler is a folder with ``sampler.json`` and ``sampler.safetensors``.

The tensors are those of :class:`trimode.graphs.sampler.network.BlockSampler`, by its names;
``token_table`` is float16, the rest float32.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trimode.errors import CheckpointError
from trimode.formats.calibration import PromptsRecord, ScalesRecord
from trimode.formats.contract import DType
from trimode.formats.hints import TRAIN_SAMPLER
from trimode.formats.record import OtherVersion, Record, read_record
from trimode.formats.texts import Unreadable, read_bytes

SCHEMA_VERSION = 1
RECORD = "sampler.json"
WEIGHTS = "sampler.safetensors"


class ShapeRecord(Record):
    """Sizes of the network, :class:`trimode.graphs.sampler.network.SamplerShape`."""

    d_model: int = Field(ge=2)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    feed_forward: int = Field(ge=1)


class SamplerTrainingRecord(Record):
    """Holds the figures of the training.

    Attributes:
        num_states: that it was trained on.
        first_loss, loss: binary cross-entropy, means over a hundred steps, or all where there were
        fewer.
        untrained_loss, best_loss: on the validation prompts, of the untrained network, which scores
        by the probability, and of the one that is kept.
        best_step: steps after which that was.
    """

    num_states: int
    steps: int
    seconds: float
    first_loss: float
    loss: float
    untrained_loss: float
    best_loss: float
    best_step: int


class ScoresRecord(Record):
    """How good scores are, over the masked slots of states of held-out texts.

    Attributes:
        block_length: Block length of the states.
        share_right: Share of the slots whose best candidate is the target.
        auc: probability that a right slot has a higher score than a wrong one; None where all slots
        are the one or the other.
        loss: binary cross-entropy, nats a slot.
        calibration_error: mean distance of the score from the share that is right, in ten bins of
        equal width, weighted by their slots.
        confidence_auc, confidence_loss, confidence_calibration_error: the same of the best
            candidate's probability, what thresholds go by.
    """

    block_length: int
    num_slots: int
    share_right: float
    auc: float | None
    loss: float
    calibration_error: float
    confidence_auc: float | None
    confidence_loss: float
    confidence_calibration_error: float


class DenoisingRecord(Record):
    """Texts under one policy.

    Attributes:
        same_as_target: share of the texts that are the target's.
        exact_match: share of the texts that are right: one of the prompt's answers or, for a prompt
            without any, the target's text; None where no prompt has any.
        tokens_per_forward: new tokens over denoise and commit forwards.
    """

    block_length: int
    sampler: str
    threshold: float
    num_texts: int
    same_as_target: float
    exact_match: float | None = None
    num_tokens: int
    num_forwards: int
    tokens_per_forward: float


class SamplerFile(Record):
    """The contents of ``sampler.json``.

    Attributes:
        source_sha256: digest of the checkpoint without its adapter,
        :meth:`trimode.graphs.identity.SourceDigest.base_hexdigest`.
        calibration: Calibration of the quantized weights; None without.
        dtype: Data type that its weights were rounded to.
        target: whose tokens are right: those of denoising one slot a forward, the most probable or
        the leftmost one, or the model's own.
        threshold: score from which a slot is filled, where nobody says otherwise; decided on the
        validation prompts.
        held_out, validation: Quality of texts under thresholds on the probability and on the
        score.
        scores: Quality of scores on states of held-out texts.
        sampler_sha256: Digest of ``sampler.safetensors``.
    """

    schema_version: int
    trimode_version: str
    source_name: str
    source_sha256: str
    calibration: ScalesRecord | None
    dtype: DType
    target: Literal["serial", "leftmost", "ar"]
    vocab_size: int
    mask_token_id: int
    shape: ShapeRecord
    num_parameters: int
    block_lengths: tuple[int, ...]
    threshold: float = Field(ge=0, le=1)
    settings: dict[str, Any]
    prompts: PromptsRecord
    training: SamplerTrainingRecord
    scores: tuple[ScoresRecord, ...]
    held_out: tuple[DenoisingRecord, ...]
    validation: tuple[DenoisingRecord, ...]
    sampler_sha256: str
    libraries: dict[str, str]


def load_sampler_record(folder: Path) -> SamplerFile:
    """Read ``sampler.json``, and see that the weights beside it are those that it describes.

    Raises:
        CheckpointError: missing, damaged or of another schema.
    """
    try:
        record = read_record(folder / RECORD, SamplerFile, (SCHEMA_VERSION,))
        digest = hashlib.sha256(read_bytes(folder / WEIGHTS)).hexdigest()
    except OtherVersion as error:
        raise CheckpointError(
            f"{folder}: {error.reason.replace('expected', 'expected a sampler of', 1)}",
            TRAIN_SAMPLER,
        ) from error
    except Unreadable as error:
        if error.is_missing:
            raise CheckpointError(
                f"{folder}: expected a sampler with {RECORD} and {WEIGHTS}, found none",
                TRAIN_SAMPLER,
            ) from error
        raise CheckpointError(
            f"{folder}: expected a sampler that can be read, found: {error.reason}", TRAIN_SAMPLER
        ) from error
    if digest != record.sampler_sha256:
        raise CheckpointError(
            f"{folder / WEIGHTS}: expected the file that {RECORD} describes, found another",
            TRAIN_SAMPLER,
        )
    return record


def check_sampler_source(name: str, trained_sha256: str, sha256: str) -> None:
    """Raise :class:`CheckpointError` for a sampler of another checkpoint.

    The digest is that of the checkpoint without its adapter.
    """
    if trained_sha256 != sha256:
        raise CheckpointError(
            f"{name}: expected a sampler of this checkpoint ({sha256[:16]}…), found one of "
            f"another ({trained_sha256[:16]}…)",
            TRAIN_SAMPLER,
        )

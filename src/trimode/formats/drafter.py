"""Reads and writes ``drafter.json``: origin and quality of an adapter.

It lies beside the adapter. PEFT and the build ignore it.
"""

from __future__ import annotations

from typing import Any, Literal

from trimode.formats.calibration import PromptsRecord, ScalesRecord
from trimode.formats.contract import DType
from trimode.formats.record import Record

SCHEMA_VERSION = 1
RECORD = "drafter.json"
Kept = Literal["trained", "checkpoint", "untrained"]


class DrafterTrainingRecord(Record):
    """Holds what the training did.

    Losses are running means. ``accepted`` is the mean number of accepted slots in a window.
    """

    steps: int
    seconds: float
    first_loss: float
    loss: float
    accepted: float


class Drafting(Record):
    """Linear self-speculation over some prompts, greedy, a block drafted in one forward.

    Attributes:
        acceptance_length: tokens a draft-and-verify cycle yields; None where there was no cycle.
        tokens_per_forward: new tokens over forwards, which are counted as the reference does: the
        prefill is one, too.
        num_unlike: answers that differ from the autoregressive ones; a draft cannot change a token,
            but the rounding of a forward over many rows can, where two tokens are equally probable.
    """

    num_prompts: int
    num_tokens: int
    num_forwards: int
    num_cycles: int
    acceptance_length: float | None
    tokens_per_forward: float
    num_unlike: int


class Comparison(Record):
    """Compares self-speculation with different adapters over the same prompts.

    They are none, the checkpoint's if it has one, and the trained one.
    """

    no_drafter: Drafting
    checkpoint: Drafting | None
    trained: Drafting


class DrafterRecord(Record):
    """The contents of ``drafter.json``.

    Attributes:
        source_sha256: digest of the checkpoint without its adapter.
        checkpoint_sha256: the same with it.
        calibration: None = the weights were not quantized.
        dtype: Data type of weights, scales and the adapter.
        settings: as given.
        prompts: counted are those whose answers were long enough to be used.
        held_out: on prompts that nothing was decided by.
        validation: on those that decided which adapter is kept.
        kept: the adapter in this folder: the trained one if it drafts better than the one before,
            else that one: the checkpoint's, or where it has none an untrained one, which changes
            nothing.
        adapter_sha256: Digest of ``adapter_model.safetensors``.
    """

    schema_version: int
    trimode_version: str
    source_name: str
    source_sha256: str
    checkpoint_sha256: str
    calibration: ScalesRecord | None
    dtype: DType
    rank: int
    alpha: float
    block_length: int
    settings: dict[str, Any]
    prompts: PromptsRecord
    training: DrafterTrainingRecord
    held_out: Comparison
    validation: Comparison
    kept: Kept
    adapter_sha256: str
    libraries: dict[str, str]

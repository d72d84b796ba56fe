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
    """Measures greedy self-speculation over some prompts, one forward a draft.

    Attributes:
        num_prompts: Number of prompts.
        num_tokens: Number of new tokens.
        num_forwards: Number of forwards, the prefill included, as the reference counts them.
        num_cycles: Number of draft-and-verify cycles.
        acceptance_length: Mean number of tokens a cycle; None where there was no cycle.
        tokens_per_forward: ``num_tokens / num_forwards``.
        num_unlike: Number of answers that differ from the autoregressive ones. A draft cannot
            change a token. The rounding of a long forward can, where two tokens are equally
            probable.
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
    """Holds the contents of ``drafter.json``.

    Attributes:
        schema_version: Version of this schema.
        trimode_version: Version of the library that wrote the file.
        source_name: Name of the checkpoint's folder.
        source_sha256: Digest of the checkpoint without its adapter.
        checkpoint_sha256: Digest of the checkpoint with its adapter.
        calibration: Calibration of the weights; None where they were not quantized.
        dtype: Data type of weights, scales and the adapter.
        rank: Rank of the adapter.
        alpha: Alpha of the adapter.
        block_length: Block length of the drafts.
        settings: Settings of the training, as given.
        prompts: Numbers of the prompts whose answers were long enough to be used.
        training: Figures of the training.
        held_out: Comparison on prompts that decided nothing.
        validation: Comparison on the prompts that decided which adapter is kept.
        kept: Origin of the adapter in this folder. It is the trained one if that drafts better than
            the one before. Else it is the checkpoint's or, where it has none, an untrained one,
            which changes nothing.
        adapter_sha256: Digest of ``adapter_model.safetensors``.
        libraries: Versions of the libraries that took part.
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

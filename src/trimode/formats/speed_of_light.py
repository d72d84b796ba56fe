"""Declares ``speed_of_light.json``."""

from __future__ import annotations

from typing import Literal

from trimode.formats.record import Record

SCHEMA_VERSION = 1
REPORT = "speed_of_light.json"


class WayRecord(Record):
    """Measures one strategy of decoding over all prompts.

    Attributes:
        name: Name of the strategy.
        target: Text to reproduce: the tokens of serial denoising, or of greedy AR.
        num_tokens: Number of new tokens.
        nfe: Number of forwards as the reference counts them: denoise and commit forwards of
            diffusion; in speculation the prefill counts, too.
        tokens_per_forward: ``num_tokens / nfe``.
        num_steps: Number of denoise forwards of diffusion, of cycles of self-speculation, or of all
            forwards of AR.
        tokens_per_step: ``num_tokens / num_steps``; for self-speculation the acceptance length,
            which knows no limit on new tokens.
        same_as_target: Share of the prompts whose tokens are the target's.
        num_exhausted: Number of blocks whose search ended at its limit, which count as denoised
            serially; None where nothing is searched.
    """

    name: str
    target: Literal["serial denoising", "ar"]
    num_tokens: int
    nfe: int
    tokens_per_forward: float
    num_steps: int
    tokens_per_step: float
    same_as_target: float
    num_exhausted: int | None = None


class LightReport(Record):
    """Holds the contents of the file.

    ``ways`` are in the order of the table.
    """

    schema_version: int = SCHEMA_VERSION
    trimode_version: str
    command: str
    source_name: str
    source_sha256: str
    precision: str
    runs_on: str
    prompts_sha256: str
    num_prompts: int
    block_length: int
    max_new_tokens: int
    ways: tuple[WayRecord, ...]

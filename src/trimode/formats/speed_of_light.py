"""``speed_of_light.json``."""

from __future__ import annotations

from typing import Literal

from trimode.formats.record import Record

SCHEMA_VERSION = 1
REPORT = "speed_of_light.json"


class WayRecord(Record):
    """One way to decode, over all prompts.

    Attributes:
        name: Name of the way.
        target: Text to reproduce: the tokens of serial denoising, or of greedy AR.
        num_tokens: that came out.
        nfe: forwards, counted as the reference counts them: in diffusion denoise and commit
        forwards, in speculation the prefill too.
        tokens_per_forward: ``num_tokens / nfe``.
        num_steps: of ``nfe``, the denoise forwards of diffusion (what the report counts), the
        cycles of self-speculation, and all of AR's.
        tokens_per_step: ``num_tokens / num_steps``; of self-speculation the acceptance length,
        which knows no limit on new tokens.
        same_as_target: share of the prompts whose tokens are the target's.
        num_exhausted: blocks whose search ended at its limit, and which count as denoised serially;
            None where nothing is searched.
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
    """The contents of the file; ``ways`` in the order of the table."""

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

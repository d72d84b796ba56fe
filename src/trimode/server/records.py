"""Records what is known of a text once it has ended.

It serves metrics, logs, traces and answers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from trimode.errors import RequestCancelledError, RequestTimeoutError
from trimode.formats.contract import Mode
from trimode.runtime.decode.sequence import Forwards
from trimode.runtime.decode.stream import Generation
from trimode.runtime.engine.handle import Handle

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(frozen=True)
class Timeline:
    """Tells when things happened to a text, in seconds.

    Attributes:
        began_at: Unix time at which the request came.
        queue_s: Time in the queue; up to the end where it never had a row.
        prefill_s: From the row to the first token; None where none came.
        decode_s: From the first token to the end; None where none came.
        ttft_s: From the request's coming to the first token; None where none came.
        e2e_s: From the request's coming to the end.
        gaps_s: Times between one piece of tokens and the next.
    """

    began_at: float
    queue_s: float
    prefill_s: float | None
    decode_s: float | None
    ttft_s: float | None
    e2e_s: float
    gaps_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Drafts:
    """Counts the drafts of a text.

    The tokens before the drafts of a block do not count.

    Attributes:
        num_cycles: Blocks that were drafted and verified.
        num_tokens: Drafts that were verified.
        accepted: Accepted drafts of each block.
    """

    num_cycles: int = 0
    num_tokens: int = 0
    accepted: tuple[int, ...] = ()

    @property
    def num_accepted(self) -> int:
        """Accepted drafts in all."""
        return sum(self.accepted)

    @property
    def accepted_by_position(self) -> list[int]:
        """Blocks whose draft was accepted, by its position after the known token."""
        longest = max(self.accepted, default=0)
        return [sum(count > place for count in self.accepted) for place in range(longest)]

    @property
    def histogram(self) -> list[int]:
        """Blocks by the number of accepted drafts, from none on."""
        longest = max(self.accepted, default=-1)
        return [self.accepted.count(count) for count in range(longest + 1)]


@dataclass(frozen=True)
class Diffusion:
    """Counts the denoising of a text.

    Attributes:
        num_steps: Denoise forwards.
        num_slots: Slots of blocks in these forwards.
        num_committed: Tokens that came of them.
    """

    num_steps: int = 0
    num_slots: int = 0
    num_committed: int = 0


@dataclass(frozen=True)
class RequestRecord:
    """Tells all about one text that has ended, but what it says.

    Attributes:
        request_id: Identifier of the request; the same for all its texts.
        model: Name of the served model.
        mode: Mode that was asked for.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Tokens of the prompt that were not computed again.
        completion_tokens: Tokens that were delivered.
        finish_reason: ``stop`` or ``length``; else ``abort`` (cancelled), ``timeout``, ``error``.
        error: Name of the error's class; None where the text ended well.
        times: Times of its phases.
        forwards: Forwards by phase; None where the text did not end well.
        drafts: Drafts of self-speculation.
        diffusion: Denoising.
    """

    request_id: str
    model: str
    mode: Mode
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    error: str | None
    times: Timeline
    forwards: Forwards | None = None
    drafts: Drafts = field(default_factory=Drafts)
    diffusion: Diffusion = field(default_factory=Diffusion)

    @property
    def time_per_token_s(self) -> float | None:
        """Seconds per token after the first; None with fewer than two."""
        if self.times.decode_s is None or self.completion_tokens < 2:
            return None
        return self.times.decode_s / (self.completion_tokens - 1)


def make_record(
    handle: Handle, *, request_id: str, model: str, mode: Mode, received: float | None = None
) -> RequestRecord:
    """Make the record of a text that has ended.

    Args:
        handle: Handle of the text; it must be done.
        request_id: Identifier of the request.
        model: Name of the served model.
        mode: Mode that was asked for.
        received: Time of the request by ``time.perf_counter``; None = of its submission.

    Raises:
        ValueError: the text has not ended.
    """
    times, usage = _timeline(handle, received), handle.usage
    error = handle.error
    made = handle.result(0) if error is None else None
    return RequestRecord(
        request_id=request_id,
        model=model,
        mode=mode,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        finish_reason=_finish_reason(made, error),
        error=None if error is None else type(error).__name__,
        times=times,
        forwards=None if made is None else made.forwards,
        drafts=_drafts(made),
        diffusion=_diffusion(made),
    )


def _timeline(handle: Handle, received: float | None) -> Timeline:
    times = handle.times
    if times.ended is None:
        raise ValueError("expected a text that has ended, found one that is at work")
    received = times.submitted if received is None else received
    first = times.first_token
    return Timeline(
        began_at=time.time() - (time.perf_counter() - received),
        queue_s=(times.begun or times.ended) - times.submitted,
        prefill_s=None if first is None or times.begun is None else first - times.begun,
        decode_s=None if first is None else times.ended - first,
        ttft_s=None if first is None else first - received,
        e2e_s=times.ended - received,
        gaps_s=tuple(later - earlier for earlier, later in pairwise(list(times.pieces))),
    )


def _finish_reason(made: Generation | None, error: BaseException | None) -> FinishReason:
    if made is not None:
        return "stop" if made.finish_reason == "stop" else "length"
    if isinstance(error, RequestCancelledError):
        return "abort"
    return "timeout" if isinstance(error, RequestTimeoutError) else "error"


def _drafts(made: Generation | None) -> Drafts:
    if made is None:
        return Drafts()
    return Drafts(len(made.accepted), made.drafted, made.accepted)


def _diffusion(made: Generation | None) -> Diffusion:
    if made is None or made.mode != "diffusion":
        return Diffusion()
    return Diffusion(made.forwards.denoise, made.denoised_slots, len(made.token_ids))

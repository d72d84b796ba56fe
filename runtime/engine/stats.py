"""Counts what an engine does, and reports it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from trimode.formats.contract import GraphName, Mode
from trimode.runtime.engine.handle import Handle


@dataclass(frozen=True)
class ModeSwitch:
    """Describes a change of the plan for the running rows.

    Attributes:
        before: Block length before; 1 stands for AR.
        after: Block length from then on.
        num_rows: Rows that ran.
        num_queued: Requests that waited for a row.
        predicted_gain: Tokens a millisecond over those of the plan before, less 1.
        reason: Reason that the policy gave.
    """

    before: int
    after: int
    num_rows: int
    num_queued: int
    predicted_gain: float
    reason: str


@dataclass(frozen=True)
class RowStats:
    """Describes a row at work.

    Attributes:
        mode: Mode of its request.
        block_length: Block length of its step; 1 stands for AR.
        is_reading: Whether it reads its prompt.
        prompt_tokens: Tokens of its prompt.
        shared_tokens: Those of them that were not computed again.
        tokens: Tokens of prompt and answer so far.
        cached_tokens: Those of them that are cached.
        capacity: Slots of its cache.
    """

    mode: Mode
    block_length: int
    is_reading: bool
    prompt_tokens: int
    shared_tokens: int
    tokens: int
    cached_tokens: int
    capacity: int


@dataclass(frozen=True)
class EngineStats:
    """Reports what an engine has done, and what it is doing.

    Attributes:
        is_healthy: Whether it takes requests.
        running: Rows at work.
        waiting: Requests that wait for a row.
        free_rows: Rows that are free.
        rows_by_capacity: Slots of a cache -> rows at work in it.
        rows_by_mode: Mode that was asked for -> rows at work.
        finished: Requests that ended with a result.
        failed: Requests that ended with an error, cancelled and late ones included.
        steps: Steps that ran.
        failed_steps: Steps that failed and left every row at its last committed token.
        forwards: Forwards by graph.
        rows_per_forward: Rows that a forward served on average.
        forward_rows: Rows that forwards served, in all.
        forward_tokens: New tokens that forwards ran over, drafts and masked slots included.
        padding_tokens: Tokens that they ran over besides, so that rows have one length.
        step_sizes: Power of two -> steps that ran over as many new tokens, or fewer, but over more
            than half of it.
        prompt_tokens: Tokens of the prompts that got a row.
        cached_tokens: Those of them that were not computed again.
        completion_tokens: Tokens that were delivered.
        hits: Requests that had something computed before.
        kept_tokens: Tokens of ended texts in host memory.
        kept_bytes: Bytes of their K/V.
        evicted_tokens: Tokens that made room for others there.
        copied_tokens: Tokens whose K/V were copied as rows moved.
        prefill_s: Seconds in which prompts were read.
        decode_s: Seconds of all other steps.
        mode_switches: Plans that changed, the newest last; the last hundred.
        num_mode_switches: Plans that changed, in all.
        prediction_ratio: Measured over predicted time of forwards, of late; None without a table.
        rows: Rows at work.
        detours: Times that a forward waited for rows that were one forward behind.
        timing_alarms: Times that forwards took over 1.5 times what the table of timings says, for
            a minute.
    """

    is_healthy: bool
    running: int
    waiting: int
    free_rows: int
    rows_by_capacity: dict[int, int]
    rows_by_mode: dict[Mode, int]
    finished: int
    failed: int
    steps: int
    failed_steps: int
    forwards: dict[GraphName, int]
    rows_per_forward: float
    forward_rows: int
    forward_tokens: int
    padding_tokens: int
    step_sizes: dict[int, int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    hits: int
    kept_tokens: int
    kept_bytes: int
    evicted_tokens: int
    copied_tokens: int
    prefill_s: float
    decode_s: float
    mode_switches: tuple[ModeSwitch, ...]
    num_mode_switches: int
    prediction_ratio: float | None
    rows: tuple[RowStats, ...] = ()
    detours: int = 0
    timing_alarms: int = 0


@dataclass
class Counts:
    """Holds what the engine's thread counts; see :class:`EngineStats`."""

    finished: int = 0
    failed: int = 0
    steps: int = 0
    failed_steps: int = 0
    forwards: dict[GraphName, int] = field(default_factory=dict)
    rows_served: int = 0
    forward_tokens: int = 0
    padding_tokens: int = 0
    step_sizes: dict[int, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def ended(self, handle: Handle) -> None:
        """Count a request that is over, on whichever thread it ended."""
        with self._lock:
            if handle.error is None:
                self.finished += 1
            else:
                self.failed += 1

    def ran(self, graph_name: GraphName, tokens: Sequence[int], num_slots: int) -> None:
        """Count a forward.

        ``tokens`` are the new tokens of each row, ``num_slots`` all tokens that it ran over.
        """
        self.forwards[graph_name] = self.forwards.get(graph_name, 0) + 1
        self.rows_served += len(tokens)
        self.forward_tokens += sum(tokens)
        self.padding_tokens += num_slots - sum(tokens)

    def took(self, seconds: float, num_tokens: int, *, is_prefill: bool) -> None:
        """Count a step."""
        self.steps += 1
        size = 1 << max(0, num_tokens - 1).bit_length()
        self.step_sizes[size] = self.step_sizes.get(size, 0) + 1
        if is_prefill:
            self.prefill_s += seconds
        else:
            self.decode_s += seconds

    @property
    def rows_per_forward(self) -> float:
        """Rows that a forward served on average."""
        return self.rows_served / max(1, sum(self.forwards.values()))

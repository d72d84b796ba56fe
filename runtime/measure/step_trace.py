"""Makes records of an algorithm's forwards.

It turns what the algorithm asks for, and is given, into them. Nothing is asked of the algorithms. A
forward shows which positions were masked before it, and the next one, or the block that both are
about, which were afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.formats.trace import (
    Candidate,
    CommitRecord,
    ForwardRecord,
    ModeSwitch,
    Phase,
    PositionRecord,
    StepRecord,
)
from trimode.runtime.auto.policy import Reasoned
from trimode.runtime.decode.forward import Forward, Outputs
from trimode.runtime.decode.sampling import log_softmax
from trimode.runtime.decode.sequence import Forwards, Sequence
from trimode.runtime.decode.stream import Chunk, Step
from trimode.runtime.sessions.base import DeviceArray, Ids

NUM_CANDIDATES = 5
_COUNTED_BEFORE: tuple[Phase, ...] = ("denoise", "draft", "verify", "commit", "quadratic")
"""Phases whose forwards are counted as they are asked for; the others once they have run."""


@dataclass
class _Pending:
    """Holds a forward that has not come back.

    Attributes:
        input_ids: Tokens as they were when it was asked for: blocks are filled in place.
        phase: Phase of the forward; None where that shows afterwards.
        since: Time at which it was asked for.
        switch: Change of the way that began with it.
    """

    forward: Forward
    input_ids: Ids
    phase: Phase | None
    since: float
    switch: ModeSwitch | None


class StepTrace:
    """Observes one stream, and makes a record of each forward.

    Args:
        run: Number of the run in its trace.
        emit: Called with each record, on the thread that decodes.
        plan_reason: Gives the reason of the plan that mode ``auto`` follows in an engine.
    """

    def __init__(
        self,
        run: int,
        emit: Callable[[StepRecord], object],
        plan_reason: Callable[[], str] = str,
    ) -> None:
        self._run, self._emit, self._plan_reason = run, emit, plan_reason
        self._pending: _Pending | None = None
        self._start = time.perf_counter()
        self._counted: dict[str, int] = {}
        self._picks: dict[int, int] = {}
        self._block_length: int | None = None

    def __call__(self, step: Step) -> None:
        """Take note of a turn."""
        now = time.perf_counter()
        if step.result is None:
            self._start, self._counted = now, vars(Forwards(**vars(step.sequence.forwards)))
            return
        if self._pending is not None and step.outputs is not None:
            self._emit(self._record(self._pending, step, now))
        elif isinstance(step.result, Chunk) and step.result.token_ids:
            self._emit(self._commit(step.result, step, now))
        self._pending = None
        if isinstance(step.result, Forward):
            self._pending = self._asked(step.result, step, now)
        self._counted = dict(vars(step.sequence.forwards))

    def _asked(self, forward: Forward, step: Step, now: float) -> _Pending:
        grown = self._grown(step.sequence)
        phase = next((name for name in _COUNTED_BEFORE if grown.get(name)), None)
        return _Pending(forward, forward.token_ids.copy(), phase, now, self._switched(step))

    def _grown(self, sequence: Sequence) -> dict[str, int]:
        """Forwards by phase that were counted since the last turn."""
        return {
            name: count - self._counted.get(name, 0)
            for name, count in vars(sequence.forwards).items()
        }

    def _switched(self, step: Step) -> ModeSwitch | None:
        """Return the change of mode ``auto`` since the last turn.

        None where it has not chosen another way.
        """
        picks = step.counters.picks
        length = next((one for one in picks if picks[one] != self._picks.get(one)), None)
        if length is None:
            return None
        before, self._picks, self._block_length = self._block_length, dict(picks), length
        if before is None or before == length:
            return None
        policy = step.counters.policy
        reason = policy.reason if isinstance(policy, Reasoned) else self._plan_reason()
        return ModeSwitch(before=before, after=length, reason=reason)

    def _commit(self, chunk: Chunk, step: Step, now: float) -> CommitRecord:
        return CommitRecord(
            run=self._run,
            committed=tuple(chunk.token_ids),
            cached_length=step.sequence.cached_length,
            end_ms=_ms(now - self._start),
        )

    def _record(self, pending: _Pending, step: Step, now: float) -> ForwardRecord:
        forward, sequence = pending.forward, step.sequence
        assert step.outputs is not None
        committed = step.result.token_ids if isinstance(step.result, Chunk) else []
        grown = self._grown(sequence)
        phase: Phase = pending.phase or ("prefill" if grown["prefill"] else "decode")
        drafted, accepted, rejected = _judged(forward, pending.input_ids, committed, sequence)
        return ForwardRecord(
            run=self._run,
            graph=forward.graph_name,
            phase=phase,
            num_parts=max(1, grown["prefill"]) if phase == "prefill" else 1,
            past_length=forward.past_length,
            input_ids=tuple(pending.input_ids.tolist()),
            positions=tuple(_positions(pending, step, step.outputs)),
            drafted=tuple(drafted),
            accepted=accepted,
            rejected=rejected,
            committed=tuple(committed),
            cached_length=sequence.cached_length,
            nfe=step.counters.nfe,
            ms=_ms(now - pending.since),
            end_ms=_ms(now - self._start),
            switch=pending.switch,
        )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _judged(
    forward: Forward, input_ids: Ids, committed: list[int], sequence: Sequence
) -> tuple[list[int], int, int]:
    """Drafts that a forward verified, and how many were accepted and rejected."""
    if forward.graph_name not in ("verify", "quadratic"):
        return [], 0, 0
    drafted = input_ids[1:].tolist()
    became = sequence.tokens[forward.past_length + 1 :] if committed else []
    accepted = 0
    while accepted < min(len(drafted), len(became)) and drafted[accepted] == became[accepted]:
        accepted += 1
    is_wrong = accepted < min(len(drafted), len(became))
    return drafted, accepted, len(drafted) - accepted if is_wrong else 0


def _positions(pending: _Pending, step: Step, outputs: Outputs) -> Iterator[PositionRecord]:
    graph_name = pending.forward.graph_name
    if graph_name == "draft":
        return _masked(pending, step, outputs)
    if graph_name == "quadratic":
        return iter((*_causal(pending, step, outputs[0], outputs[2]), *_drafts(step, outputs)))
    logits = outputs[2] if graph_name == "verify" else outputs[1]
    return _causal(pending, step, outputs[0], logits)


def _masked(pending: _Pending, step: Step, outputs: Outputs) -> Iterator[PositionRecord]:
    """Positions that a draft or denoise forward saw masked."""
    mask, past = step.sequence.model.mask_token_id, pending.forward.past_length
    after = pending.forward.token_ids.copy()
    if isinstance(step.result, Forward) and step.result.past_length == past:
        seen = step.result.token_ids[: len(after)]
        after[: len(seen)] = seen
    ids, probabilities = outputs
    for slot in np.flatnonzero(pending.input_ids == mask).tolist():
        token = None if after[slot] == mask else int(after[slot])
        yield _position(past + slot, token, ids[slot], probabilities[slot])


def _drafts(step: Step, outputs: Outputs) -> Iterator[PositionRecord]:
    """Positions that a quadratic forward has drafted behind the right drafts.

    The first of them is known from the causal rows.
    """
    if not isinstance(step.result, Chunk) or step.result.finish_reason is not None:
        return
    ids, probabilities = outputs[3], outputs[4]
    begin = len(step.sequence.tokens)
    for slot in range(1, len(ids)):
        yield _position(begin + slot, int(ids[slot, 0]), ids[slot], probabilities[slot])


def _causal(pending: _Pending, step: Step, greedy: Any, logits: Any) -> Iterator[PositionRecord]:
    """Yield positions after the rows of a causal forward.

    Those that were decided already are left out.
    """
    first, num_rows = pending.forward.past_length + 1, len(pending.input_ids)
    end, is_whole = len(step.sequence.tokens), np.ndim(greedy) == 1
    begin = end - (len(step.result.token_ids) if isinstance(step.result, Chunk) else 0)
    for row in range(0 if is_whole else num_rows - 1, num_rows):
        if begin <= first + row <= end:
            row_logits = _row(logits, row) if is_whole else logits
            yield _position(first + row, _decided(step, first + row), *_best(row_logits))


def _decided(step: Step, position: int) -> int | None:
    """Return the token that a position has after a turn.

    None where it is not decided.
    """
    tokens, following = step.sequence.tokens, step.result
    if position < len(tokens):
        return tokens[position]
    if isinstance(following, Forward):
        slot = position - following.past_length
        if slot < len(following.token_ids) and slot >= 0:
            token = int(following.token_ids[slot])
            return None if token == step.sequence.model.mask_token_id else token
    return None


def _row(logits: Any, row: int) -> Any:
    return None if isinstance(logits, DeviceArray) else logits[row]


def _best(logits: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return most probable tokens and their probabilities, of logits ``(V,)``.

    There are none where the logits are not on the host.
    """
    if logits is None or isinstance(logits, DeviceArray):
        return np.empty(0, np.int64), np.empty(0)
    values = log_softmax(np.asarray(logits))
    count = min(NUM_CANDIDATES, values.size)
    best = np.argpartition(values, values.size - count)[values.size - count :]
    best = best[np.lexsort((best, -values[best]))]
    return best, np.exp(values[best])


def _position(position: int, token: int | None, ids: Any, probabilities: Any) -> PositionRecord:
    named = dict(zip(ids.tolist(), np.asarray(probabilities, np.float64).tolist(), strict=True))
    top = tuple(Candidate(token_id=one, probability=round(p, 6)) for one, p in named.items())
    confidence = None if token is None else named.get(token)
    return PositionRecord(
        position=position,
        token_id=token,
        confidence=None if confidence is None else round(confidence, 6),
        top=top,
    )

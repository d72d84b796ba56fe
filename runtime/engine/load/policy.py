"""Chooses the plan that gives most tokens a millisecond, by load.

It also decides when the plan changes.

The load decides more than the text. A forward of few rows waits for memory, so blocks are nearly
free; with many rows it computes, and each drafted token has its price. As load rises the block
shrinks, from 32 to 4, and ends in AR. All choices give AR's tokens, so only time is at stake.

A plan changes when another one is better by :data:`LEAST_GAIN` in :data:`NUM_EVALUATIONS`
evaluations in a row, and not before the rows have had some cycles under the present one. What a
choice gives is only estimated, and two choices are often close: without this, modes would swing.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.engine.load.candidates import (
    Candidate,
    Prospect,
    judge,
    splits,
    uniform,
)
from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.load.probing import Prober
from trimode.runtime.engine.load.state import ModePlan, RowState

logger = logging.getLogger("trimode.runtime")
CHANGED_LOAD = 0.25
"""Share of the running rows whose coming or going makes an evaluation due at once."""
FIRST_EVALUATIONS = 24
"""Evaluations that follow each other closely, since at first nothing is known of the texts."""
SHORT_INTERVAL = 0.25
"""Share of the usual least interval, where evaluations follow each other closely."""
SPLIT_GAIN = 0.10
"""Gain over the best uniform choice from which on a split is considered. It rests on differences
between rows, and those that look best are mostly not quite as good.
"""
KEPT_SWITCHES = 256


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """Says how readily plans change, and what latency they may cost.

    Attributes:
        least_gain: Predicted gain below which nothing changes.
        num_evaluations: Evaluations in a row that a gain has to hold for.
        dwell_cycles: Cycles between two evaluations, and least cycles between two switches.
        least_interval_ms: Least time between two evaluations, a quarter of it after changes of
            load.
        tpot_ms: Most milliseconds a token of the row served worst, where a plan can keep to it.
        step_ms: Most milliseconds of a forward while requests are waiting, where a plan can.
        probe_share: Share of the time that is spent on drafts to learn from, while all is AR.
    """

    least_gain: float = 0.05
    num_evaluations: int = 3
    dwell_cycles: int = 8
    least_interval_ms: float = 200.0
    tpot_ms: float | None = None
    step_ms: float | None = None
    probe_share: float = 0.005


class Switch(NamedTuple):
    """Records a change of plan, for logs and metrics.

    Attributes:
        at_ms: Time of the engine's clock.
        before: Name of the plan before.
        after: Name of the plan from now on.
        num_rows: Running rows.
        num_queued: Requests that wait for a row.
        predicted_gain: Tokens a millisecond over those of the plan before, less 1.
        reason: Change since the last switch, in words.
    """

    at_ms: float
    before: str
    after: str
    num_rows: int
    num_queued: int
    predicted_gain: float
    reason: str


class LoadPolicy:
    """Chooses one plan for the running rows by a table of costs.

    It satisfies :class:`~trimode.runtime.engine.load.state.ModePolicy`. For one thread.

    Args:
        table: Costs of the forwards; who runs them calls its ``observe``.
        settings: Settings of when plans change; None = the defaults.
        lengths: Block lengths to choose from; None = all that the table has.
        is_prior_measured: Whether the first expectations of rows were measured on such texts.

    Attributes:
        switches: The latest changes of plan.
        counts: Number of switches by ``(before, after, reason)``.
    """

    def __init__(
        self,
        table: CostTable,
        settings: LoadSettings | None = None,
        lengths: Sequence[int] | None = None,
        *,
        is_prior_measured: bool = False,
    ) -> None:
        self._table, self._is_prior_measured = table, is_prior_measured
        self._settings = settings or LoadSettings()
        self._lengths = table.lengths if lengths is None else tuple(lengths)
        self.switches: deque[Switch] = deque(maxlen=KEPT_SWITCHES)
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self._current: Candidate | None = None
        self._plan = ModePlan()
        self._held: dict[str, int] = {}
        self._num_evaluations = 0
        self._load = _Load(0, 0.0, 0.0)
        self._load_at_switch = self._load
        self._next_ms = self._switch_after_ms = -float("inf")
        self._soonest_ms = -float("inf")
        self._prober = Prober(table, self._settings.probe_share)

    def is_due(self, num_rows: int, now_ms: float) -> bool:
        """Whether time has come, or a quarter of the rows has changed."""
        if not num_rows or now_ms < self._soonest_ms:
            return False
        return now_ms >= self._next_ms or _is_other(num_rows, self._load.num_rows)

    def plan(self, rows: Sequence[RowState], now_ms: float, *, num_queued: int = 0) -> ModePlan:
        """Evaluate every choice, and return the plan from now on."""
        if all(row.is_pinned for row in rows):
            return self._plan
        self._load = _Load.of(rows, self._lengths)
        prospects = self._prospects(rows, num_queued)
        current = self._current_prospect(rows, prospects, now_ms)
        best = self._better(prospects, current)
        if best is not None and now_ms >= self._switch_after_ms:
            self._switch(best, current, now_ms, num_queued)
            current = best
        self._schedule(current.round_ms, now_ms)
        return self._with_probe(rows, current, now_ms)

    def _prospects(self, rows: Sequence[RowState], num_queued: int) -> list[Prospect]:
        """Return all choices that keep the latency targets.

        Where none does, all are returned.
        """
        found = [judge(one, rows, self._table) for one in uniform(self._lengths)]
        longer = max(found[1:], key=lambda one: one.tokens_per_ms, default=None)
        if longer is not None:
            divided = splits(rows, longer.candidate.block_length)
            least = (1 + SPLIT_GAIN) * max(one.tokens_per_ms for one in found)
            divided_too = [judge(one, rows, self._table) for one in divided]
            found += [one for one in divided_too if one.tokens_per_ms >= least]
        return [one for one in found if self._is_fast_enough(one, num_queued)] or found

    def _is_fast_enough(self, one: Prospect, num_queued: int) -> bool:
        tpot_ms, step_ms = self._settings.tpot_ms, self._settings.step_ms
        return (tpot_ms is None or one.slowest_ms <= tpot_ms) and (
            step_ms is None or not num_queued or one.longest_ms <= step_ms
        )

    def _current_prospect(
        self, rows: Sequence[RowState], prospects: Sequence[Prospect], now_ms: float
    ) -> Prospect:
        """Judge the present plan; the first plan is the best one.

        Where nothing is known of the texts, it is the best one with blocks. In AR nothing would be
        learned, and a prior that is too low would keep it.
        """
        if self._current is None:
            drafting = [one for one in prospects if one.candidate.block_length != AR_STEP]
            tried = prospects if self._is_prior_measured else drafting or prospects
            best = max(tried, key=lambda one: one.tokens_per_ms)
            self._adopt(best, now_ms, 0.0, "start")
            self._switch_after_ms = now_ms  # the first plan stands on nothing that was seen
            return best
        return judge(self._current, rows, self._table)

    def _better(self, prospects: Sequence[Prospect], current: Prospect) -> Prospect | None:
        """Find the best of the choices that have been better long enough."""
        least = (1 + self._settings.least_gain) * current.tokens_per_ms
        better = {one.candidate.name: one for one in prospects if one.tokens_per_ms >= least}
        self._held = {name: self._held.get(name, 0) + 1 for name in better}
        lasting = [
            one
            for name, one in better.items()
            if self._held[name] >= self._settings.num_evaluations
        ]
        return max(lasting, key=lambda one: one.tokens_per_ms, default=None)

    def _switch(self, best: Prospect, current: Prospect, now_ms: float, num_queued: int) -> None:
        gain = best.tokens_per_ms / current.tokens_per_ms - 1
        reason = self._load.reason_since(self._load_at_switch)
        before, after = current.candidate.name, best.candidate.name
        switch = Switch(now_ms, before, after, self._load.num_rows, num_queued, gain, reason)
        self.switches.append(switch)
        self.counts[before, after, reason] += 1
        logger.info("modes by load: %s", switch._asdict())
        self._adopt(best, now_ms, gain, reason)

    def _adopt(self, best: Prospect, now_ms: float, gain: float, reason: str) -> None:
        self._current, self._held, self._load_at_switch = best.candidate, {}, self._load
        self._switch_after_ms = now_ms + self._settings.dwell_cycles * best.round_ms
        self._plan = ModePlan(
            best.candidate.block_length,
            best.candidate.exceptions,
            reason,
            gain,
            best.tokens_per_ms,
        )

    def _schedule(self, round_ms: float, now_ms: float) -> None:
        """Evaluate again after some cycles; sooner at first, and for another load.

        Rows that come and go are facts. Acceptance is an estimate that wanders, and evaluations
        close to each other would all see the same of it.
        """
        self._num_evaluations += 1
        is_known = self._num_evaluations > FIRST_EVALUATIONS
        is_settled = is_known and not self._load.has_other_rows_than(self._load_at_switch)
        least_ms = self._settings.least_interval_ms
        soon_ms = max(round_ms, SHORT_INTERVAL * least_ms)
        later_ms = max(self._settings.dwell_cycles * round_ms, least_ms)
        self._next_ms = now_ms + (later_ms if is_settled else soon_ms)
        self._soonest_ms = now_ms + SHORT_INTERVAL * least_ms

    def _with_probe(self, rows: Sequence[RowState], current: Prospect, now_ms: float) -> ModePlan:
        """Return the plan, sometimes with one row that drafts.

        Where all rows are in AR, one drafts for a moment.
        """
        probe = self._prober.probe(current, rows, self._lengths, now_ms)
        if probe is None:
            return self._plan
        row, lasts_ms = probe
        self._next_ms = now_ms + lasts_ms
        return replace(self._plan, exceptions={row.key: self._lengths[0]}, reason="probe")


class _Load(NamedTuple):
    """Holds what a plan was made for."""

    num_rows: int
    cached: float
    expected_tokens: float

    @classmethod
    def of(cls, rows: Sequence[RowState], lengths: Sequence[int]) -> _Load:
        longest = lengths[-1] if lengths else AR_STEP
        expected = [row.expected_tokens(longest) for row in rows]
        cached = [row.cached_length for row in rows]
        return cls(len(rows), sum(cached) / len(rows), sum(expected) / len(rows))

    def has_other_rows_than(self, before: _Load) -> bool:
        """Whether more or fewer rows run, by a quarter."""
        return _is_other(self.num_rows, before.num_rows)

    def reason_since(self, before: _Load) -> str:
        """Say what differs most, in words that metrics can count."""
        return next(self._changes(before), "timings")

    def _changes(self, before: _Load) -> Iterator[str]:
        if self.has_other_rows_than(before):
            yield "more rows" if self.num_rows > before.num_rows else "fewer rows"
        if abs(self.expected_tokens - before.expected_tokens) >= 0.1 * before.expected_tokens:
            is_more = self.expected_tokens > before.expected_tokens
            yield "higher acceptance" if is_more else "lower acceptance"
        if _is_other(self.cached, before.cached):
            yield "longer texts" if self.cached > before.cached else "shorter texts"


def _is_other(now: float, before: float) -> bool:
    return abs(now - before) >= CHANGED_LOAD * max(before, 1)

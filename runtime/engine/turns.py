"""Decides which rows run next.

Reading prompts takes turns with decoding, and capacities with each other. What a row's tokens are
does not depend on any of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimode.runtime.decode.sequence import PREFILL_CHUNK
from trimode.runtime.engine.detours import Detours, Step
from trimode.runtime.engine.grouping import PATIENCE, Waiting, by_kind, choose_group
from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.row import CacheGroup, EngineRow

LEAST_CHUNK = 16
"""Fewest prompt tokens of a forward, however long it takes."""
_NEW = 0.3
"""Weight of the newest measurement."""


@dataclass(frozen=True)
class StepPlan:
    """Describes one step: forwards of one kind, over one group.

    Rows of a group have the same capacity.

    Attributes:
        group: Rows that it is about.
        waiting: Rows of it that run, with their forwards.
        num_rows: Rows that share its group's time.
        is_prefill: Whether it reads prompts.
        is_shared: Whether rows wait that read, and others that decode.
    """

    group: CacheGroup
    waiting: list[Waiting]
    num_rows: int
    is_prefill: bool
    is_shared: bool


class ChunkCosts:
    """Knows how long reading takes, from what reading took."""

    def __init__(self) -> None:
        self._per_token: dict[tuple[int, int], float] = {}

    def record(self, capacity: int, num_tokens: int, seconds: float) -> None:
        """Take note of a forward of ``num_tokens``, those of all rows together."""
        key, found = (capacity, num_tokens.bit_length()), seconds / num_tokens
        self._per_token[key] = found + (1 - _NEW) * (self._per_token.get(key, found) - found)

    def seconds(self, capacity: int, num_tokens: int) -> float | None:
        """Predict the time of reading; None where nothing was measured yet.

        A size that was not measured counts as the nearest one, another capacity as many times as
        its slots are.
        """
        if not self._per_token:
            return None
        size = num_tokens.bit_length()
        near = min(
            self._per_token,
            key=lambda key: (abs(key[0].bit_length() - capacity.bit_length()), abs(key[1] - size)),
        )
        return self._per_token[near] * num_tokens * max(1.0, capacity / near[0])

    def chunk(self, capacity: int, target_s: float) -> int:
        """Return the most tokens that are read within ``target_s`` seconds.

        It goes by what is known of the costs.
        """
        size = PREFILL_CHUNK
        while size > LEAST_CHUNK:
            seconds = self.seconds(capacity, size)
            if seconds is not None and seconds <= target_s:
                break
            size //= 2
        return size


class TimeShare:
    """Lets reading have a share of the time while others decode.

    Args:
        share: Share of reading, from 0 to below 1.
        most_s: Most seconds that decoding may be ahead; so chunks never come in a row.
    """

    def __init__(self, share: float, most_s: float) -> None:
        self._ratio, self._most = share / (1 - share), most_s
        self._credit = 0.0

    @property
    def may_read(self) -> bool:
        """Whether reading is due."""
        return self._credit >= 0

    def may_read_ahead(self, seconds: float) -> bool:
        """Whether reading may have these seconds before it is due.

        Decoding makes up for them.
        """
        return self._credit - seconds >= -self._most

    def record(self, seconds: float, *, is_prefill: bool, is_shared: bool) -> None:
        """Take note of a step.

        ``is_shared`` says that somebody else would have liked to run.
        """
        if not is_shared:
            self._credit = 0.0
        elif is_prefill:
            self._credit -= seconds
        else:
            self._credit = min(self._credit + seconds * self._ratio, self._most)


class Turns:
    """Plans the steps.

    Args:
        latency_target_s: Most seconds that a part of a prompt may keep a decoding row waiting.
        prefill_share: Share of the time that reading has while others decode.
        table: Costs of forwards, by which rows wait for others; None = none does.

    Attributes:
        costs: Costs of reading.
        detours: Detours, which decide who waits for whom.
    """

    def __init__(
        self, latency_target_s: float, prefill_share: float, table: CostTable | None = None
    ) -> None:
        self.costs, self._waits = ChunkCosts(), table is not None
        self.detours = Detours(table, 1000 * latency_target_s)
        self._target = latency_target_s
        self._share = TimeShare(prefill_share, latency_target_s)
        self._least_spent = 0.0

    def plan(self, rows: Sequence[EngineRow]) -> StepPlan | None:
        """Plan the next step.

        The rows wait for a forward and have a place. Without any, the result is None.
        """
        reading: list[EngineRow] = []
        decoding: list[EngineRow] = []
        for row in rows:
            (reading if row.is_reading else decoding).append(row)
        is_shared = bool(reading and decoding)
        if reading and (not decoding or self._share.may_read):
            return self._read(reading, is_shared=is_shared)
        return self._decode(decoding, reading) if decoding else None

    def record(self, plan: StepPlan, seconds: float) -> None:
        """Take note of how long a step took."""
        if plan.is_prefill:
            tokens = max(one.num_tokens for one in plan.waiting) * len(plan.waiting)
            self.costs.record(plan.group.capacity, tokens, seconds)
        else:
            plan.group.spent += seconds / plan.num_rows
        self._share.record(seconds, is_prefill=plan.is_prefill, is_shared=plan.is_shared)

    def _read(self, reading: Sequence[EngineRow], *, is_shared: bool) -> StepPlan:
        """Read for the row that comes first, and others with it.

        Others are read where all have room in one chunk.
        """
        order = sorted(reading, key=lambda row: (-row.request.priority, row.request.number))
        first, group = order[0], group_of(order[0])
        budget = self.costs.chunk(group.capacity, self._target) if is_shared else PREFILL_CHUNK
        taken = [_waiting(first, budget)]
        longest = taken[0].num_tokens
        for row in order[1:]:
            if row.group is not group or row.attempts or first.attempts:
                continue
            one = _waiting(row, budget)
            padded = max(longest, one.num_tokens)
            if _size(one.num_tokens) == _size(longest) and padded * (len(taken) + 1) <= budget:
                taken.append(one)
                longest = padded
        return StepPlan(group, taken, len(taken), True, is_shared)

    def _decode(self, decoding: Sequence[EngineRow], reading: Sequence[EngineRow]) -> StepPlan:
        """Plan for the group whose rows have had least time.

        Of the group, the kind of forward that comes next runs.
        """
        groups = {group_of(row) for row in decoding}
        for group in groups:  # one that was empty for a while has nothing to make up for
            group.spent = max(group.spent, self._least_spent)
        group = min(groups, key=lambda group: group.spent)
        self._least_spent = group.spent
        members = [row for row in decoding if row.group is group]
        suspects = [row for row in members if row.attempts]
        running = suspects[:1] or members  # alone, to know whose forward it is that fails
        waiting = [_waiting(row, row.num_left) for row in running]
        chosen = choose_group(waiting, group.num_steps)
        plan = StepPlan(group, chosen, len(members), False, bool(reading))
        if suspects or not self._waits:
            return plan
        return self._detour(plan, waiting, reading) or plan

    def _detour(
        self,
        plan: StepPlan,
        waiting: Sequence[Waiting],
        reading: Sequence[EngineRow],
    ) -> StepPlan | None:
        """Find what the plan's rows should wait for; mostly None.

        It lets other rows join them.
        """
        group = plan.group
        readers = [row for row in reading if row.group is group and not row.attempts]
        rest = [one for one in waiting if one not in plan.waiting]
        held = group.num_steps - min(one.since for one in plan.waiting)
        if not (rest or readers) or held >= PATIENCE:
            return None
        ready = [group.at(one.row) for one in plan.waiting]
        plans = [replace(plan, waiting=members) for members in by_kind(rest)]
        if readers:
            plans.append(self._read(readers, is_shared=True))
        return self.detours.first(ready, [one for one in map(self._step, plans) if one])

    def _step(self, plan: StepPlan) -> Step[StepPlan] | None:
        """Return a plan with its rows and its time.

        It is None where the time is unknown. It is None, too, for reading that may not come early,
        or that would leave tokens of its forwards for later.
        """
        rows = [plan.group.at(one.row) for one in plan.waiting]
        if not plan.is_prefill:
            ms = self.detours.ms(rows)
            return None if ms is None else Step(plan, rows, ms)
        tokens = max(one.num_tokens for one in plan.waiting) * len(rows)
        seconds = self.costs.seconds(plan.group.capacity, tokens)
        is_whole = all(
            row.num_left == one.num_tokens for row, one in zip(rows, plan.waiting, strict=True)
        )
        if seconds is None or not is_whole or not self._share.may_read_ahead(seconds):
            return None
        return Step(plan, rows, 1000 * seconds)


def group_of(row: EngineRow) -> CacheGroup:
    """Return the group of a row that has a place."""
    assert row.group is not None
    return row.group


def _waiting(row: EngineRow, most_tokens: int) -> Waiting:
    return Waiting(row.place, row.part(most_tokens), row.since)


def _size(num_tokens: int) -> int:
    """Return the size of a chunk, in powers of two.

    Chunks of one size may run in one forward.
    """
    return (num_tokens - 1).bit_length()

"""An engine whose forwards take the time that a table says, with the runtime's own policy.

What is the runtime's: the policy, each row's estimate of acceptance, the choice of the rows that
run together, and the rule for waiting. What is simulated: texts, arrivals, and the clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from trimode.formats.contract import GraphName
from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.auto.prior import AcceptanceHistory
from trimode.runtime.decode.forward import Forward
from trimode.runtime.engine.grouping import Waiting, choose_group
from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.load.rows import Pools, RowPolicy
from trimode.runtime.engine.load.state import ModePolicy, RowState
from trimode.runtime.engine.load.waiting import ComingRows, ReadyRows, first_to_run

PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Text:
    """A request: when it comes, its prompt's length, and how its drafts will do.

    Attributes:
        at_ms: Time of arrival.
        prompt_length: Tokens of the prompt.
        accepted_from: Drafts accepted in a row from each position, ``(length,)``.
    """

    at_ms: float
    prompt_length: int
    accepted_from: Sequence[int]


@dataclass
class Finished:
    """When a text came, had its first token, and ended; milliseconds."""

    at_ms: float
    first_ms: float
    end_ms: float
    num_tokens: int


@dataclass
class Outcome:
    """What a simulated run has given.

    Attributes:
        until_ms: End of the run.
        num_tokens: Tokens delivered by then.
        num_forwards: Forwards that ran.
        num_row_forwards: Rows in them, summed up.
        finished: Texts that have ended.
        plans: Time and block length at each change of plan; probes left out.
    """

    until_ms: float = 0.0
    num_tokens: int = 0
    num_forwards: int = 0
    num_row_forwards: int = 0
    finished: list[Finished] = field(default_factory=list)
    plans: list[tuple[float, int]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.num_tokens / self.until_ms

    @property
    def rows_per_forward(self) -> float:
        return self.num_row_forwards / self.num_forwards

    def latency_ms(self, percent: float) -> float:
        """Percentile of the time from a request to its last token."""
        return float(np.percentile([one.end_ms - one.at_ms for one in self.finished], percent))


class _Row:
    """A running text and the forward that it waits for."""

    def __init__(self, key: int, text: Text, policy: RowPolicy) -> None:
        self.key, self.text, self.policy = key, text, policy
        self.position, self.first_ms = 0, 0.0
        self.unread = text.prompt_length
        self.forward = self._chunk()

    @property
    def cached_length(self) -> int:
        return self.text.prompt_length - self.unread + self.position

    @property
    def left(self) -> int:
        return len(self.text.accepted_from) - self.position

    def _chunk(self) -> Forward:
        return _forward("ar", min(self.unread, PREFILL_CHUNK))

    def advance(self) -> int:
        """Go on with what the forward gave; returns the tokens of it."""
        graph_name, num_tokens = self.forward.graph_name, len(self.forward.token_ids)
        if graph_name == "draft":
            self.policy.rows_to_verify(min(self.left, num_tokens), None)
            self.forward = _forward("verify", num_tokens)
            return 0
        if graph_name == "ar" and self.unread:
            self.unread -= num_tokens
            if self.unread:
                self.forward = self._chunk()
                return 0
            count = 1
        elif graph_name == "ar":
            count = 1
            self.policy.record(1)
        else:
            accepted = min(self.text.accepted_from[self.position], num_tokens - 1)
            count = min(accepted + 1, self.left)
            self.policy.record(count)
        self.position += count
        if self.left:
            length = self.policy.choose(self.cached_length, self.left)
            self.forward = _forward("ar" if length == AR_STEP else "draft", length)
        return count

    @property
    def is_cyclic(self) -> bool:
        """Whether it has read all of its prompt but what its forward reads."""
        return self.unread <= len(self.forward.token_ids)

    def state(self) -> RowState:
        row = self.policy
        return RowState(
            self.key, "auto", self.cached_length, self.left, row.likely, row.block_length
        )


@cache
def _forward(graph_name: GraphName, num_tokens: int) -> Forward:
    return Forward(graph_name, np.zeros(num_tokens, np.int64), 0)


@dataclass
class Simulator:
    """Runs texts against a policy.

    Attributes:
        truth: Milliseconds of the forwards.
        policy: Chooses modes.
        table: What the policy believes of them, and learns; for the rule of waiting, too.
        max_rows: Most rows at a time.
        waits: Whether rows wait for others by the rule.
        noise: Spread of forwards' times, as the standard deviation of their logarithm.
    """

    truth: CostTable
    policy: ModePolicy
    table: CostTable
    max_rows: int = 128
    waits: bool = True
    noise: float = 0.0
    slowdown: Callable[[float], float] = lambda _: 1.0

    def run(
        self,
        texts: Iterable[Text],
        until_ms: float = float("inf"),
        renew: Callable[[float, int], Text | None] = lambda _now, _active: None,
    ) -> Outcome:
        """Run until a time.

        Args:
            texts: Requests of the beginning.
            until_ms: Time to stop at.
            renew: Called as a text ends, with the time and the number of others that are running or
                waiting; the request that follows it, or None.
        """
        self._outcome, self._now, self._step = Outcome(), 0.0, 0
        self._rng = np.random.default_rng(0)
        self._queue = [(text.at_ms, number, text) for number, text in enumerate(texts)]
        heapq.heapify(self._queue)
        self._count, self._renew = len(self._queue), renew
        self._rows: list[_Row] = []
        self._since: dict[int, int] = {}
        self._plan = self.policy.plan([], 0.0)
        self._pools = Pools(AcceptanceHistory(), max((*self.table.lengths, 2)))
        while self._now < until_ms and (self._rows or self._queue):
            self._admit()
            if self._rows:
                self._replan()
                self._run_one()
            else:
                self._now = max(self._now, self._queue[0][0])
        self._outcome.until_ms = self._now
        return self._outcome

    def _admit(self) -> None:
        while self._queue and self._queue[0][0] <= self._now and len(self._rows) < self.max_rows:
            _, number, text = heapq.heappop(self._queue)
            policy = RowPolicy(self._pools.of([]), lambda key=number: self._plan.length_of(key))  # type: ignore[misc]
            self._rows.append(_Row(number, text, policy))
            self._since[number] = self._step

    def _replan(self) -> None:
        if not self.policy.is_due(len(self._rows), self._now):
            return
        rows = [row.state() for row in self._rows if row.is_cyclic]
        waiting = sum(at <= self._now for at, *_ in self._queue)
        plan = self.policy.plan(rows, self._now, num_queued=waiting) if rows else self._plan
        if (plan.block_length, len(plan.exceptions) > 1) != (
            self._plan.block_length,
            len(self._plan.exceptions) > 1,
        ):
            self._outcome.plans.append((self._now, plan.block_length))
        self._plan = plan

    def _run_one(self) -> None:
        waiting = [
            Waiting(place, row.forward, self._since[row.key])
            for place, row in enumerate(self._rows)
        ]
        group = [self._rows[one.row] for one in choose_group(waiting, self._step)]
        if self.waits:
            group = self._detour(group)
        graph_name = group[0].forward.graph_name
        tokens = max(len(row.forward.token_ids) for row in group)
        cached = max(row.cached_length for row in group)
        true_ms = self.truth.ms(graph_name, len(group), tokens, cached) * self.slowdown(self._now)
        true_ms *= float(np.exp(self.noise * self._rng.standard_normal())) if self.noise else 1.0
        self.table.observe(graph_name, len(group), tokens, cached, true_ms)
        self._now += true_ms
        self._step += 1
        self._outcome.num_forwards += 1
        self._outcome.num_row_forwards += len(group)
        for row in group:
            self._go_on(row)

    def _detour(self, group: list[_Row]) -> list[_Row]:
        """The rows that run first, so that they can join the chosen ones."""
        kinds: dict[tuple[GraphName, int], list[_Row]] = {}
        for row in self._rows:
            kinds.setdefault((row.forward.graph_name, len(row.forward.token_ids)), []).append(row)
        ready = _ready(group)
        others = [
            rows for rows in kinds.values() if rows[0] not in group and self._joins(rows, ready)
        ]
        coming = [ComingRows(len(rows), 1, _ready(rows).ms(self.table)) for rows in others]
        first = first_to_run(ready, coming, self.table)
        return group if first is None else others[first]

    def _joins(self, rows: list[_Row], ready: ReadyRows) -> bool:
        """Whether rows will wait for the ready forward after their present one."""
        forward = rows[0].forward
        if forward.graph_name == "draft":
            return (ready.graph_name, ready.tokens) == ("verify", len(forward.token_ids))
        if not rows[0].is_cyclic:
            return False
        length = self._plan.length_of(rows[0].key)
        return (ready.graph_name, ready.tokens) == ("ar" if length == AR_STEP else "draft", length)

    def _num_active(self) -> int:
        return len(self._rows) + sum(at <= self._now for at, *_ in self._queue)

    def _go_on(self, row: _Row) -> None:
        count = row.advance()
        self._outcome.num_tokens += count
        self._since[row.key] = self._step
        row.first_ms = row.first_ms or (self._now if count else 0.0)
        if row.left:
            return
        self._rows.remove(row)
        length = len(row.text.accepted_from)
        self._outcome.finished.append(Finished(row.text.at_ms, row.first_ms, self._now, length))
        following = self._renew(self._now, self._num_active())
        if following is not None:
            heapq.heappush(self._queue, (following.at_ms, self._count, following))
            self._count += 1


def _ready(rows: Sequence[_Row]) -> ReadyRows:
    tokens = max(len(row.forward.token_ids) for row in rows)
    cached = max(row.cached_length for row in rows)
    return ReadyRows(rows[0].forward.graph_name, len(rows), tokens, cached)

"""Lets rows wait for others that are one forward behind.

They wait where a joint forward pays for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from trimode.formats.contract import GraphName
from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.load.waiting import ComingRows, ReadyRows, first_to_run
from trimode.runtime.engine.row import EngineRow

P = TypeVar("P")


class Step(NamedTuple, Generic[P]):
    """Describes a step that could run now.

    Attributes:
        plan: Plan of the step.
        rows: Rows that run.
        ms: Time that it takes, in milliseconds.
    """

    plan: P
    rows: Sequence[EngineRow]
    ms: float


class Detours:
    """Decides who runs first.

    A forward waits once, and not longer than the latency target.

    Args:
        table: Costs of the forwards; None = nobody waits.
        most_ms: Most milliseconds that a forward waits, once it could run.

    Attributes:
        num_taken: Times that rows waited.
    """

    def __init__(self, table: CostTable | None, most_ms: float) -> None:
        self._table, self._most_ms = table, most_ms
        self.num_taken = 0

    def ms(self, rows: Sequence[EngineRow]) -> float | None:
        """Predict the milliseconds of the forward that rows wait for.

        The rows are of one kind. The result is None where the time is unknown.
        """
        ready = _ready(rows)
        if self._table is None or not self._table.knows(ready.graph_name):
            return None
        return ready.ms(self._table)

    def first(self, ready: Sequence[EngineRow], steps: Iterable[Step[P]]) -> P | None:
        """Find the step to run first, so that its rows can join.

        It runs before the ready rows' own step, and its rows join them. The result is its plan,
        mostly None.
        """
        kind = _kind(ready[0])
        if self._table is None or not self._table.knows(kind[0]):
            return None
        counted = [(step, sum(next_kind(row) == kind for row in step.rows)) for step in steps]
        useful = [(step, count) for step, count in counted if count]
        if any(row.held_ms for row in ready):  # others would always come behind
            return None
        coming = [ComingRows(count, 1, step.ms) for step, count in useful]
        found = first_to_run(_ready(ready), coming, self._table, most_ms=self._most_ms)
        if found is None:
            return None
        self.num_taken += 1
        for row in ready:
            row.held_ms = coming[found].ms
        return useful[found][0].plan


def next_kind(row: EngineRow) -> tuple[GraphName, int] | None:
    """Find the graph and tokens of the forward that comes next.

    It follows the row's own forward. The result is None where nobody knows it.
    """
    forward, options = row.forward, row.request.options
    if forward is None or row.request.mode in ("diffusion", "quadratic_spec"):
        return None
    if forward.graph_name == "draft":
        return None if options.threshold else ("verify", len(forward.token_ids))
    length = _next_length(row)
    if length is None:
        return None
    return ("ar", AR_STEP) if length == AR_STEP else ("draft", length)


def _next_length(row: EngineRow) -> int | None:
    """Return the block length of a row's next cycle.

    It is None where its own policy decides.
    """
    if row.policy is not None:
        return row.policy.next_length
    lengths = {"ar": AR_STEP, "linear_spec": row.request.options.block_length}
    return lengths.get(row.request.mode)


def _kind(row: EngineRow) -> tuple[GraphName, int]:
    assert row.forward is not None
    return row.forward.graph_name, len(row.forward.token_ids)


def _ready(rows: Sequence[EngineRow]) -> ReadyRows:
    graph_name, _ = _kind(rows[0])
    cached = max(row.valid_length for row in rows)
    return ReadyRows(graph_name, len(rows), max(row.num_left for row in rows), cached)

"""Decides how long rows wait for others, to run together.

The others are a forward or two behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimode.formats.contract import GraphName
from trimode.runtime.engine.load.cost_table import CostTable

LEAST_SAVED = 0.5
"""Share of the ready rows' forward that a joint one must save. With a quarter, a GPU whose forwards
grow with their rows kept texts waiting a quarter longer (`benchmarks/waiting.py`).
"""
CYCLES_TOGETHER = 2
"""Cycles in which rows that have run together go on so."""


@dataclass(frozen=True, slots=True)
class ReadyRows:
    """Describes rows that wait for the same kind of forward.

    Attributes:
        graph_name: Graph of the forward.
        rows: Number of the rows.
        tokens: New tokens of each row.
        cached: Most tokens that one of them has cached.
    """

    graph_name: GraphName
    rows: int
    tokens: int
    cached: int

    def ms(self, table: CostTable, more_rows: int = 0) -> float:
        """Predict their forward's milliseconds, with more such rows in it."""
        return table.ms(self.graph_name, self.rows + more_rows, self.tokens, self.cached)


@dataclass(frozen=True, slots=True)
class ComingRows:
    """Describes rows that will wait for that kind of forward, too.

    Attributes:
        rows: Number of the rows.
        steps: Forwards that they need before.
        ms: Time of these forwards, in milliseconds.
    """

    rows: int
    steps: int
    ms: float


def steps_to_wait(
    ready: ReadyRows, coming: ComingRows, table: CostTable, *, most_ms: float = float("inf")
) -> int:
    """Count the steps that ready rows should wait for coming ones.

    The count is 0 where waiting does not pay.

    Waiting pays only where a joint forward takes much less time than two: else it changes nothing
    but the order. It holds up the ready rows for ``coming.ms``. Not waiting holds up the coming
    rows for one forward, and what two forwards take longer holds up all, for some cycles: rows that
    run together once go on together.

    Args:
        ready: Rows whose forward could run now.
        coming: Rows that would join it.
        table: Costs of the forwards.
        most_ms: Most milliseconds to wait, so that latency targets are kept.
    """
    if not coming.rows or coming.ms > most_ms:
        return 0
    alone_ms, both = ready.ms(table), ready.rows + coming.rows
    coming_ms = table.ms(ready.graph_name, coming.rows, ready.tokens, ready.cached)
    saved = alone_ms + coming_ms - ready.ms(table, coming.rows)
    held_by_waiting = ready.rows * coming.ms
    held_by_going_on = coming.rows * alone_ms + CYCLES_TOGETHER * both * saved
    is_worth_it = saved > LEAST_SAVED * alone_ms and held_by_waiting <= held_by_going_on
    return coming.steps if is_worth_it else 0


def first_to_run(
    ready: ReadyRows,
    others: Sequence[ComingRows],
    table: CostTable,
    *,
    most_ms: float = float("inf"),
) -> int | None:
    """Choose the group that should run before ready rows do.

    It can then join them.

    Args:
        ready: Rows whose forward was chosen.
        others: Rows whose next forward is of the ready rows' kind, by group.
        table: Costs of the forwards.
        most_ms: Most milliseconds to wait.

    Returns:
        Index into ``others``: of those worth waiting for the one that takes least; None where none
            is.
    """
    best, least = None, float("inf")
    for index, other in enumerate(others):
        if other.ms < least and steps_to_wait(ready, other, table, most_ms=most_ms):
            best, least = index, other.ms
    return best

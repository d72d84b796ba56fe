"""How long rows wait for others that are a forward or two behind, so that they run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimode.formats.contract import GraphName
from trimode.runtime.engine.load.cost_table import CostTable


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
    """Steps that ready rows should wait for coming ones; 0 where waiting does not pay.

    All times are of one machine, which works either way. What differs is who stands still. Waiting
    holds up the ready rows for ``coming.ms``. Not waiting holds up the coming rows for one forward,
    and a later forward of their own holds up all.

    Args:
        ready: Rows whose forward could run now.
        coming: Rows that would join it.
        table: Costs of the forwards.
        most_ms: Most milliseconds to wait, so that latency targets are kept.
    """
    if not coming.rows or coming.ms > most_ms:
        return 0

    def ms(rows: int) -> float:
        return table.ms(ready.graph_name, rows, ready.tokens, ready.cached)

    both = ready.rows + coming.rows
    saved = ms(ready.rows) + ms(coming.rows) - ms(both)
    held_by_waiting = ready.rows * coming.ms
    held_by_going_on = coming.rows * ms(ready.rows) + both * max(saved, 0.0)
    return coming.steps if held_by_waiting <= held_by_going_on else 0


def first_to_run(
    ready: ReadyRows,
    others: Sequence[ReadyRows],
    table: CostTable,
    *,
    most_ms: float = float("inf"),
) -> int | None:
    """The group that should run before ready rows do, so that it can join them.

    Args:
        ready: Rows whose forward was chosen.
        others: Groups whose next forward is the ready rows' kind.
        table: Costs of the forwards.
        most_ms: Most milliseconds to wait.

    Returns:
        An index into ``others``: of those worth waiting for the one that takes least; None where
        none is.
    """
    best, least = None, float("inf")
    for index, other in enumerate(others):
        ms = table.ms(other.graph_name, other.rows, other.tokens, other.cached)
        coming = ComingRows(other.rows, 1, ms)
        if ms < least and steps_to_wait(ready, coming, table, most_ms=most_ms):
            best, least = index, ms
    return best

"""Drafts now and then while all rows are in AR.

So better acceptance is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.engine.load.candidates import AR_STEPS_IN_A_CYCLE, Prospect, forward_times
from trimode.runtime.engine.load.cost_table import CostTable
from trimode.runtime.engine.load.state import RowState

CYCLES_OF_PROBE = 2
"""Cycles that one probe should take."""


class Prober:
    """Lets one row draft for a while, now and then.

    It does so seldom enough to take a given share of the time.

    Args:
        table: Costs of the forwards.
        share: Share of the time to spend, 0 for none.
    """

    def __init__(self, table: CostTable, share: float) -> None:
        self._table, self._share = table, share
        self._next_ms: float | None = None

    def probe(
        self, current: Prospect, rows: Sequence[RowState], lengths: Sequence[int], now_ms: float
    ) -> tuple[RowState, float] | None:
        """Choose the row that should draft now, and for how long.

        The result is mostly None; the time is in milliseconds. The row is the one that has most
        left. The shortest block costs least, and its slots are those that every longer block begins
        with.
        """
        chosen = current.candidate
        if chosen.block_length != AR_STEP or not lengths or not self._share:
            self._next_ms = None
            return None
        row = max((row for row in rows if not row.is_pinned), key=lambda row: row.left)
        cycle_ms = sum(forward_times(self._table, lengths[0], [row]))
        lasts_ms = CYCLES_OF_PROBE * (cycle_ms + AR_STEPS_IN_A_CYCLE * current.round_ms)
        if self._next_ms is None or now_ms < self._next_ms:
            self._next_ms = self._next_ms or now_ms + lasts_ms / self._share
            return None
        self._next_ms = now_ms + lasts_ms / self._share
        return row, lasts_ms

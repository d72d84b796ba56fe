"""Lets one plan decide how all rows in mode ``auto`` go on.

A row asks at the end of each cycle, so nothing is cut short. Rows in another mode, and rows with a
seed, keep their own way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from trimode.formats.contract import Mode
from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.engine.load.rows import MakeRowPolicy, RowPolicy
from trimode.runtime.engine.load.state import ModePlan, ModePolicy, RowState
from trimode.runtime.engine.request import Request
from trimode.runtime.engine.row import EngineRow
from trimode.runtime.engine.stats import ModeSwitch

_KEPT_SWITCHES = 100


class Modes:
    """Asks a policy, and keeps its plan.

    Args:
        policy: Policy that is asked; None = every row keeps its own way.
        make_row: Function that makes the policy of a row that follows the plan.

    Attributes:
        plan: Plan in force.
        switches: Last plans that changed.
        num_switches: Plans that changed, in all.
    """

    def __init__(self, policy: ModePolicy | None, make_row: MakeRowPolicy) -> None:
        self._policy, self._make_row = policy, make_row
        self.plan = ModePlan()
        self.switches: deque[ModeSwitch] = deque(maxlen=_KEPT_SWITCHES)
        self.num_switches = 0

    def row_policy(self, request: Request) -> RowPolicy | None:
        """Return the policy of a new row.

        It is None where the row keeps its own way.
        """
        if self._policy is None or request.is_pinned:
            return None
        most, key = request.options.block_length, id(request)
        return self._make_row(request.ids, lambda: min(self.plan.length_of(key), most))

    def refresh(self, rows: Sequence[EngineRow], now_ms: float, num_queued: int) -> None:
        """Have a new plan, where one is due."""
        if self._policy is None or not rows or not self._policy.is_due(len(rows), now_ms):
            return
        before = self.plan
        states = [_state_of(row) for row in rows if not row.is_reading]
        self.plan = self._policy.plan(states, now_ms, num_queued=num_queued)
        if self.plan.block_length != before.block_length:
            self._note(before.block_length, len(rows), num_queued)

    def _note(self, before: int, num_rows: int, num_queued: int) -> None:
        plan = self.plan
        self.num_switches += 1
        self.switches.append(
            ModeSwitch(
                before,
                plan.block_length,
                num_rows,
                num_queued,
                plan.predicted_gain,
                plan.reason,
            )
        )


def _state_of(row: EngineRow) -> RowState:
    request, policy = row.request, row.policy
    own = AR_STEP if request.mode == "ar" else request.options.block_length
    length = own if policy is None else policy.block_length
    mode: Mode = "ar" if length == AR_STEP else "linear_spec"
    return RowState(
        key=id(request),
        mode=request.mode if policy is None else mode,
        cached_length=row.sequence.cached_length,
        left=max(1, request.end - len(row.sequence.tokens)),
        likely=(1.0,) if policy is None else policy.likely,
        block_length=length,
        is_pinned=policy is None,
        priority=request.priority,
    )

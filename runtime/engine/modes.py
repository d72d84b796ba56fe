"""Lets one plan for all running rows decide how those in mode ``auto`` go on.

A row asks at the end of each cycle, so nothing is cut short. Rows in another mode, and rows with a
seed, keep their own way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from trimode.formats.contract import MAX_BLOCK_LENGTH, Mode
from trimode.runtime.auto.policy import AR_STEP, Policy
from trimode.runtime.engine.load.state import ModePlan, ModePolicy, RowState
from trimode.runtime.engine.request import Request
from trimode.runtime.engine.row import EngineRow
from trimode.runtime.engine.stats import ModeSwitch

_PRIOR_TRIALS, _PRIOR_RATE = 4.0, 0.6
"""Drafts that a text is taken to have shown before its first cycle, and the share of them that was
accepted.
"""
_KEPT_SWITCHES = 100


class RowPolicy(Policy, Protocol):
    """Policy of one row that follows the plan, and says what its drafts have shown.

    Attributes:
        block_length: Block length of its step; 1 stands for AR.
        likely: Probability of a cycle's first, second, ... token.
    """

    block_length: int

    @property
    def likely(self) -> tuple[float, ...]: ...


MakeRowPolicy = Callable[[Sequence[int], Callable[[], int]], RowPolicy]
"""From a prompt, and from what gives the block length that the plan has for the row."""


class PlainRowPolicy:
    """Does as the plan says, and counts accepted drafts.

    Args:
        prompt: Tokens of the prompt; not looked at.
        length_of_plan: The block length that the plan has for this row, as of now.

    Attributes:
        block_length: Block length of its step; 1 stands for AR.
    """

    def __init__(self, prompt: Sequence[int], length_of_plan: Callable[[], int]) -> None:  # noqa: ARG002
        self._length_of_plan = length_of_plan
        self._num_tried = self._num_accepted = 0
        self.block_length = AR_STEP

    def choose(self, past: int, left: int) -> int:  # noqa: ARG002
        """The plan's block length."""
        self.block_length = self._length_of_plan()
        return self.block_length

    def rows_to_verify(self, num_wanted: int, confidence: NDArray[Any] | None) -> int:  # noqa: ARG002
        """The whole block: rows that verify as many tokens share a forward."""
        return self.block_length

    def record(self, num_tokens: int) -> None:
        """Take note of what a cycle has shown."""
        if self.block_length > AR_STEP:
            self._num_accepted += num_tokens - 1
            self._num_tried += min(num_tokens, self.block_length - 1)

    @property
    def likely(self) -> tuple[float, ...]:
        """Probability of a cycle's first, second, ... token, all drafts being alike."""
        trials = self._num_tried + _PRIOR_TRIALS
        rate = (self._num_accepted + _PRIOR_TRIALS * _PRIOR_RATE) / trials
        return tuple(rate**slot for slot in range(MAX_BLOCK_LENGTH))


class Modes:
    """Asks a policy, and keeps its plan.

    Args:
        policy: What is asked; None = every row keeps its own way.
        make_row: Makes the policy of a row that follows the plan.

    Attributes:
        plan: Plan in force.
        switches: The last plans that changed.
    """

    def __init__(self, policy: ModePolicy | None, make_row: MakeRowPolicy) -> None:
        self._policy, self._make_row = policy, make_row
        self.plan = ModePlan()
        self.switches: deque[ModeSwitch] = deque(maxlen=_KEPT_SWITCHES)

    def row_policy(self, request: Request) -> RowPolicy | None:
        """The policy of a new row; None where it keeps its own way."""
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

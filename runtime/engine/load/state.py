"""Defines what a mode policy sees of rows, and what it answers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trimode.formats.contract import Mode
from trimode.runtime.auto.policy import AR_STEP


@dataclass(frozen=True, slots=True)
class RowState:
    """Describes one running row between two of its forwards.

    Attributes:
        key: Name of the row, the same for as long as it runs.
        mode: Mode that the row is in now.
        cached_length: Tokens in its cache.
        left: Tokens that may still come, 1 or more.
        likely: Probability that a cycle of the longest block gives a first, second, ... token.
            The first is 1, and each is at most the one before.
        block_length: Block length that the row has now; 1 stands for AR.
        is_pinned: Whether the row keeps its mode and length: it has a seed, is in diffusion or in
            quadratic self-speculation, or its mode was asked for.
        priority: Priority of its request; larger comes first.
    """

    key: Hashable
    mode: Mode
    cached_length: int
    left: int
    likely: tuple[float, ...] = (1.0,)
    block_length: int = AR_STEP
    is_pinned: bool = False
    priority: int = 0

    def expected_tokens(self, block_length: int) -> float:
        """Predict the average tokens of use of a cycle of this length.

        Shorter blocks do not begin where longer ones do: what one long cycle gives takes several
        of them. The longest gives ``sum(likely)`` tokens. A cycle of length ``L`` is needed for
        them at the beginning, another if more than ``L`` tokens come, and so on.
        """
        coming = self.likely[: self.left]
        return sum(coming) / sum(coming[::block_length])


@dataclass(frozen=True, slots=True)
class ModePlan:
    """Says how the rows go on, each from its cycle's end.

    Attributes:
        block_length: Block length of all rows that are not pinned; 1 stands for AR.
        exceptions: Block length of the rows, by key, that have another one.
        reason: Reason for the plan, in words, for logs and metrics.
        predicted_gain: Tokens a millisecond over those of the plan before, less 1.
        tokens_per_ms: Tokens of use that all rows together are expected to give.
    """

    block_length: int = AR_STEP
    exceptions: Mapping[Hashable, int] = field(default_factory=dict)
    reason: str = "start"
    predicted_gain: float = 0.0
    tokens_per_ms: float = 0.0

    def length_of(self, key: Hashable) -> int:
        """Return the block length of a row that is not pinned.

        A row that joined later has the common one.
        """
        return self.exceptions.get(key, self.block_length)


class ModePolicy(Protocol):
    """Chooses modes for all running rows.

    An engine asks :meth:`is_due` before each step, and :meth:`plan` where it is. A plan takes
    effect for each row at its next cycle, so nothing is cut short.
    """

    def is_due(self, num_rows: int, now_ms: float) -> bool:
        """Whether the plan should be looked at again.

        It must be cheap: it is asked before each step.
        """
        ...

    def plan(self, rows: Sequence[RowState], now_ms: float, *, num_queued: int = 0) -> ModePlan:
        """Return the plan from now on, mostly the one before.

        Args:
            rows: Running rows, pinned ones too, that have read their prompts.
            now_ms: Time on a clock that never goes back.
            num_queued: Requests that wait for a row.
        """
        ...


@dataclass(frozen=True, slots=True)
class FixedModePolicy:
    """Gives the same plan always.

    Attributes:
        block_length: Block length of all rows; 1 stands for AR.
    """

    block_length: int = AR_STEP

    def is_due(self, num_rows: int, now_ms: float) -> bool:  # noqa: ARG002
        """Return False: nothing changes."""
        return False

    def plan(
        self,
        rows: Sequence[RowState],  # noqa: ARG002
        now_ms: float,  # noqa: ARG002
        *,
        num_queued: int = 0,  # noqa: ARG002
    ) -> ModePlan:
        """Return the one plan."""
        return ModePlan(self.block_length, reason="fixed")

"""The policy of a row that follows one plan for all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from trimode.formats.contract import MAX_BLOCK_LENGTH
from trimode.runtime.auto.policy import AR_STEP, Policy

_PRIOR_TRIALS, _PRIOR_RATE = 4.0, 0.6
"""Drafts that a text is taken to have shown before its first cycle, and the share of them that was
accepted.
"""


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

"""Mode ``auto``: which step comes next, one token of AR or a cycle of self-speculation, and how long its block is.

Every choice yields the tokens of AR, or their distribution, so what is chosen is a matter of time alone. A step is worth the tokens that it is
expected to yield; the policy takes the one with the fewest milliseconds a token. Milliseconds come from a table
(:mod:`trimode.runtime.timings`). How many drafts will be accepted is estimated from the text itself: acceptance persists (after a long cycle the
next one is mostly long), and it differs from one text to the next far more than from one model to the next.

Nothing here looks at a clock, so the same text under the same table takes the same steps, and a seed reproduces it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

AR_STEP = 1
"""The block length that stands for a step of AR."""

PRIOR_ACCEPTANCE = 0.93
"""Of a slot whose predecessors were accepted, before a text has shown its own, where nothing was measured."""
PRIOR_SLOTS = 4.0
"""Drafts that the prior weighs as much as."""
SLOT_TRIALS = 4.0
"""Trials of one slot that weigh as much as what all slots say together."""
MEMORY_TOKENS = 60.0
"""After so many tokens what was seen weighs 1/e. Forgetting goes by tokens, not by cycles: acceptance is a property of a stretch of text."""


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of a step, over a grid of cached tokens; between its points they are interpolated, beyond them held.

    Attributes:
        past: the grid, ascending.
        ar_ms: of one forward of one token.
        cycle_ms: block length -> of one draft and one verification.
        acceptance: of a slot's draft, where those before it were accepted, in a text of which nothing is known yet.
    """

    past: tuple[int, ...]
    ar_ms: tuple[float, ...]
    cycle_ms: Mapping[int, tuple[float, ...]]
    acceptance: float = PRIOR_ACCEPTANCE

    def __post_init__(self) -> None:
        rows = (self.ar_ms, *self.cycle_ms.values())
        if not self.past or list(self.past) != sorted(set(self.past)) or any(len(row) != len(self.past) for row in rows):
            raise ValueError("expected ascending cached lengths, and a cost of each step at each of them")

    def only(self, is_usable: Callable[[int], bool]) -> StepCosts:
        """With these block lengths only."""
        return replace(self, cycle_ms={length: row for length, row in self.cycle_ms.items() if is_usable(length)})


class Policy(Protocol):
    """Chooses the steps of one text."""

    def choose(self, past: int, left: int) -> int:
        """The next step's block length, or :data:`AR_STEP`.

        Args:
            past: cached tokens.
            left: tokens that may still come.
        """
        ...

    def record(self, block_length: int, num_tokens: int) -> None:
        """Take note that a step yielded so many tokens, of which the last was no accepted draft."""
        ...


class FixedPolicy:
    """Always the same; without a table there is nothing to choose by."""

    def __init__(self, block_length: int) -> None:
        self._block_length = block_length

    def choose(self, past: int, left: int) -> int:  # noqa: ARG002
        """See :class:`Policy`."""
        return self._block_length

    def record(self, block_length: int, num_tokens: int) -> None:
        """Nothing is noted."""


class Acceptance:
    """How likely each slot's draft is accepted once those before it are: an estimate from the cycles so far.

    A discounted Kaplan-Meier estimate: a slot counts as tried only where all before it were accepted, so a cycle whose drafts are all accepted
    says nothing about the slots behind its block, for or against. Each slot's rate leans on the rate of all slots together, which longer blocks
    are judged by until they have been tried, and that one on the prior.

    Args:
        num_slots: drafts of the longest block.
        prior: acceptance of a slot before anything was seen.
    """

    def __init__(self, num_slots: int, prior: float = PRIOR_ACCEPTANCE) -> None:
        self._prior = prior
        self._tried, self._accepted = np.zeros(num_slots), np.zeros(num_slots)

    def record(self, num_drafts: int, num_accepted: int) -> None:
        """Take note of a cycle."""
        self._tried[: min(num_accepted + 1, num_drafts)] += 1
        self._accepted[:num_accepted] += 1

    def forget(self, num_tokens: int) -> None:
        """Let what was seen weigh less, so many tokens later."""
        factor = np.exp(-num_tokens / MEMORY_TOKENS)
        self._tried *= factor
        self._accepted *= factor

    def expected_tokens(self) -> NDArray[np.float64]:
        """``(num_slots + 1,)``: entry ``n - 1`` is the expected number of tokens of a cycle, of which at most ``n`` are wanted."""
        pooled = (self._accepted.sum() + self._prior * PRIOR_SLOTS) / (self._tried.sum() + PRIOR_SLOTS)
        rates = (self._accepted + pooled * SLOT_TRIALS) / (self._tried + SLOT_TRIALS)
        reached = np.ones(len(rates) + 1)
        np.cumprod(rates, out=reached[1:])
        return reached.cumsum()


class AdaptivePolicy:
    """The step of the fewest expected milliseconds a token.

    An AR step shows nothing of acceptance; while these are taken, what was seen before is forgotten, the estimate goes back to the prior, and
    drafting is tried again. Longer blocks need no trial either: where every draft of a block is accepted, the estimate for the slots behind it
    rises too.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._past = np.array(costs.past, float)
        self._lengths = np.array([AR_STEP, *costs.cycle_ms])
        self._costs = np.array([costs.ar_ms, *costs.cycle_ms.values()])
        self._acceptance = Acceptance(int(self._lengths.max()) - 1, costs.acceptance)

    def choose(self, past: int, left: int) -> int:
        """See :class:`Policy`."""
        tokens = self._acceptance.expected_tokens()[np.minimum(self._lengths, left) - 1]
        return int(self._lengths[(self._costs_at(past) / tokens).argmin()])

    def record(self, block_length: int, num_tokens: int) -> None:
        """See :class:`Policy`."""
        self._acceptance.forget(num_tokens)
        if block_length > AR_STEP:
            self._acceptance.record(block_length - 1, num_tokens - 1)

    def _costs_at(self, past: int) -> NDArray[np.float64]:
        """``(steps,)``."""
        right = min(max(int(np.searchsorted(self._past, past)), 1), len(self._past) - 1) if len(self._past) > 1 else 0
        if right == 0:
            return self._costs[:, 0]
        low, high = self._past[right - 1], self._past[right]
        share = min(max((past - low) / (high - low), 0.0), 1.0)
        between: NDArray[np.float64] = self._costs[:, right - 1] * (1 - share) + self._costs[:, right] * share
        return between


def make_policy(costs: StepCosts | None, block_length: int) -> Policy:
    """The policy for these costs; without any, self-speculation with this block length."""
    return FixedPolicy(block_length) if costs is None else AdaptivePolicy(costs)

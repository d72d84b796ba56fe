"""Estimates how likely drafts are accepted in one text.

It goes by the cycles that the text has had so far.

All is in plain Python: these are lists of some thirty numbers, and between two forwards, whose
weights have just passed through the processor's caches, a call of numpy takes longer than such a
list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import mul

from trimode.runtime.auto.prior import Prior

SLOT_TRIALS = 5.0
"""Trials of one slot that weigh as much as what the prior and all slots together say of it."""
AHEAD_TRIALS = 40.0
"""Trials of one slot that weigh as much as the confidence that the last draft had in it."""
MEMORY_TOKENS = 60.0
"""After so many tokens what was seen weighs 1/e. Forgetting goes by tokens, not by cycles:
acceptance is a property of a stretch of text.
"""


class Acceptance:
    """Estimates how likely each slot's draft is accepted.

    The question is about a draft once those before it are accepted.

    A discounted Kaplan-Meier estimate: a slot counts as tried only where all before it were
    accepted. Of a block whose drafts were all accepted, as far as they were verified, those behind
    count by their confidence: they were not verified *because* that was low, and to leave them out
    would make long blocks look better than they are. Behind the longest block there is nothing, for
    or against. Each slot's rate leans on the prior's, whose rejections are multiplied by how many
    more or fewer this text has shown than were to be expected (shared frailty).

    Args:
        prior: Expectation before anything was seen.
    """

    def __init__(self, prior: Prior) -> None:
        self._weight, self._rejection = prior.weight, prior.rejection
        self._tried, self._accepted = [0.0] * len(prior.rejection), [0.0] * len(prior.rejection)

    def record(
        self,
        num_verified: int,
        num_accepted: int,
        unverified: Iterable[float] = (),
        *,
        first_slot: int = 0,
    ) -> None:
        """Take note of what came of a cycle.

        Slots behind the last one are left out.

        Args:
            num_verified: Number of drafts that were verified.
            num_accepted: Number of these that were accepted.
            unverified: Confidence of the drafts behind them.
            first_slot: Slot that the first draft counts for. Not 0 where the cycle goes on from one
                whose drafts were all accepted.
        """
        tried, accepted = self._tried, self._accepted
        end = min(first_slot + num_verified, len(tried))
        for slot in range(first_slot, min(first_slot + num_accepted + 1, end)):
            tried[slot] += 1
        for slot in range(first_slot, min(first_slot + num_accepted, end)):
            accepted[slot] += 1
        if num_accepted == num_verified:
            reached = 1.0
            for slot, confidence in enumerate(unverified, num_verified):
                tried[slot] += reached
                reached *= confidence
                accepted[slot] += reached

    def lean_on(self, prior: Prior) -> None:
        """Lean on another prior from now on, for what was not seen.

        It has as many slots as the one before.
        """
        self._weight, self._rejection = prior.weight, prior.rejection

    def forget(self, num_tokens: float) -> None:
        """Let what was seen weigh less, so many tokens later."""
        factor = weight_after(num_tokens)
        self._tried = [factor * value for value in self._tried]
        self._accepted = [factor * value for value in self._accepted]

    @property
    def rejection_scale(self) -> float:
        """Ratio of the rejections seen to those that were expected.

        The prior counts for as many rejections as it weighs.
        """
        seen = sum(self._tried) - sum(self._accepted)
        expected: float = sum(map(mul, self._tried, self._rejection))
        return (seen + self._weight) / (expected + self._weight)

    def rates(self, ahead: Sequence[float] = ()) -> list[float]:
        """Compute how likely each slot's draft is accepted.

        That is once those before it are.

        Args:
            ahead: Confidence in the drafts of the first slots.
        """
        rejection_scale, result = self.rejection_scale, []
        for tried, accepted, rejection in zip(
            self._tried, self._accepted, self._rejection, strict=True
        ):
            usual = max(1 - rejection_scale * rejection, 0.0)
            result.append((accepted + SLOT_TRIALS * usual) / (tried + SLOT_TRIALS))
        for slot, confidence in enumerate(ahead):
            trials = self._tried[slot] + SLOT_TRIALS
            result[slot] = (result[slot] * trials + AHEAD_TRIALS * confidence) / (
                trials + AHEAD_TRIALS
            )
        return result


def weight_after(num_tokens: float) -> float:
    """Return the weight of what was seen, so many tokens later."""
    return math.exp(-num_tokens / MEMORY_TOKENS)

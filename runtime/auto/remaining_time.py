"""Computes how long the rest of a text will take.

That is possible where it is known how long such texts are.

A step is worth the milliseconds that its tokens save later. In the middle of a long text that is
the same for each of them. Near the end it is not: the token that makes another cycle unnecessary
saves a whole one, and what a block reaches beyond the end saves nothing. The least expected time
for the rest follows by dynamic programming from the time of each step and the expected acceptance.

In plain Python, as :mod:`trimode.runtime.auto.acceptance`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from operator import mul

_KEPT = 4096
"""Positions in a text whose tokens' worth is kept."""


class StepTimes:
    """Holds milliseconds of each step at one number of cached tokens.

    Args:
        lengths: Lengths of blocks, ascending.
        ar_ms: Milliseconds of a step of AR.
        draft_ms: Milliseconds of drafting each length.
        verify_ms: Milliseconds of verifying so many tokens.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        ar_ms: float,
        draft_ms: Sequence[float],
        verify_ms: Sequence[float],
    ) -> None:
        self.lengths, self.ar_ms, self.draft_ms, self.verify_ms = (
            lengths,
            ar_ms,
            draft_ms,
            verify_ms,
        )
        self._rows, self._row_ms = (1, *lengths), (ar_ms, *verify_ms)

    def cycles(self, tokens: Iterable[float], waste: float) -> list[float]:
        """Return the milliseconds of a cycle of each block length.

        Args:
            tokens: Number of its tokens that are expected to be of use, per length.
            waste: Share of the others that is verified, too.
        """
        return [
            draft + self._rows_ms(useful + waste * (length - useful))
            for length, draft, useful in zip(self.lengths, self.draft_ms, tokens, strict=True)
        ]

    def best(self, tokens: Sequence[float], waste: float) -> float:
        """Return the least milliseconds a token in the middle of a text.

        Args:
            tokens: Number of tokens that a cycle is expected to yield: ``tokens[k - 1]`` of at most
                ``k``.
            waste: Share of the rows without use that is verified.
        """
        found = [tokens[length - 1] for length in self.lengths]
        return min(
            self.ar_ms,
            *(ms / count for ms, count in zip(self.cycles(found, waste), found, strict=True)),
        )

    def _rows_ms(self, rows: float) -> float:
        """Interpolate the milliseconds of verifying so many rows."""
        right = min(max(bisect_left(self._rows, rows), 1), len(self._rows) - 1)
        low, high, low_ms, high_ms = (
            self._rows[right - 1],
            self._rows[right],
            self._row_ms[right - 1],
            self._row_ms[right],
        )
        return low_ms + (high_ms - low_ms) * min(max((rows - low) / (high - low), 0.0), 1.0)


def reached(rates: Iterable[float]) -> list[float]:
    """Return how likely each token of a cycle comes.

    Its slots have these rates. There is one token more than rates: the first is certain.
    """
    return list(accumulate(rates, mul, initial=1.0))


class RemainingTime:
    """Computes the time that the rest of a text takes.

    One object is about texts of one kind.

    Args:
        rates: Probability, per slot, that its draft is accepted where those before it are.
        ends: Probability that a text ends, as in :class:`trimode.runtime.auto.prior.Prior`.
        times: Times of the steps, at a usual number of cached tokens.
        waste: Share of the rows without use that will be verified.

    Attributes:
        ms_per_token: Milliseconds a token in the middle of such a text.
    """

    def __init__(
        self, rates: Sequence[float], ends: Sequence[float], times: StepTimes, waste: float
    ) -> None:
        self._ends, self._times, self._waste = ends, times, waste
        self._longest = len(rates) + 1
        self._reached = reached(rates)
        self.ms_per_token = times.best(list(accumulate(self._reached)), waste)
        self._until_end = self._times_until_end()
        self._from = self._times_from()
        self._goes_on: dict[int, list[float]] = {}
        self._worth: dict[tuple[int, int], list[float]] = {}

    def goes_on(self, num_tokens: int) -> list[float]:
        """Return how likely a text still goes on after some more tokens.

        It goes on after ``num_tokens``. The answers are for 0, 1, ... as many more as the longest
        block has.
        """
        num_tokens = min(num_tokens, len(self._ends))
        if num_tokens not in self._goes_on:
            self._goes_on[num_tokens] = self._survival(num_tokens)
        return self._goes_on[num_tokens]

    def worth(self, num_tokens: int, left: int) -> list[float]:
        """Return the milliseconds that each token of a cycle saves later.

        Args:
            num_tokens: Number of tokens before the cycle.
            left: Number of tokens that may still come.
        """
        key = num_tokens, left
        if key not in self._worth:
            if len(self._worth) == _KEPT:
                self._worth.clear()
            rest = [
                min(self._rest_from(num_tokens + k), self._rest_until(left - k)) * share
                for k, share in enumerate(self.goes_on(num_tokens))
            ]
            self._worth[key] = [before - after for before, after in pairwise(rest)]
        return self._worth[key]

    def worth_until(self, end: int) -> list[float]:
        """Return :meth:`worth` where the text ends with the ``end``-th token."""
        rest = [self._rest_until(end - k) for k in range(self._longest + 1)]
        return [before - after for before, after in pairwise(rest)]

    def _survival(self, num_tokens: int) -> list[float]:
        ends = self._ends
        if not ends:
            return [1.0] * (self._longest + 1)
        return reached(
            1 - ends[min(num_tokens + k, len(ends) - 1)] for k in range(1, self._longest + 1)
        )

    def _rest_from(self, num_tokens: int) -> float:
        """Return the time to come after so many tokens.

        The text goes on after them.
        """
        return self._from[min(num_tokens, len(self._from) - 1)]

    def _rest_until(self, left: int) -> float:
        """Return the time to come with so many tokens left."""
        known = len(self._until_end) - 1
        return (
            self._until_end[max(left, 0)]
            if left <= known
            else self._until_end[known] + self.ms_per_token * (left - known)
        )

    def _times_until_end(self) -> list[float]:
        """Compute the time to come for 0, 1, ... tokens left.

        It is known that so many are left.
        """
        least = [0.0]
        for left in range(1, 2 * self._longest + 1):
            rest = [least[max(left - k, 0)] for k in range(1, self._longest + 1)]
            least.append(self._least(rest, self._reached, left))
        return least

    def _times_from(self) -> list[float]:
        """Compute the time to come after 0, 1, ... tokens.

        The text goes on after them. Behind what is known its length has no memory, so there the
        time to come is the same.
        """
        if not self._ends:
            return [math.inf]
        backwards = [self.ms_per_token / self._ends[-1]]
        for written in range(len(self._ends) - 2, -1, -1):
            goes_on = self._survival(written)
            rest = [
                backwards[max(len(backwards) - k, 0)] * goes_on[k]
                for k in range(1, self._longest + 1)
            ]
            backwards.append(
                self._least(rest, list(map(mul, self._reached, goes_on)), self._longest)
            )
        return backwards[::-1]

    def _least(self, rest: Sequence[float], useful: Iterable[float], left: int) -> float:
        """Find the least time of the next step and all behind it.

        Args:
            rest: Time behind 1, 2, ... of the step's tokens.
            useful: Probability that each of them is of use.
            left: Most of them that may be of use.
        """
        tokens = list(accumulate(useful))
        changes = (
            share * (after - before)
            for share, (before, after) in zip(self._reached[1:], pairwise(rest), strict=True)
        )
        behind = list(accumulate(changes, initial=rest[0]))
        wanted = [min(length, left) - 1 for length in self._times.lengths]
        cycles = self._times.cycles([tokens[k] for k in wanted], self._waste)
        return min(
            self._times.ar_ms + rest[0],
            *(ms + behind[k] for ms, k in zip(cycles, wanted, strict=True)),
        )

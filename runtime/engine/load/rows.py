"""Keeps what rows show of their drafts, for themselves and new rows.

From it follows what a row that has just come is expected to show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from numpy.typing import NDArray

from trimode.formats.contract import MAX_BLOCK_LENGTH
from trimode.runtime.auto.acceptance import MEMORY_TOKENS, Acceptance
from trimode.runtime.auto.policy import AR_STEP
from trimode.runtime.auto.prior import AcceptanceHistory, Prior

POOL_TOKENS = 3000.0
"""Tokens after which what the texts of one kind have shown together weighs 1/e."""
ROW_TOKENS = 240.0
"""Tokens after which what one text has shown weighs 1/e.

Plans change seldom, so they should follow texts, not each stretch.
"""
TOKENS_AT_ONCE = 48
"""Tokens that are forgotten in one go."""
LEAST_WEIGHT = 4.0
"""Rejections of its own that a text must show, at least, to count as much as its pool."""


class Pool:
    """Keeps the acceptance of all texts of one kind of prompt.

    It does not matter which row a text was in. It remembers while nothing is drafted: that AR is
    the better choice at high load says nothing of how well drafts would do.

    Args:
        prior: Acceptance that was expected before anything was seen.
    """

    def __init__(self, prior: Prior) -> None:
        self.start = prior
        self._acceptance = Acceptance(prior)
        self._passed = 0
        self._known: Prior | None = None
        self.version = 0

    def record(self, num_tried: int, num_accepted: int, first_slot: int) -> None:
        """Take note of a cycle.

        Of its drafts, ``num_tried`` were judged, and ``num_accepted`` of these accepted.
        ``first_slot`` is the slot of the longest block that its first draft counts for.
        """
        self._acceptance.record(num_tried, num_accepted, first_slot=first_slot)
        self._passed += num_accepted + 1
        if self._passed >= TOKENS_AT_ONCE:
            self._acceptance.forget(self._passed * MEMORY_TOKENS / POOL_TOKENS)
            self._passed, self._known = 0, None
            self.version += 1

    def prior(self) -> Prior:
        """Return what is expected of a text that has shown nothing yet."""
        if self._known is None:
            rejection = tuple(max(1 - rate, 0.0) for rate in self._acceptance.rates())
            weight = max(self.start.weight, LEAST_WEIGHT)
            self._known = Prior(rejection, weight, self.start.ends)
        return self._known


class Pools:
    """Keeps one pool for each kind of prompt that was measured.

    One more pool is for all other prompts.

    Args:
        history: Acceptance that was measured beforehand.
        longest: Slots of the longest block.
    """

    def __init__(self, history: AcceptanceHistory, longest: int) -> None:
        self._history, self._longest = history, longest
        self._known: dict[str, Pool] = {}

    def of(self, prompt: Sequence[int]) -> Pool:
        """Return the pool of a prompt, ``(n,)`` token ids."""
        kinds = tuple(self._history.kinds_of(prompt))
        name = kinds[-1].sha256 if kinds else ""
        if name not in self._known:
            self._known[name] = Pool(self._history.prior(kinds, self._longest - 1))
        return self._known[name]


class RowPolicy:
    """Makes one row follow the common plan, and notes what drafts show.

    It is the :class:`~trimode.runtime.auto.policy.Policy` of one text. The plan is read at the
    beginning of a cycle only.

    Args:
        pool: Acceptance of texts like this one.
        length_of_plan: Function that gives the block length that the plan has for this row, as of
            now.
    """

    def __init__(self, pool: Pool, length_of_plan: Callable[[], int]) -> None:
        self._pool, self._length_of_plan = pool, length_of_plan
        self._acceptance = Acceptance(pool.prior())
        self._num_tried = 0
        self.block_length = AR_STEP
        self._likely: tuple[tuple[int, int], tuple[float, ...]] | None = None
        self._num_cycles = self._num_tokens = self._num_forgotten = self._first_slot = 0

    def choose(self, past: int, left: int) -> int:  # noqa: ARG002
        """Return the plan's block length, or :data:`~trimode.runtime.auto.policy.AR_STEP`."""
        self.block_length = self._length_of_plan()
        return self.block_length

    def rows_to_verify(self, num_wanted: int, confidence: NDArray[Any] | None) -> int:  # noqa: ARG002
        """Return the length of the whole block.

        Rows that verify as many tokens share a forward.
        """
        self._num_tried = num_wanted - 1
        return self.block_length

    def record(self, num_tokens: int) -> None:
        """Take note of a step.

        What lies beyond the end of the text was not rejected.
        """
        self._num_tokens += num_tokens
        if self.block_length == AR_STEP:
            self._first_slot = 0
            return
        tried = min(num_tokens, self._num_tried)
        self._acceptance.record(tried, num_tokens - 1, first_slot=self._first_slot)
        self._pool.record(tried, num_tokens - 1, self._first_slot)
        self._num_cycles += 1
        self._first_slot = self._slot_after(num_tokens)
        if self._num_tokens - self._num_forgotten >= TOKENS_AT_ONCE:
            self._forget()

    def _slot_after(self, num_tokens: int) -> int:
        """Find the next cycle's first slot, as part of the longest block.

        After a rejection, or where that block is over, the next one begins.
        """
        following = self._first_slot + num_tokens
        is_going_on = num_tokens == self.block_length and following < len(
            self._pool.start.rejection
        )
        return following if is_going_on else 0

    @property
    def next_length(self) -> int:
        """Block length that the plan has for its next cycle."""
        return self._length_of_plan()

    @property
    def likely(self) -> tuple[float, ...]:
        """Probability that each token of a cycle comes.

        It is as in :class:`~trimode.runtime.engine.load.state.RowState`.
        """
        version = self._num_cycles, self._num_tokens // 16 + self._pool.version
        if self._likely is None or self._likely[0] != version:
            self._forget()
            self._acceptance.lean_on(self._pool.prior())
            rates = self._acceptance.rates()
            self._likely = version, tuple(accumulate(rates, mul, initial=1.0))
        return self._likely[1]

    def _forget(self) -> None:
        """Let what was seen weigh less.

        Tokens of AR show nothing, but the text has moved on.
        """
        passed = self._num_tokens - self._num_forgotten
        self._acceptance.forget(passed * MEMORY_TOKENS / ROW_TOKENS)
        self._num_forgotten = self._num_tokens


MakeRowPolicy = Callable[[Sequence[int], Callable[[], int]], RowPolicy]
"""Makes a policy from a prompt, and from what gives the plan's block length for the row."""


def unmeasured_rows() -> MakeRowPolicy:
    """Make policies of rows whose texts were not measured beforehand."""
    pools = Pools(AcceptanceHistory(), MAX_BLOCK_LENGTH)
    return lambda prompt, length_of_plan: RowPolicy(pools.of(prompt), length_of_plan)

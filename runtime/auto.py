"""Mode ``auto``: which step comes next, one token of AR or a cycle of self-speculation, how long its block is, and how much of it is verified.

Every choice yields the tokens of AR, or their distribution, so what is chosen is a matter of time alone. A step is worth the tokens that it is
expected to yield; the policy takes the one with the fewest milliseconds a token. Milliseconds come from a table
(:mod:`trimode.runtime.timings`). How many drafts will be accepted is estimated from the text itself: acceptance persists (after a long cycle the
next one is mostly long), and it differs from one text to the next far more than from one model to the next. Once a block is drafted, its
probabilities say more than any history: what will hardly be accepted is not verified.

Nothing here looks at a clock, so the same text under the same table takes the same steps, and a seed reproduces it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

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
AHEAD_TRIALS = 32.0
"""Trials of one slot that weigh as much as the confidence that the last draft had in it."""
AHEAD_AFTER_AR = 4
"""Slots of which it still says something once a token has come by AR. That token was unknown to the draft, and may have been what made it unsure."""
PRIOR_SURPLUS = 0.2
"""Share of the rows without use that are verified, before a text has shown its own, where drafts have a confidence; else all of them are."""
PRIOR_SURPLUS_ROWS = 4.0
"""Rows that this weighs as much as."""
MEMORY_TOKENS = 60.0
"""After so many tokens what was seen weighs 1/e. Forgetting goes by tokens, not by cycles: acceptance is a property of a stretch of text."""

NOTHING: NDArray[Any] = np.zeros(0)


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of forwards, over a grid of cached tokens; between its points they are interpolated, beyond them held.

    Attributes:
        past: the grid, ascending.
        ar_ms: of one forward of one token.
        draft_ms: block length -> of its draft.
        verify_ms: of verifying so many tokens, for the same lengths.
        acceptance: of a slot's draft, where those before it were accepted, in a text of which nothing is known yet.
    """

    past: tuple[int, ...]
    ar_ms: tuple[float, ...]
    draft_ms: Mapping[int, tuple[float, ...]]
    verify_ms: Mapping[int, tuple[float, ...]]
    acceptance: float = PRIOR_ACCEPTANCE

    def __post_init__(self) -> None:
        rows = (self.ar_ms, *self.draft_ms.values(), *self.verify_ms.values())
        if not self.past or list(self.past) != sorted(set(self.past)) or any(len(row) != len(self.past) for row in rows):
            raise ValueError("expected ascending cached lengths, and a cost of each forward at each of them")
        if self.draft_ms.keys() != self.verify_ms.keys():
            raise ValueError("expected costs of drafting and of verifying the same block lengths")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Block lengths, ascending."""
        return tuple(sorted(self.draft_ms))

    def only(self, is_usable: Callable[[int], bool]) -> StepCosts:
        """With these block lengths only."""
        usable = [length for length in self.lengths if is_usable(length)]
        return replace(self, draft_ms={n: self.draft_ms[n] for n in usable}, verify_ms={n: self.verify_ms[n] for n in usable})


class Policy(Protocol):
    """Chooses the steps of one text. After each :meth:`choose` comes one :meth:`record`, and between them, in a cycle, one :meth:`rows_to_verify`."""

    def choose(self, past: int, left: int) -> int:
        """The next step's block length, or :data:`AR_STEP`.

        Args:
            past: cached tokens.
            left: tokens that may still come.
        """
        ...

    def rows_to_verify(self, num_wanted: int, confidence: NDArray[Any] | None) -> int:
        """How many tokens of a drafted block to verify, its first one included.

        Args:
            num_wanted: tokens that the cycle may yield at most: as many as may still come, and none behind a drafted end.
            confidence: ``(block_length,)``, of each slot's draft, the first being no draft. None where tokens are drawn: then ``num_wanted``
                depends on a draw, and less must not be verified. An end that was drawn would be drawn again, and come too seldom.
        """
        ...

    def record(self, num_tokens: int) -> None:
        """Take note that the step yielded so many tokens, of which the last was no accepted draft."""
        ...


class FixedPolicy:
    """Always the same; without a table there is nothing to choose by."""

    def __init__(self, block_length: int) -> None:
        self._block_length = block_length

    def choose(self, past: int, left: int) -> int:  # noqa: ARG002
        """See :class:`Policy`."""
        return self._block_length

    def rows_to_verify(self, num_wanted: int, confidence: NDArray[Any] | None) -> int:  # noqa: ARG002
        """See :class:`Policy`."""
        return self._block_length

    def record(self, num_tokens: int) -> None:
        """Nothing is noted."""


class Acceptance:
    """How likely each slot's draft is accepted once those before it are: an estimate from the cycles so far.

    A discounted Kaplan-Meier estimate: a slot counts as tried only where all before it were accepted. Of a block whose drafts were all accepted,
    as far as they were verified, those behind count by their confidence: they were not verified *because* that was low, and to leave
    them out would make long blocks look better than they are. Behind the longest block there is nothing, for or against. Each slot's rate leans
    on the rate of all slots together, which longer blocks are judged by until they have been tried, and that one on the prior.

    Args:
        num_slots: drafts of the longest block.
        prior: acceptance of a slot before anything was seen.
    """

    def __init__(self, num_slots: int, prior: float = PRIOR_ACCEPTANCE) -> None:
        self._prior = prior
        self._tried, self._accepted = np.zeros(num_slots), np.zeros(num_slots)

    def record(self, num_verified: int, num_accepted: int, unverified: NDArray[Any] = NOTHING) -> None:
        """Take note of a cycle: drafts that were verified, those of them that were accepted, and the confidence of those behind them."""
        self._tried[: min(num_accepted + 1, num_verified)] += 1
        self._accepted[:num_accepted] += 1
        if num_accepted == num_verified:
            reached = np.cumprod([1.0, *unverified])
            slots = slice(num_verified, num_verified + len(unverified))
            self._tried[slots] += reached[:-1]
            self._accepted[slots] += reached[1:]

    def forget(self, num_tokens: int) -> None:
        """Let what was seen weigh less, so many tokens later."""
        factor = _weight_after(num_tokens)
        self._tried *= factor
        self._accepted *= factor

    def rates(self, ahead: NDArray[Any] = NOTHING) -> NDArray[np.float64]:
        """``(num_slots,)``: how likely a slot's draft is accepted where those before it are; ``ahead`` is the confidence in the first ones."""
        pooled = (self._accepted.sum() + self._prior * PRIOR_SLOTS) / (self._tried.sum() + PRIOR_SLOTS)
        accepted, tried = self._accepted + pooled * SLOT_TRIALS, self._tried + SLOT_TRIALS
        accepted[: len(ahead)] += ahead * AHEAD_TRIALS
        tried[: len(ahead)] += AHEAD_TRIALS
        rates: NDArray[np.float64] = accepted / tried
        return rates


def expected_tokens(rates: NDArray[Any]) -> NDArray[np.float64]:
    """``(n + 1,)``, of a cycle whose slots have such rates ``(n,)``: entry ``k - 1`` is what it is expected to yield if at most ``k`` are wanted."""
    reached = np.ones(len(rates) + 1)
    np.cumprod(rates, out=reached[1:])
    return reached.cumsum()


def _weight_after(num_tokens: int) -> float:
    """Of what was seen, so many tokens later."""
    return math.exp(-num_tokens / MEMORY_TOKENS)


class AdaptivePolicy:
    """The step of the fewest expected milliseconds a token.

    The next block is judged by what the last draft made of the same positions: slots behind the first rejection are drafted again, and where they
    were sure, or unsure, they mostly still are; that goes for the end of the text, too. Beyond these, by how long the cycles so far were.

    An AR step shows nothing of acceptance; while these are taken, what was seen before is forgotten, the estimate goes back to the prior, and
    drafting is tried again. Longer blocks need no trial either: where every draft of a block is accepted, the estimate for the slots behind it
    rises too.

    Args:
        costs: of the steps there are to choose from.
        is_confident: whether :meth:`rows_to_verify` will be told how likely drafts are to be accepted.
    """

    def __init__(self, costs: StepCosts, *, is_confident: bool) -> None:
        self._lengths = np.array(costs.lengths)
        self._past = np.array(costs.past, float)
        drafts, verifications = ([ms[n] for n in costs.lengths] for ms in (costs.draft_ms, costs.verify_ms))
        self._costs = np.array([costs.ar_ms, *drafts, *verifications])
        self._acceptance = Acceptance(int(self._lengths.max()) - 1, costs.acceptance)
        self._surplus = _Surplus(PRIOR_SURPLUS if is_confident else 1.0)
        self._ahead = NOTHING
        self._step = _Step(AR_STEP, NOTHING, 0.0)

    def choose(self, past: int, left: int) -> int:
        """See :class:`Policy`."""
        ar, drafts, verifications = self._costs_at(past)
        tokens = expected_tokens(self._acceptance.rates(self._ahead))[np.minimum(self._lengths, left) - 1]
        rows = tokens + self._surplus.share * (self._lengths - tokens)
        verified = np.interp(rows, [AR_STEP, *self._lengths], [ar, *verifications])
        ratios = np.array([ar, *((drafts + verified) / tokens)])
        best = int(ratios.argmin())
        self._step = _Step(int(self._lengths[best - 1]) if best else AR_STEP, verifications, float(ratios[best]))
        return self._step.block_length

    def rows_to_verify(self, num_wanted: int, confidence: NDArray[Any] | None) -> int:
        """See :class:`Policy`. The draft is paid for; a further row has to bring more tokens than its time would elsewhere."""
        step = self._step
        step.num_wanted = num_wanted
        if confidence is None:
            step.rows = int(self._lengths[self._lengths >= num_wanted][0])
            return step.rows
        step.drafts = confidence[1:].astype(np.float64)
        step.drafts[num_wanted - 1 :] = 0
        rows = self._lengths[self._lengths <= step.block_length]
        tokens = expected_tokens(step.drafts)[rows - 1]
        step.rows = int(rows[(tokens * step.ms_per_token - step.verify_ms[: len(rows)]).argmax()])
        return step.rows

    def record(self, num_tokens: int) -> None:
        """See :class:`Policy`."""
        step = self._step
        self._acceptance.forget(num_tokens)
        self._surplus.forget(num_tokens)
        if step.block_length == AR_STEP:
            self._ahead = self._ahead[1 : 1 + AHEAD_AFTER_AR]
            return
        self._acceptance.record(step.rows - 1, num_tokens - 1, step.drafts[step.rows - 1 : step.num_wanted - 1])
        self._surplus.record(step.block_length, step.rows, num_tokens)
        self._ahead = step.drafts[num_tokens:]

    def _costs_at(self, past: int) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Of an AR step, and of drafting and of verifying each length."""
        right = min(max(int(np.searchsorted(self._past, past)), 1), len(self._past) - 1)
        low, high = self._past[right - 1], self._past[right]
        share = min(max((past - low) / (high - low), 0.0), 1.0) if right else 0.0
        costs = self._costs[:, right - 1] * (1 - share) + self._costs[:, right] * share
        return float(costs[0]), costs[1 : 1 + len(self._lengths)], costs[1 + len(self._lengths) :]


class _Surplus:
    """Of the rows that yield no token the share that is verified all the same: 0 where confidence tells them beforehand, 1 where it does not."""

    def __init__(self, prior: float) -> None:
        self._prior, self._verified, self._all = prior, 0.0, 0.0

    @property
    def share(self) -> float:
        return (self._verified + self._prior * PRIOR_SURPLUS_ROWS) / (self._all + PRIOR_SURPLUS_ROWS)

    def record(self, block_length: int, rows: int, num_tokens: int) -> None:
        self._verified += rows - num_tokens
        self._all += block_length - num_tokens

    def forget(self, num_tokens: int) -> None:
        factor = _weight_after(num_tokens)
        self._verified *= factor
        self._all *= factor


@dataclass
class _Step:
    """A step that was chosen.

    Attributes:
        verify_ms: of each block length.
        ms_per_token: that the step was expected to take.
        rows: that are verified.
        num_wanted: tokens that may come of it.
        drafts: confidence in those of the block, 0 behind the last that is wanted; empty where it says nothing.
    """

    block_length: int
    verify_ms: NDArray[np.float64]
    ms_per_token: float
    rows: int = 0
    num_wanted: int = 0
    drafts: NDArray[Any] = field(default_factory=lambda: NOTHING)


def make_policy(costs: StepCosts | None, block_length: int, *, is_confident: bool) -> Policy:
    """The policy for these costs; without any, self-speculation with this block length."""
    return FixedPolicy(block_length) if costs is None else AdaptivePolicy(costs, is_confident=is_confident)

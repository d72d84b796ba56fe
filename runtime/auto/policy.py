"""Chooses the next step of a text in mode ``auto``.

A step is one token of AR or a cycle of self-speculation. Of a cycle it also chooses how long the
block is, and how much of it is verified.

Every choice yields the tokens of AR, or their distribution, so what is chosen is a matter of time
alone. A step is worth the tokens that it is expected to yield; the policy takes the one with the
fewest milliseconds a token, or, where it is known how long such a text is, the one that leaves the
least to do. Milliseconds come from a table (:mod:`trimode.runtime.auto.timings`). How many drafts
will be accepted is estimated from the text itself (:mod:`trimode.runtime.auto.acceptance`):
acceptance persists (after a long cycle the next one is mostly long), and it differs from one text
to the next far more than from one model to the next. A text begins with what texts after prompts
like its own have shown (:mod:`trimode.runtime.auto.prior`), which also says how much of it is still
to come (:mod:`trimode.runtime.auto.remaining_time`). Once a block is drafted, its probabilities say
more than any history: what will hardly be accepted is not verified.

Nothing here looks at a clock, so the same text under the same table takes the same steps, and a
seed reproduces it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.auto.acceptance import Acceptance, weight_after
from trimode.runtime.auto.prior import AcceptanceHistory, Prior
from trimode.runtime.auto.remaining_time import RemainingTime, StepTimes, reached

AR_STEP = 1
"""The block length that stands for a step of AR."""

AHEAD_AFTER_AR = 4
"""Slots of which a draft still says something once a token has come by AR.

That token was unknown to the draft, and may have been what made it unsure.
"""
MOST_REJECTION_SCALE = 64.0
"""Times as often as expected, or as seldom, that drafts are taken to be rejected in the rest of a
text.
"""
PRIOR_WASTE = 0.2
"""Share of the rows without use that are verified, before a text has shown its own, where drafts
have a confidence; else all of them are.
"""
PRIOR_WASTE_ROWS = 4.0
"""Rows that this weighs as much as."""

_KEPT = 4096
"""Numbers of cached tokens whose steps are kept."""


@dataclass(frozen=True)
class StepCosts:
    """Holds milliseconds of forwards, over a grid of cached tokens.

    Between its points they are interpolated, beyond them held.

    Attributes:
        past: Numbers of cached tokens, ascending: the grid.
        ar_ms: Milliseconds of one forward of one token.
        draft_ms: Block length -> milliseconds of its draft.
        verify_ms: Block length -> milliseconds of verifying so many tokens, for the same lengths.
        history: Acceptance to expect of a text of which nothing is known yet.
    """

    past: tuple[int, ...]
    ar_ms: tuple[float, ...]
    draft_ms: Mapping[int, tuple[float, ...]]
    verify_ms: Mapping[int, tuple[float, ...]]
    history: AcceptanceHistory = field(default_factory=AcceptanceHistory)
    _kinds: dict[str, TextKind] = field(default_factory=dict, init=False, repr=False, compare=False)
    _times: dict[float, StepTimes] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        rows = (self.ar_ms, *self.draft_ms.values(), *self.verify_ms.values())
        if (
            not self.past
            or list(self.past) != sorted(set(self.past))
            or any(len(row) != len(self.past) for row in rows)
        ):
            raise ValueError(
                "expected ascending cached lengths, and a cost of each forward at each of them"
            )
        if self.draft_ms.keys() != self.verify_ms.keys():
            raise ValueError("expected costs of drafting and of verifying the same block lengths")

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Block lengths, ascending."""
        return tuple(sorted(self.draft_ms))

    def at(self, past: float) -> StepTimes:
        """Return the times of the steps after so many cached tokens."""
        if past not in self._times:
            if len(self._times) == _KEPT:
                self._times.clear()
            self._times[past] = self._interpolated(past)
        return self._times[past]

    def _interpolated(self, past: float) -> StepTimes:
        drafts, verifications = (
            [float(np.interp(past, self.past, ms[n])) for n in self.lengths]
            for ms in (self.draft_ms, self.verify_ms)
        )
        return StepTimes(
            self.lengths, float(np.interp(past, self.past, self.ar_ms)), drafts, verifications
        )

    def kind_of(self, prompt: Sequence[int]) -> TextKind:
        """Return the kind of the text after a prompt.

        It is one object for all prompts of a kind.
        """
        kinds = tuple(self.history.kinds_of(prompt))
        name = kinds[-1].sha256 if kinds else ""
        if name not in self._kinds:
            usual = self.at(sum(self.past) / len(self.past))
            self._kinds[name] = TextKind(self.history.prior(kinds, self.lengths[-1] - 1), usual)
        return self._kinds[name]

    def only(self, is_usable: Callable[[int], bool]) -> StepCosts:
        """Return the costs with the usable block lengths only."""
        usable = [length for length in self.lengths if is_usable(length)]
        return replace(
            self,
            draft_ms={n: self.draft_ms[n] for n in usable},
            verify_ms={n: self.verify_ms[n] for n in usable},
        )


class TextKind:
    """Stands for texts of which the same is expected.

    Args:
        prior: Expectation of them.
        times: Times of the steps, at a usual number of cached tokens.
    """

    def __init__(self, prior: Prior, times: StepTimes) -> None:
        self.prior, self._times = prior, times
        self._remaining: dict[tuple[int, bool], RemainingTime] = {}

    def remaining(self, rejection_scale: float, *, is_confident: bool) -> RemainingTime:
        """Return the remaining time of a text of this kind.

        Drafts in it are rejected ``rejection_scale`` times as often as expected, to the next power
        of 2.
        """
        level = round(
            math.log2(min(max(rejection_scale, 1 / MOST_REJECTION_SCALE), MOST_REJECTION_SCALE))
        )
        key = level, is_confident
        if key not in self._remaining:
            rates = [max(1 - 2.0**level * rejection, 0.0) for rejection in self.prior.rejection]
            self._remaining[key] = RemainingTime(
                rates, self.prior.ends, self._times, PRIOR_WASTE if is_confident else 1.0
            )
        return self._remaining[key]


class Policy(Protocol):
    """Chooses the steps of one text.

    After each :meth:`choose` comes one :meth:`record`, and between them, in a cycle, one
    :meth:`rows_to_verify`.
    """

    def choose(self, past: int, left: int) -> int:
        """Choose the next step's block length, or :data:`AR_STEP`.

        Args:
            past: Number of cached tokens.
            left: Number of tokens that may still come.
        """
        ...

    def rows_to_verify(self, num_wanted: int, confidence: NDArray[Any] | None) -> int:
        """Choose how many tokens of a drafted block to verify.

        Its first token is one of them.

        Args:
            num_wanted: Most tokens that the cycle may yield: as many as may still come, and none
                behind a drafted end.
            confidence: Confidence in each slot's draft, ``(block_length,)``, the first being no
                draft. None where tokens are drawn: then ``num_wanted`` depends on a draw, and less
                must not be verified. An end that was drawn would be drawn again, and come too
                seldom.
        """
        ...

    def record(self, num_tokens: int) -> None:
        """Take note of how many tokens the step yielded.

        The last of them was no accepted draft.
        """
        ...


@runtime_checkable
class Reasoned(Protocol):
    """Gives the reason for a policy's last choice, in words."""

    @property
    def reason(self) -> str: ...


class FixedPolicy:
    """Chooses the same block length every time.

    Without a table there is nothing to choose by.
    """

    reason = "no timings of this machine: blocks of one length"

    def __init__(self, block_length: int) -> None:
        self._block_length = block_length

    def choose(self, past: int, left: int) -> int:  # noqa: ARG002
        return self._block_length

    def rows_to_verify(self, num_wanted: int, confidence: NDArray[Any] | None) -> int:  # noqa: ARG002
        return self._block_length

    def record(self, num_tokens: int) -> None:
        """Note nothing."""


class AdaptivePolicy:
    """Chooses the step that is expected to leave the least to do.

    What is left is counted in milliseconds, the step's own included.

    The next block is judged by what the last draft made of the same positions: slots behind the
    first rejection are drafted again, and where they were sure, or unsure, they mostly still are;
    that goes for the end of the text, too. Beyond these, by how long the cycles so far were.

    An AR step shows nothing of acceptance; while these are taken, what was seen before is
    forgotten, the estimate goes back to the prior, and drafting is tried again. Longer blocks need
    no trial either: where every draft of a block is accepted, the estimate for the slots behind it
    rises too.

    Args:
        costs: Costs of the steps there are to choose from.
        prompt: Prompt of the text, whose first token is written.
        is_confident: Whether :meth:`rows_to_verify` will be told how likely drafts are to be
            accepted.
    """

    def __init__(self, costs: StepCosts, prompt: Sequence[int] = (), *, is_confident: bool) -> None:
        self._costs, self._lengths = costs, costs.lengths
        self._kind, self._is_confident = costs.kind_of(prompt), is_confident
        self._acceptance = Acceptance(self._kind.prior)
        self._waste = _Waste(PRIOR_WASTE if is_confident else 1.0)
        self._num_tokens = 1
        self._ahead: list[float] = []
        self._step: _Step
        self._reasons: tuple[float, list[float], list[float], list[int], list[float]]

    def choose(self, past: int, left: int) -> int:
        times, remaining = (
            self._costs.at(past),
            self._kind.remaining(self._acceptance.rejection_scale, is_confident=self._is_confident),
        )
        likely, waste = reached(self._acceptance.rates(self._ahead)), self._waste.share
        ms_per_token = times.best(list(accumulate(likely)), waste)
        # With this, where all tokens are worth the same, the step that leaves the least to do is
        # the one of the fewest milliseconds a token.
        scale = ms_per_token / remaining.ms_per_token
        saved = list(accumulate(map(mul, likely, remaining.worth(self._num_tokens, left))))
        useful = list(accumulate(map(mul, likely, remaining.goes_on(self._num_tokens))))
        wanted = [min(length, left) - 1 for length in self._lengths]
        cycles = times.cycles([useful[k] for k in wanted], waste)
        left_to_do = [
            times.ar_ms - scale * saved[0],
            *(ms - scale * saved[k] for ms, k in zip(cycles, wanted, strict=True)),
        ]
        best = left_to_do.index(min(left_to_do))
        self._step = _Step((AR_STEP, *self._lengths)[best], times.verify_ms, remaining, scale)
        self._reasons = times.ar_ms, cycles, likely, wanted, left_to_do
        return self._step.block_length

    @property
    def reason(self) -> str:
        """Tokens and time expected of the best block and of AR.

        One of them was the last choice.
        """
        ar_ms, cycles, likely, wanted, left_to_do = self._reasons
        best = left_to_do.index(min(left_to_do[1:]), 1) - 1
        tokens = sum(likely[: wanted[best] + 1])
        return (
            f"expected of a block of {self._lengths[best]}: {tokens:.1f} tokens in "
            f"{cycles[best]:.2f} ms; of AR: 1 in {ar_ms:.2f} ms"
        )

    def rows_to_verify(self, num_wanted: int, confidence: NDArray[Any] | None) -> int:
        """Choose as many rows as save more time than they take.

        The draft is already paid for.
        """
        step = self._step
        step.num_wanted = num_wanted
        if confidence is None:
            step.rows = next(length for length in self._lengths if length >= num_wanted)
            return step.rows
        step.drafts = confidence[1:num_wanted].tolist()
        is_end_known = num_wanted < step.block_length
        worth = (
            step.remaining.worth_until(num_wanted)
            if is_end_known
            else [step.remaining.ms_per_token] * num_wanted
        )
        saved = list(accumulate(map(mul, reached(step.drafts), worth)))
        gains = [
            (step.scale * saved[min(length, num_wanted) - 1] - ms, length)
            for length, ms in zip(self._lengths, step.verify_ms, strict=True)
            if length <= step.block_length
        ]
        step.rows = max(gains, key=lambda gain: gain[0])[1]
        return step.rows

    def record(self, num_tokens: int) -> None:
        step = self._step
        self._num_tokens += num_tokens
        self._acceptance.forget(num_tokens)
        self._waste.forget(num_tokens)
        if step.block_length == AR_STEP:
            self._ahead = self._ahead[1 : 1 + AHEAD_AFTER_AR]
            return
        self._acceptance.record(step.rows - 1, num_tokens - 1, step.drafts[step.rows - 1 :])
        self._waste.record(step.block_length, step.rows, num_tokens)
        behind_end = [0.0] * (step.block_length - step.num_wanted) if step.drafts else []
        self._ahead = (step.drafts + behind_end)[num_tokens:]


class _Waste:
    """Tracks the share of useless rows that is verified all the same.

    Such rows yield no token. The share is 0 where confidence tells them beforehand, 1 where it does
    not.
    """

    def __init__(self, prior: float) -> None:
        self._prior, self._verified, self._all = prior, 0.0, 0.0

    @property
    def share(self) -> float:
        return (self._verified + self._prior * PRIOR_WASTE_ROWS) / (self._all + PRIOR_WASTE_ROWS)

    def record(self, block_length: int, rows: int, num_tokens: int) -> None:
        self._verified += rows - num_tokens
        self._all += block_length - num_tokens

    def forget(self, num_tokens: int) -> None:
        factor = weight_after(num_tokens)
        self._verified *= factor
        self._all *= factor


@dataclass
class _Step:
    """Holds a step that was chosen.

    Attributes:
        verify_ms: Milliseconds of verifying each block length.
        remaining: Remaining time that it was chosen by.
        scale: Factor of what tokens are worth there, in this text.
        rows: Number of rows that are verified.
        num_wanted: Number of tokens that may come of it.
        drafts: Confidence in those of the block that are wanted; empty where it says nothing.
    """

    block_length: int
    verify_ms: Sequence[float]
    remaining: RemainingTime
    scale: float
    rows: int = 0
    num_wanted: int = 0
    drafts: list[float] = field(default_factory=list)


def make_policy(
    costs: StepCosts | None, block_length: int, prompt: Sequence[int], *, is_confident: bool
) -> Policy:
    """Make the policy for these costs and this prompt.

    Without any costs, it is self-speculation with this block length.
    """
    return (
        FixedPolicy(block_length)
        if costs is None
        else AdaptivePolicy(costs, prompt, is_confident=is_confident)
    )

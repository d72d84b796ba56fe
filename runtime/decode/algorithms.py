"""Defines the decoding algorithms, one function each.

They are in the words of the Nemotron-Labs-Diffusion report (arXiv 2607.05722). Each is a generator
over a :class:`~trimode.runtime.decode.sequence.Sequence`: it yields tokens as they are committed
and never takes one back. In between it yields the forwards that it needs
(:mod:`trimode.runtime.decode.forward`), which :class:`Algorithm` runs for those who only want
tokens. ``nfe`` follows the reference implementation: AR counts a forward per token, diffusion its
denoise and commit forwards, self-speculation the prefill and every draft and verify forward,
quadratic self-speculation one forward for the first draft and one a cycle. Which token it is, is
asked of a :class:`~trimode.runtime.decode.token_choice.TokenSelector`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import update_wrapper
from itertools import takewhile
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trimode.formats.contract import Mode, ModelInfo
from trimode.runtime.auto.policy import AR_STEP, Policy, make_policy
from trimode.runtime.decode.forward import Effect, Forward, Outputs, Steps, drive
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.selectors import make_token_selector
from trimode.runtime.decode.sequence import Sequence
from trimode.runtime.decode.token_choice import TokenLogprob, TokenSelector
from trimode.runtime.decode.unmasking import Denoised, fill_policy, reaching
from trimode.runtime.sessions.base import Ids

Tokens = Generator[list[int], None, None]


@dataclass
class Counters:
    """Counts what an algorithm does while it runs.

    Attributes:
        nfe: Number of forward passes, counted as the reference counts them.
        cycles: Number of draft-and-verify cycles.
        cycle_tokens: Number of tokens those cycles yielded, up to the end of the text.
        drafted: Number of drafts that were verified, the tokens before them not counted.
        accepted: Number of those of each cycle that are part of the text.
        denoised_slots: Number of slots of blocks in denoise forwards.
        finish_reason: Reason of the end: ``stop`` after an end token, ``length`` at a limit, None
            while running.
        seed: Seed of the draws; None where nothing is drawn.
        logprobs: Log-probabilities, one for each token, where asked for.
        picks: Block length -> steps of ``auto`` that had it, 1 being steps of AR.
        policy: Policy of ``auto`` that has chosen these.
        forced: Number of tokens that a grammar decided; None without one.
    """

    nfe: int = 0
    cycles: int = 0
    cycle_tokens: int = 0
    drafted: int = 0
    accepted: list[int] = field(default_factory=list)
    denoised_slots: int = 0
    finish_reason: Literal["stop", "length"] | None = None
    seed: int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    picks: dict[int, int] = field(default_factory=dict)
    policy: Policy | None = None
    forced: int | None = None


class Algorithm:
    """Wraps the steps of a way to decode.

    A call runs each forward at once over the sequence's own cache. ``steps`` leaves the forwards to
    whoever drives it.
    """

    def __init__(self, steps: Callable[[Sequence, DecodeOptions, Counters], Steps]) -> None:
        self.steps = steps
        update_wrapper(self, steps)

    def __call__(self, sequence: Sequence, options: DecodeOptions, counters: Counters) -> Tokens:
        """Yield tokens as they are committed."""
        return drive(self.steps(sequence, options, counters), sequence.answer)


@Algorithm
def decode_ar(sequence: Sequence, options: DecodeOptions, counters: Counters) -> Steps:
    """Decode autoregressively: one causal forward a token.

    Tokens that a grammar decides need none.
    """
    budget, choose = _start(sequence, options, counters)
    while not budget.done:
        if (yield from _jump(sequence, counters, budget, choose)):
            continue
        counters.nfe += 1
        token = yield from choose.next()
        sequence.append([token])
        yield budget.settle([token])


@Algorithm
def decode_diffusion(sequence: Sequence, options: DecodeOptions, counters: Counters) -> Steps:
    """Decode by block diffusion: denoise a block, then commit it.

    The block's first slot is the causal prediction, and a causal forward commits it. Which slots
    each forward fills is up to a policy (:mod:`trimode.runtime.decode.unmasking`); where it finds
    none, they stay masked, as in the reference. A last block that would exceed the limit is
    denoised whole and cut, so the tokens are those of a longer run.
    """
    budget, choose = _start(sequence, options, counters)
    fill = fill_policy(
        options.sampler, options.threshold, options.steps or options.block_length, options.scorer
    )
    mask = sequence.model.mask_token_id
    while not budget.done:
        if forced := _write_forced(sequence, budget, choose, options.block_length - 1):
            yield forced
            continue
        block = _masked_block((yield from choose.next()), options.block_length, sequence.model)
        choose.begin_block(block)
        for step in range(options.block_length):
            masked = block == mask
            if not masked.any():
                break
            counters.nfe += 1
            counters.denoised_slots += len(block)
            ids, probabilities = yield from sequence.denoise(block)
            tokens, confidence, masked = choose.denoised(block, masked, ids, probabilities)
            slots = fill(
                Denoised(block, masked, ids, probabilities, tokens, confidence, mask, step)
            )
            block[slots] = tokens[slots]
            if not slots.any() or _ends_decided(block, budget.eos, mask):
                break
        block = choose.allowed(block)
        kept = budget.fit(budget.before_end(block.tolist()))
        length = len(sequence.tokens) + len(kept)
        choose.committed(kept)
        yield from sequence.commit(block)
        counters.nfe += 1
        sequence.truncate(length)
        yield budget.settle(kept)


@Algorithm
def decode_linear_spec(sequence: Sequence, options: DecodeOptions, counters: Counters) -> Steps:
    """Decode by linear self-speculation: draft a block, then verify it.

    A block is drafted bidirectionally and verified causally. The agreeing prefix is kept, and one
    token more. What is drawn has the distribution of :func:`decode_ar` (see
    :func:`~trimode.runtime.decode.sampling.accept_or_replace`).
    """
    budget, choose = _start(sequence, options, counters)
    if budget.done:
        return
    if not (yield from _jump(sequence, counters, budget, choose)):
        yield budget.settle((yield from _seed(sequence, counters, choose)))
    while not budget.done:
        if (yield from _jump(sequence, counters, budget, choose, options.block_length - 1)):
            continue
        kept = budget.fit((yield from _cycle(sequence, options, counters, budget, choose)))
        sequence.accept(kept)
        yield budget.settle(kept)


@Algorithm
def decode_quadratic_spec(sequence: Sequence, options: DecodeOptions, counters: Counters) -> Steps:
    """Decode by quadratic self-speculation: one forward verifies and drafts.

    Every forward verifies a draft and drafts the next block for each prefix of it that may prove
    right. The reference reads the prompt and makes the first draft in one forward, which counts;
    here these are two. The graph itself decides which drafts are right, and has drafted behind
    these by then, so no rule may have another opinion: options must be plain.
    """
    assert options.is_plain
    budget, _ = _start(sequence, options, counters)
    if budget.done:
        return
    counters.nfe += 1
    drafts = yield from sequence.first_drafts(options.block_length)
    while not budget.done:
        counters.nfe += 1
        counters.cycles += 1
        speculation = yield from sequence.speculate(drafts)
        verified = budget.before_end(speculation.accepted)
        counters.cycle_tokens += len(verified)
        kept = budget.fit(verified)
        counters.drafted += len(drafts) - 1
        counters.accepted.append(len(kept) - 1)
        sequence.accept_drafts(len(kept), speculation)
        drafts = speculation.next_drafts
        yield budget.settle(kept)


@Algorithm
def decode_auto(sequence: Sequence, options: DecodeOptions, counters: Counters) -> Steps:
    """Decode by AR or linear self-speculation, whichever is expected to be faster.

    Each step is the one that is expected to take fewer milliseconds a token
    (:mod:`trimode.runtime.auto.policy`). The tokens are those of :func:`decode_ar`, or their
    distribution, whatever is chosen: a choice knows the text so far, and nothing of what is drawn
    next. A drawn end of the text is no exception: what stands behind it in the block is of no use
    whether it is accepted or not.
    """
    budget, choose = _start(sequence, options, counters)
    if budget.done:
        return
    policy = sequence.policy or make_policy(
        options.costs,
        options.block_length,
        sequence.tokens,
        is_confident=not options.sampling.is_random,
    )
    counters.policy = policy
    if not (yield from _jump(sequence, counters, budget, choose)):
        yield budget.settle((yield from _seed(sequence, counters, choose)))
    length = options.block_length
    while not budget.done:
        least = 1 if length == AR_STEP else options.block_length - 1
        if (yield from _jump(sequence, counters, budget, choose, least)):
            continue
        length = policy.choose(sequence.cached_length, budget.left)
        counters.picks[length] = counters.picks.get(length, 0) + 1
        if length == AR_STEP:
            counters.nfe += 1
            kept = [(yield from choose.next())]
            sequence.append(kept)
        else:
            cycle = replace(options, block_length=length)
            kept = budget.fit(
                (yield from _cycle(sequence, cycle, counters, budget, choose, policy))
            )
            sequence.accept(kept)
        policy.record(len(kept))
        yield budget.settle(kept)


ALGORITHMS: dict[Mode, Algorithm] = {
    "ar": decode_ar,
    "diffusion": decode_diffusion,
    "linear_spec": decode_linear_spec,
    "quadratic_spec": decode_quadratic_spec,
}
MODES: dict[Mode, Algorithm] = {**ALGORITHMS, "auto": decode_auto}
"""What a caller can ask for: the algorithms, and the choice between some of them, which measures
nothing that they do not.
"""


def _start(
    sequence: Sequence, options: DecodeOptions, counters: Counters
) -> tuple[_Budget, TokenSelector]:
    choose = make_token_selector(sequence, options, counters.logprobs)
    counters.seed = choose.seed
    return _Budget(sequence, options, counters, choose), choose


def _write_forced(
    sequence: Sequence, budget: _Budget, choose: TokenSelector, least: int
) -> list[int]:
    """Append a run of tokens that a grammar decides.

    It has at least ``least`` tokens, or ends the text. They take no forward here; the next one
    reads them. Empty where there is no such run.
    """
    run = budget.fit(choose.forced(max(1, least), budget.left))
    if run:
        sequence.append(run)
        budget.settle(run)
    return run


def _jump(
    sequence: Sequence, counters: Counters, budget: _Budget, choose: TokenSelector, least: int = 1
) -> Generator[Forward | list[int], Outputs, bool]:
    """Write a run of forced tokens, and the token after it.

    A single forward tells that token. Returns whether there was a run.
    """
    run = _write_forced(sequence, budget, choose, least)
    if run:
        yield run
        if not budget.done:
            yield budget.settle((yield from _seed(sequence, counters, choose)))
    return bool(run)


def _seed(sequence: Sequence, counters: Counters, choose: TokenSelector) -> Effect[list[int]]:
    """Choose and append the first token of self-speculation.

    Its forward counts, and that once, where a prompt is read in chunks.
    """
    passes = sequence.forwards.prefill + sequence.forwards.decode
    seed = yield from choose.next()
    counters.nfe += sequence.forwards.prefill + sequence.forwards.decode > passes
    sequence.append([seed])
    return [seed]


def _cycle(
    sequence: Sequence,
    options: DecodeOptions,
    counters: Counters,
    budget: _Budget,
    choose: TokenSelector,
    policy: Policy | None = None,
) -> Effect[list[int]]:
    """Draft a block after the last token, and verify it.

    A policy may ask to verify less of it. Returns the accepted tokens, up to the end of the text.
    """
    block = _masked_block(sequence.tokens[-1], options.block_length, sequence.model)
    choose.begin_draft(block)
    confidence = yield from _draft(sequence, block, options, counters, choose)
    if policy is not None:
        wanted = min(budget.left, len(budget.before_end(block[1:].tolist())) + 1)
        block = block[
            : policy.rows_to_verify(wanted, None if options.sampling.is_random else confidence)
        ]
    counters.nfe += 1
    counters.cycles += 1
    verified = budget.before_end(choose.verified(block, (yield from sequence.verify(block))))
    counters.cycle_tokens += len(verified)
    counters.drafted += len(block) - 1
    counters.accepted.append(_num_agreeing(block[1:].tolist(), budget.fit(verified)))
    return verified


def _num_agreeing(drafts: list[int], token_ids: list[int]) -> int:
    """Count the first drafts that are these tokens."""
    pairs = zip(drafts, token_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _draft(
    sequence: Sequence,
    block: Ids,
    options: DecodeOptions,
    counters: Counters,
    choose: TokenSelector,
) -> Effect[NDArray[Any]]:
    """Fill the masked slots of ``block`` with drafts.

    That takes one forward at threshold 0, else as many as the threshold asks.

    Drawn drafts are filled from the left. The rule that accepts them takes a draft for one drawn
    from its ``q`` whatever came before it; a slot drawn before one to its left would have steered
    that one's ``q``, and then be no such draw given that that one was accepted.

    Returns:
        Confidence that the last forward had in each slot, ``(L,)``.
    """
    choose_slots = _leading if options.sampling.is_random else reaching
    confidence: NDArray[Any] = np.ones(len(block))
    for _ in range(max(1, options.block_length - 1)):
        counters.nfe += 1
        masked = block == sequence.model.mask_token_id
        # already decided, even should the model have chosen the mask token itself
        masked[0] = False
        tokens, confidence = choose.drafted(
            block, masked, *(yield from sequence.draft(block, use_drafter=options.use_drafter))
        )
        slots = choose_slots(masked, confidence, options.threshold)
        block[slots] = tokens[slots]
        if options.threshold == 0 or not (block[1:] == sequence.model.mask_token_id).any():
            break
    return confidence


def _masked_block(first: int, length: int, model: ModelInfo) -> Ids:
    block = np.full(length, model.mask_token_id, np.int64)
    block[0] = first
    return block


def _leading(
    masked: NDArray[np.bool_], confidence: NDArray[Any], threshold: float
) -> NDArray[np.bool_]:
    """Find the masked slots to fill, from the left.

    They are the first one, and those after it up to the first whose confidence does not reach the
    threshold.
    """
    below = masked & (confidence < threshold)
    below[masked.argmax()] = False
    has_stopped: NDArray[np.bool_] = np.logical_or.accumulate(below)
    return masked & ~has_stopped


def _ends_decided(block: Ids, eos: tuple[int, ...], mask_token_id: int) -> bool:
    """Tell whether an end token has no masked slot before it.

    What follows it cannot matter.
    """
    ends = np.isin(block, eos)
    return bool(ends.any()) and not (block[: ends.argmax()] == mask_token_id).any()


class _Budget:
    """Applies the limits on a text's length and end."""

    def __init__(
        self,
        sequence: Sequence,
        options: DecodeOptions,
        counters: Counters,
        choose: TokenSelector,
    ) -> None:
        self.eos = options.end_tokens(sequence.model)
        self._counters, self._count, self._choose = counters, 0, choose
        self.left = min(options.max_new_tokens, sequence.room)
        self.settle([])

    @property
    def done(self) -> bool:
        return self._counters.finish_reason is not None

    def fit(self, token_ids: list[int]) -> list[int]:
        """Return the tokens that still fit."""
        return token_ids[: self.left]

    def before_end(self, token_ids: list[int]) -> list[int]:
        """Return the tokens up to and including the first end token."""
        for i, token in enumerate(token_ids):
            if token in self.eos:
                return token_ids[: i + 1]
        return token_ids

    def settle(self, kept: list[int]) -> list[int]:
        """Count tokens that were appended, and return them.

        It decides whether they are the last ones.
        """
        self.left -= len(kept)
        self._count += len(kept)
        if self._counters.logprobs:
            del self._counters.logprobs[self._count :]  # of tokens that were chosen, but cut off
        self._counters.forced = self._choose.num_forced(self._count)
        if (kept and kept[-1] in self.eos) or self._choose.is_over:
            self._counters.finish_reason = "stop"
        elif self.left <= 0:
            self._counters.finish_reason = "length"
        return kept

"""The decoding algorithms, one function each, in the words of the Nemotron-Labs-Diffusion report (arXiv 2607.05722).

Each is a generator over a :class:`~trimode.runtime.sequence.Sequence`: it yields tokens as they are committed and never takes one back.
``nfe`` follows the reference implementation: AR counts a forward per token, diffusion its denoise and commit forwards, self-speculation
the prefill and every draft and verify forward, quadratic self-speculation one forward for the first draft and one a cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trimode.errors import UsageError
from trimode.graphs.contract import ModelInfo
from trimode.runtime.sequence import Sequence
from trimode.runtime.session import Array, Ids

Mode = Literal["ar", "diffusion", "linear_spec", "quadratic_spec"]


@dataclass(frozen=True)
class DecodeOptions:
    """What a caller can choose.

    Attributes:
        max_new_tokens: no mode returns more.
        block_length: slots of a block, the first of which is always a token already decided.
        threshold: a masked slot is filled when its probability reaches it; the most probable slot always is. 0 fills all at once.
        use_drafter: draft with the adapter where the bundle has one; changes speed, never tokens. Quadratic self-speculation never does.
        eos_token_ids: ends a text; None = the model's.
    """

    max_new_tokens: int = 128
    block_length: int = 32
    threshold: float = 0.9
    use_drafter: bool = True
    eos_token_ids: tuple[int, ...] | None = None


@dataclass
class Counters:
    """What an algorithm counts while it runs.

    Attributes:
        nfe: forward passes, counted as the reference counts them.
        cycles: draft-and-verify cycles.
        cycle_tokens: tokens those cycles yielded, up to the end of the text.
        finish_reason: ``stop`` after an end token, ``length`` at a limit, None while running.
    """

    nfe: int = 0
    cycles: int = 0
    cycle_tokens: int = 0
    finish_reason: Literal["stop", "length"] | None = None


def decode_ar(sequence: Sequence, options: DecodeOptions, counters: Counters) -> Iterator[list[int]]:
    """Autoregressive: one causal forward a token."""
    budget = _Budget(sequence, options, counters)
    while not budget.done:
        counters.nfe += 1
        token = sequence.predict()
        sequence.append([token])
        yield budget.settle([token])


def decode_diffusion(sequence: Sequence, options: DecodeOptions, counters: Counters) -> Iterator[list[int]]:
    """Block diffusion: denoise a block whose first slot is the causal prediction, then commit it with a causal forward.

    A last block that would exceed the limit is denoised whole and cut, so the tokens are those of a longer run.
    """
    budget = _Budget(sequence, options, counters)
    while not budget.done:
        block = _masked_block(sequence.predict(), options.block_length, sequence.model)
        for _ in range(options.block_length):
            if not (block == sequence.model.mask_token_id).any():
                break
            counters.nfe += 1
            ids, probabilities = sequence.denoise(block)
            _fill(block, block == sequence.model.mask_token_id, ids, probabilities, options.threshold)
            if _ends_decided(block, budget.eos, sequence.model.mask_token_id):
                break
        kept = budget.fit(budget.before_end(block.tolist()))
        length = len(sequence.tokens) + len(kept)
        sequence.commit(block)
        counters.nfe += 1
        sequence.truncate(length)
        yield budget.settle(kept)


def decode_linear_spec(sequence: Sequence, options: DecodeOptions, counters: Counters) -> Iterator[list[int]]:
    """Linear self-speculation: draft a block bidirectionally, verify it causally, keep the agreeing prefix and one token more."""
    budget = _Budget(sequence, options, counters)
    if budget.done:
        return
    passes = sequence.forwards.prefill + sequence.forwards.decode
    seed = sequence.predict()
    counters.nfe += sequence.forwards.prefill + sequence.forwards.decode > passes  # a prompt read in chunks counts once
    sequence.append([seed])
    yield budget.settle([seed])
    while not budget.done:
        block = _masked_block(sequence.tokens[-1], options.block_length, sequence.model)
        _draft(sequence, block, options, counters)
        counters.nfe += 1
        counters.cycles += 1
        verified = budget.before_end(sequence.verify(block))
        counters.cycle_tokens += len(verified)
        kept = budget.fit(verified)
        sequence.accept(kept)
        yield budget.settle(kept)


def decode_quadratic_spec(sequence: Sequence, options: DecodeOptions, counters: Counters) -> Iterator[list[int]]:
    """Quadratic self-speculation: every forward verifies a draft and drafts the next block for each prefix of it that may prove right.

    The reference reads the prompt and makes the first draft in one forward, which counts; here these are two.
    """
    budget = _Budget(sequence, options, counters)
    if budget.done:
        return
    counters.nfe += 1
    drafts = sequence.first_drafts(options.block_length)
    while not budget.done:
        counters.nfe += 1
        counters.cycles += 1
        accepted, drafts = sequence.speculate(drafts)
        verified = budget.before_end(accepted)
        counters.cycle_tokens += len(verified)
        kept = budget.fit(verified)
        sequence.accept(kept, following=int(drafts[0]) if len(kept) == len(accepted) else None)
        yield budget.settle(kept)


ALGORITHMS: dict[Mode, Callable[[Sequence, DecodeOptions, Counters], Iterator[list[int]]]] = {
    "ar": decode_ar,
    "diffusion": decode_diffusion,
    "linear_spec": decode_linear_spec,
    "quadratic_spec": decode_quadratic_spec,
}


def check_options(options: DecodeOptions, model: ModelInfo) -> None:
    """Raise :class:`UsageError` for an option out of its range."""
    if options.max_new_tokens < 1:
        raise UsageError(f"expected max_new_tokens of at least 1, found {options.max_new_tokens}", "ask for at least one token")
    if not 1 <= options.block_length <= model.max_block_length:
        found = f"expected a block length from 1 to {model.max_block_length}, found {options.block_length}"
        raise UsageError(found, f"the model was trained with {model.block_size}")
    if not 0 <= options.threshold <= 1:
        hint = "it is a probability; 0.9 is usual for diffusion, 0 for self-speculation"
        raise UsageError(f"expected a threshold from 0 to 1, found {options.threshold}", hint)


def _draft(sequence: Sequence, block: Ids, options: DecodeOptions, counters: Counters) -> None:
    """Fill the masked slots of ``block``: in one forward at threshold 0, else in as many as the threshold asks."""
    for _ in range(max(1, options.block_length - 1)):
        counters.nfe += 1
        ids, probabilities = sequence.draft(block, use_drafter=options.use_drafter)
        masked = block == sequence.model.mask_token_id
        masked[0] = False  # already decided, even should the model have chosen the mask token itself
        _fill(block, masked, ids, probabilities, options.threshold)
        if options.threshold == 0 or not (block[1:] == sequence.model.mask_token_id).any():
            return


def _masked_block(first: int, length: int, model: ModelInfo) -> Ids:
    block = np.full(length, model.mask_token_id, np.int64)
    block[0] = first
    return block


def _fill(block: Ids, masked: NDArray[np.bool_], ids: Array, probabilities: Array, threshold: float) -> None:
    """Commit, in place, every masked slot whose best probability reaches the threshold, and the most probable one in any case."""
    if not masked.any():
        return
    confidence = np.where(masked, probabilities[:, 0], -np.inf)
    chosen = masked & (confidence >= threshold)
    chosen[confidence.argmax()] = True
    block[chosen] = ids[chosen, 0]


def _ends_decided(block: Ids, eos: tuple[int, ...], mask_token_id: int) -> bool:
    """Whether the block has an end token with no masked slot before it: what follows cannot matter."""
    ends = np.isin(block, eos)
    return bool(ends.any()) and not (block[: ends.argmax()] == mask_token_id).any()


class _Budget:
    """Applies the limits: how many tokens may still come, and where the text ends."""

    def __init__(self, sequence: Sequence, options: DecodeOptions, counters: Counters) -> None:
        self.eos = sequence.model.eos_token_ids if options.eos_token_ids is None else options.eos_token_ids
        self._counters = counters
        self._left = min(options.max_new_tokens, sequence.room)
        self.settle([])

    @property
    def done(self) -> bool:
        return self._counters.finish_reason is not None

    def fit(self, token_ids: list[int]) -> list[int]:
        """The tokens that still fit."""
        return token_ids[: self._left]

    def before_end(self, token_ids: list[int]) -> list[int]:
        """The tokens up to and including the first end token."""
        for i, token in enumerate(token_ids):
            if token in self.eos:
                return token_ids[: i + 1]
        return token_ids

    def settle(self, kept: list[int]) -> list[int]:
        """Count tokens that were appended, and decide whether they are the last ones; returns them."""
        self._left -= len(kept)
        if kept and kept[-1] in self.eos:
            self._counters.finish_reason = "stop"
        elif self._left <= 0:
            self._counters.finish_reason = "length"
        return kept

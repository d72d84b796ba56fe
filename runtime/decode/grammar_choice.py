"""Chooses tokens that follow a grammar, in every mode that can.

The answer of self-speculation is that of AR token for token, or has its distribution: a causal row
gives the same token in both. What a draft forward proposes is only a guess. It is better for
knowing the grammar, and cannot do harm.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sampling import Probabilities, distribution, draw
from trimode.runtime.decode.sequence import Sequence, Verification
from trimode.runtime.decode.token_choice import RuledSelector, TokenLogprob
from trimode.runtime.decode.vocabulary_row import Row, best_token
from trimode.runtime.grammar.compile import CompiledOutputs
from trimode.runtime.grammar.state import GrammarState
from trimode.runtime.sessions.base import Array, Ids


class GrammarSelector(RuledSelector):
    """Chooses tokens under :class:`DecodeOptions` that follow their grammar.

    Args:
        sequence: Sequence that the tokens follow.
        options: Checked options, with a compiled grammar.
        logprobs: List that takes them where they are asked for.
    """

    def __init__(
        self, sequence: Sequence, options: DecodeOptions, logprobs: list[TokenLogprob]
    ) -> None:
        super().__init__(sequence, options, logprobs)
        asked = options.structured_outputs
        assert isinstance(asked, CompiledOutputs), "compiled where streams are opened"
        end_think = options.end_think_token_id if asked.after_thinking else None
        self._state = asked.compiled.start(self._ends, end_think)
        self._forced_at: list[int] = []
        self._num_marked = 0

    @property
    def is_over(self) -> bool:
        # A text that was cut may be behind the state
        return self._state.is_over and self._num_marked == self._index

    def num_forced(self, count: int) -> int:
        return bisect_left(self._forced_at, count)

    def forced(self, least: int, most: int) -> list[int]:
        # Log-probabilities need the forwards
        if self._options.logprobs is not None or self._state.forced() is None:
            return []
        state, run = self._state.copy(), list[int]()
        while len(run) < most and (token := state.forced()) is not None:
            run.append(token)
            state.advance(token)
        if len(run) < least and not state.has_ended and not state.is_over:
            return []
        for token in run:
            self._mark(token)
        return run

    def begin_block(self, block: Ids) -> None:
        super().begin_block(block)
        self.begin_draft(block)

    def begin_draft(self, block: Ids) -> None:
        if self._state.forced() is None:
            return
        state = self._state.copy()
        for slot in range(1, len(block)):
            token = state.forced()
            if token is None:
                return
            block[slot] = token
            state.advance(token)

    def denoised(
        self, block: Ids, masked: NDArray[np.bool_], ids: Array, probabilities: Array
    ) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Choose tokens for a block to denoise.

        A slot may be filled where the grammar has been followed up to it.
        """
        walk = _Walk(self._state.copy(), block, masked, ids, probabilities)
        self._follow(walk, self._index)
        self._slots.keep(masked, ids, probabilities)
        return walk.tokens, walk.confidence, walk.is_reached

    def drafted(
        self, block: Ids, masked: NDArray[np.bool_], ids: Array, probabilities: Array
    ) -> tuple[Array, Array]:
        walk = _Walk(self._state.copy(), block, masked, ids, probabilities)
        self._follow(walk, self._index - 1)
        self._slots.keep(masked, ids, walk.q)
        return walk.tokens, walk.confidence

    def allowed(self, block: Ids) -> Ids:
        state = self._state.copy()
        for slot in range(1, len(block)):
            token, index = int(block[slot]), self._index + slot
            if not state.allows(token, may_end=self._may_end(index)):
                return block[:slot]
            state.advance(token)
        return block

    def _follow(self, walk: _Walk, first: int) -> None:
        """Choose a token for each masked slot, from left to right.

        It goes as far as one is allowed.
        """
        arguments = (walk.block, walk.masked, first, walk.ids, walk.probabilities)
        scores = self._candidate_scores(*arguments)
        walk.q = distribution(scores, self._sampling)
        is_random = self._sampling.is_random
        walk.take(draw(walk.q, self._rng) if is_random else walk.q.argmax(-1))
        for slot in range(1, len(walk.block)):
            may_end = self._may_end(first + slot)
            if walk.masked[slot]:
                is_going_on = self._fill(walk, slot, scores[slot], may_end)
            else:
                walk.tokens[slot] = walk.block[slot]
                is_going_on = walk.state.allows(int(walk.block[slot]), may_end=may_end)
            if not is_going_on:
                return
            walk.state.advance(int(walk.tokens[slot]))

    def _fill(self, walk: _Walk, slot: int, scores: NDArray[np.float64], may_end: bool) -> bool:
        """Choose a slot's token; return whether there is one allowed."""
        if (forced := walk.state.forced()) is not None:
            walk.decide(slot, forced, 1.0)
            return True
        ids = walk.ids[slot].tolist()
        is_allowed = [walk.state.allows(token, may_end=may_end) for token in ids]
        scores = np.where(is_allowed, scores, -np.inf)
        if not np.isfinite(scores).any():
            return False
        best = int(scores.argmax())
        if not self._sampling.is_random:
            walk.decide(slot, ids[best], walk.probabilities[slot, best])
            return True
        if not all(is_allowed):
            walk.q[slot] = distribution(scores, self._sampling)
            walk.tokens[slot] = ids[int(draw(walk.q[slot], self._rng))]
        walk.decide(slot, int(walk.tokens[slot]), walk.probabilities[slot, best])
        return True

    def _may_end(self, index: int) -> bool:
        return index >= self._options.min_new_tokens

    def _pick(self, index: int, greedy: int, logits: Callable[[], NDArray[np.float32]]) -> int:
        if self._is_forced(index):
            return self._end_think
        if (forced := self._state.forced()) is not None:
            return forced
        if self._sampling.is_random:
            return self._distribution(index, logits()).draw(self._rng)
        # The mask and the logits are read only where the model's own choice is not allowed
        is_plain = not self._sampling.changes_logits
        if is_plain and self._state.allows(greedy, may_end=self._may_end(index)):
            return greedy
        return best_token(self._row(index, logits()))

    def _verify_row(
        self, index: int, row: int, draft: int | None, verification: Verification
    ) -> tuple[int, bool]:
        if (forced := self._state.forced()) is not None:
            return forced, forced == draft
        return super()._verify_row(index, row, draft, verification)

    def _row(self, index: int, logits: NDArray[np.float32]) -> Row:
        mask = self._state.mask(may_end=self._may_end(index))
        row = self._penalties.row(logits)
        kept = np.where(mask, row.logits, row.logits.dtype.type(-np.inf))
        return Row(kept, row.ids, np.where(mask[row.ids], row.scores, -np.inf))

    def _mark(self, token: int) -> None:
        if self._state.forced() == token:
            self._forced_at.append(self._num_marked)
        self._num_marked += 1
        super()._mark(token)
        self._state.advance(token)

    def _has_finished(self) -> bool:
        return self._state.is_over


class _Walk:
    """Fills a block from left to right.

    Attributes:
        state: Grammar state before the slot that is looked at.
        block, masked, ids, probabilities: Arguments of :meth:`RuledSelector.denoised`.
        q: Distribution that a slot's token was drawn from, ``(L, 5)``.
        tokens: Tokens to fill each slot with, ``(L,)``.
        confidence: Confidence in the best token that is allowed, ``(L,)``.
        is_reached: Masked slots whose token follows the grammar, ``(L,)``.
    """

    def __init__(
        self,
        state: GrammarState,
        block: Ids,
        masked: NDArray[np.bool_],
        ids: Array,
        probabilities: Array,
    ) -> None:
        self.state, self.block, self.masked = state, block, masked
        self.ids, self.probabilities = ids, probabilities
        self.q: Probabilities = np.empty(0)
        self.tokens: Ids = np.empty(0, np.int64)
        self.confidence: NDArray[Any] = probabilities[:, 0].copy()
        self.is_reached = np.zeros(len(block), bool)

    def take(self, columns: Ids) -> None:
        """Fill each slot with one of its candidates."""
        rows = np.arange(len(self.block))
        self.tokens = self.ids[rows, columns].astype(np.int64)

    def decide(self, slot: int, token: int, confidence: float) -> None:
        """Fill a slot with a token that is allowed."""
        self.tokens[slot], self.confidence[slot] = token, confidence
        self.is_reached[slot] = True

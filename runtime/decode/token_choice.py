"""Chooses which token it is, for the decoding algorithms.

The algorithms (:mod:`trimode.runtime.decode.algorithms`) ask once by forward, and leave it to this
module.

:class:`GreedySelector` hands through what the graphs return. :class:`RuledSelector` draws,
penalises, forbids, forces and reports; it reads logits only where it must. Both take the candidates
of a denoise or draft forward as arrays ``(L, 5)``, best first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.decode.forward import Effect
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.penalties import Penalties
from trimode.runtime.decode.sampling import (
    Probabilities,
    distribution,
    draw,
    generator,
    log_softmax,
)
from trimode.runtime.decode.sequence import Sequence, Verification
from trimode.runtime.decode.token_distribution import TokenDistribution, accept_or_replace
from trimode.runtime.decode.vocabulary_row import Row, best_token, row_distribution
from trimode.runtime.sessions.base import Array, Ids

LEAST_PROBABILITY = 1e-30
"""Stands in for the 0 to which a candidate's probability may have been rounded, so that its
logarithm is finite.
"""


class TokenLogprob(NamedTuple):
    """Holds the log-probability of a token.

    It is the one under the model's own distribution: temperature 1, nothing penalised, forbidden or
    cut off.

    Attributes:
        token_id: Id of the token.
        logprob: Log-probability; None where no forward has told it: in a denoised block, a token
            that a thinking budget wrote, or a slot left masked.
        top: Most probable tokens with theirs, best first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class TokenSelector(Protocol):
    """Chooses tokens for one run of an algorithm over one sequence."""

    @property
    def seed(self) -> int | None:
        """Seed of the draws; None where nothing is drawn."""
        ...

    def next(self) -> Effect[int]:
        """Choose the token after the sequence.

        It is the only question that may take a forward.
        """
        ...

    def begin_block(self, block: Ids) -> None:
        """Write tokens that are decided beforehand into a masked block.

        The block is to be denoised, and comes after the sequence.
        """
        ...

    def denoised(
        self, block: Ids, masked: NDArray[np.bool_], ids: Array, probabilities: Array
    ) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Choose the token for each slot of a block to denoise.

        Returns:
            Token to fill each slot with, the confidence in it, and whether it may be filled:
            ``(L,)`` each.
        """
        ...

    def begin_draft(self, block: Ids) -> None:
        """Write tokens that are decided beforehand into a block to verify.

        Its first slot is the last token of the sequence.
        """
        ...

    def drafted(
        self, block: Ids, masked: NDArray[np.bool_], ids: Array, probabilities: Array
    ) -> tuple[Array, Array]:
        """Choose the token for each slot of a block to verify.

        Also returns the confidence in it.
        """
        ...

    def verified(self, block: Ids, verification: Verification) -> list[int]:
        """Return what follows the first token of a drafted block.

        That is the accepted drafts, and one token more.
        """
        ...

    def allowed(self, block: Ids) -> Ids:
        """Return what may be kept of a denoised block.

        That is all of it, or its beginning.
        """
        ...

    def committed(self, token_ids: list[int]) -> None:
        """Take note of a denoised block, or what is kept of it.

        It is not yet appended to the sequence.
        """
        ...

    def forced(self, least: int, most: int) -> list[int]:
        """Take note of tokens that are decided without a forward.

        They come after the sequence, ``most`` at a time. There are none where fewer than ``least``
        are decided, unless they end the text.
        """
        ...

    def num_forced(self, count: int) -> int | None:
        """Count those of the first ``count`` new tokens that were forced.

        None without a grammar.
        """
        ...

    @property
    def is_over(self) -> bool:
        """Whether no token can follow the sequence, not even an end token."""
        ...


class UnconstrainedSelector:
    """Does what selectors do that know no grammar."""

    @property
    def is_over(self) -> bool:
        return False

    def begin_draft(self, block: Ids) -> None:
        """Decide nothing beforehand."""

    def allowed(self, block: Ids) -> Ids:
        return block

    def forced(self, least: int, most: int) -> list[int]:  # noqa: ARG002
        return []

    def num_forced(self, count: int) -> int | None:  # noqa: ARG002
        return None


class GreedySelector(UnconstrainedSelector):
    """Chooses the most probable token, as the graphs return it."""

    seed = None

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence

    def next(self) -> Effect[int]:
        return self._sequence.predict()

    def begin_block(self, block: Ids) -> None:
        """Decide nothing beforehand."""

    def denoised(
        self,
        block: Ids,  # noqa: ARG002
        masked: NDArray[np.bool_],
        ids: Array,
        probabilities: Array,
    ) -> tuple[Array, Array, NDArray[np.bool_]]:
        return ids[:, 0], probabilities[:, 0], masked

    def drafted(
        self,
        block: Ids,  # noqa: ARG002
        masked: NDArray[np.bool_],  # noqa: ARG002
        ids: Array,
        probabilities: Array,
    ) -> tuple[Array, Array]:
        return ids[:, 0], probabilities[:, 0]

    def verified(self, block: Ids, verification: Verification) -> list[int]:  # noqa: ARG002
        return verification.greedy_ids[: verification.accepted_length + 1].tolist()  # type: ignore[no-any-return]

    def committed(self, token_ids: list[int]) -> None:
        """Note nothing."""


class RuledSelector(UnconstrainedSelector):
    """Chooses tokens under :class:`DecodeOptions`.

    At a temperature they are drawn; else each is the most probable one of what the rules leave.

    A token's *index* is its place among the new tokens of this run. Causal distributions are over
    the whole vocabulary. A denoise or draft forward names five candidates for a slot, so a slot's
    distribution is that of the five, processed and normalised among themselves.
    """

    def __init__(
        self, sequence: Sequence, options: DecodeOptions, logprobs: list[TokenLogprob]
    ) -> None:
        self._sequence, self._options, self._sampling = sequence, options, options.sampling
        self._start = len(sequence.tokens)
        self._ends = frozenset(options.end_tokens(sequence.model))
        self._end_ids = np.array(sorted(self._ends), np.int64)
        self._rng, seed = generator(self._sampling.seed)
        self.seed = seed if self._sampling.is_random else None
        self._penalties = Penalties(self._sampling, sequence.model.vocab_size, sequence.tokens)
        self._end_think = -1 if options.end_think_token_id is None else options.end_think_token_id
        self._is_thinking = options.max_thinking_tokens is not None
        self._logprobs = logprobs
        self._slots = _Slots()

    def next(self) -> Effect[int]:
        greedy = yield from self._sequence.predict()
        token = self._pick(self._index, greedy, self._sequence.predicted_logits)
        self._note(token, self._sequence.predicted_logits)
        return token

    def begin_block(self, block: Ids) -> None:
        """Write the end of thinking where the budget asks it.

        The first slot has been chosen by :meth:`next`, which knows the budget.
        """
        self._slots = _Slots()
        for slot in range(1, len(block)):
            if self._is_forced(self._index + slot):
                block[slot] = self._end_think

    def denoised(
        self, block: Ids, masked: NDArray[np.bool_], ids: Array, probabilities: Array
    ) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Choose a candidate for each slot.

        The confidence is the probability that the model gives the token, as in the reference.
        """
        drawn, _ = self._draw_candidates(block, masked, self._index, ids, probabilities)
        self._slots.keep(masked, ids, probabilities)
        return _column(ids, drawn), _column(probabilities, drawn), masked

    def drafted(
        self, block: Ids, masked: NDArray[np.bool_], ids: Array, probabilities: Array
    ) -> tuple[Array, Array]:
        """Choose a candidate for each slot.

        The confidence is that of the slot's best candidate, whichever is drawn: see
        :func:`decode_linear_spec`.
        """
        drawn, q = self._draw_candidates(block, masked, self._index - 1, ids, probabilities)
        self._slots.keep(masked, ids, q)
        return _column(ids, drawn), probabilities[:, 0]

    def verified(self, block: Ids, verification: Verification) -> list[int]:
        out: list[int] = []
        for row in range(len(block)):
            draft = int(block[row + 1]) if row + 1 < len(block) else None
            token, is_accepted = self._verify_row(self._index + row, row, draft, verification)
            self._note(token, partial(verification.row, row))
            out.append(token)
            if not is_accepted or token in self._ends or self._has_finished():
                break
        return out

    def committed(self, token_ids: list[int]) -> None:
        """Take note of what is kept of a denoised block.

        The first token came from :meth:`next`, which noted it, unless that chose the mask token.
        """
        for slot, token in enumerate(token_ids):
            if slot == 0:
                if not self._slots.knows(0):
                    continue
                self._penalties.take_back(self._sequence.model.mask_token_id)
            self._mark(token)
            if self._options.logprobs is not None:
                del self._logprobs[self._index + slot :]
                self._logprobs.append(self._slots.logprob(slot, token, self._options.logprobs))

    @property
    def _index(self) -> int:
        return len(self._sequence.tokens) - self._start

    def _is_forced(self, index: int) -> bool:
        return self._is_thinking and index == self._options.max_thinking_tokens

    def _pick(self, index: int, greedy: int, logits: Callable[[], NDArray[np.float32]]) -> int:
        """Choose a token from a causal row.

        ``greedy`` is its best, which mostly is all there is to know at temperature 0.
        """
        if self._is_forced(index):
            return self._end_think
        if self._sampling.is_random:
            return self._distribution(index, logits()).draw(self._rng)
        is_forbidden = index < self._options.min_new_tokens and greedy in self._ends
        if self._sampling.changes_logits or is_forbidden:
            return best_token(self._row(index, logits()))
        return greedy

    def _verify_row(
        self, index: int, row: int, draft: int | None, verification: Verification
    ) -> tuple[int, bool]:
        """Choose the token at ``index``; tell whether it is the draft."""
        if draft is None or not self._sampling.is_random or self._is_forced(index):
            token = self._pick(
                index, int(verification.greedy_ids[row]), partial(verification.row, row)
            )
            return token, token == draft
        q_ids, q = self._slots.of(row + 1)
        return accept_or_replace(
            draft, self._distribution(index, verification.row(row)), q_ids, q, self._rng
        )

    def _distribution(self, index: int, logits: NDArray[np.float32]) -> TokenDistribution:
        """Return the distribution of a causal row ``(V,)``."""
        return row_distribution(self._row(index, logits), self._sampling)

    def _row(self, index: int, logits: NDArray[np.float32]) -> Row:
        is_too_early = index < self._options.min_new_tokens
        return self._penalties.row(logits, self._end_ids[: None if is_too_early else 0])

    def _draw_candidates(
        self, block: Ids, masked: NDArray[np.bool_], first: int, ids: Array, probabilities: Array
    ) -> tuple[Ids, Probabilities]:
        """Draw a candidate for each slot, ``(L,)``.

        Also returns what it was drawn from, ``(L, 5)``. ``first`` is the index of the first slot.
        """
        scores = self._candidate_scores(block, masked, first, ids, probabilities)
        q = distribution(scores, self._sampling)
        return (draw(q, self._rng) if self._sampling.is_random else q.argmax(-1)), q

    def _candidate_scores(
        self, block: Ids, masked: NDArray[np.bool_], first: int, ids: Array, probabilities: Array
    ) -> NDArray[np.float64]:
        """Return log-probabilities ``(L, 5)`` as penalties leave them.

        They are -inf for what must not come.
        """
        scores = np.log(np.maximum(probabilities.astype(np.float64), LEAST_PROBABILITY))
        # A slot that draws the mask token would stay undecided and be drawn again; what fills it in
        # the end would have another distribution.
        never = (ids == self._sequence.model.mask_token_id) & self._sampling.is_random
        ends = (
            np.isin(ids, self._end_ids)
            & (first + np.arange(len(block)) < self._options.min_new_tokens)[:, None]
        )
        # something must be left; a draft that is forbidden will not be accepted
        ends &= ~(ends | never).all(-1, keepdims=True)
        # The first slot's token is the text's last, which is known, unless it is decided here.
        first_new = 0 if self._slots.knows(0) else 1
        filled = block[first_new:][~masked[first_new:]]
        scores = self._penalties.changed(ids, scores, filled)
        return np.where(never | ends, -np.inf, scores)

    def _note(self, token: int, logits: Callable[[], NDArray[np.float32]]) -> None:
        self._mark(token)
        if self._options.logprobs is not None:
            self._logprobs.append(logprob_of(token, logits(), self._options.logprobs))

    def _has_finished(self) -> bool:
        """Tell whether no token can follow those that were noted."""
        return False

    def _mark(self, token: int) -> None:
        self._penalties.add(token)
        if token == self._end_think:
            self._is_thinking = False


class _Slots:
    """Keeps candidates of each slot of a block with their values.

    They are of the last forward in which the slot was masked: the one that filled it.
    """

    def __init__(self) -> None:
        self._known: NDArray[np.bool_] | None = None
        self._ids: Ids
        self._values: NDArray[Any]

    def keep(self, masked: NDArray[np.bool_], ids: Array, values: NDArray[Any]) -> None:
        """Remember the masked slots' ``ids`` and ``values``, both ``(L, 5)``."""
        # a block of another length is another block
        if self._known is None or len(self._known) != len(masked):
            self._known, self._ids, self._values = (
                np.zeros(len(masked), bool),
                np.empty(ids.shape, np.int64),
                np.empty_like(values),
            )
        self._known |= masked
        self._ids[masked], self._values[masked] = ids[masked], values[masked]

    def knows(self, slot: int) -> bool:
        """Tell whether the slot has been masked."""
        return self._known is not None and bool(self._known[slot])

    def of(self, slot: int) -> tuple[Ids, NDArray[Any]]:
        """Return candidates of a slot and their values, ``(5,)`` each."""
        return self._ids[slot], self._values[slot]

    def logprob(self, slot: int, token: int, count: int) -> TokenLogprob:
        """Return the log-probability of a slot's token from probabilities."""
        if not self.knows(slot):
            return TokenLogprob(token, None, ())
        ids, values = self.of(slot)
        logs = np.log(np.maximum(values.astype(np.float64), LEAST_PROBABILITY)).tolist()
        named = dict(zip(ids.tolist(), logs, strict=True))
        return TokenLogprob(token, named.get(token), tuple(named.items())[:count])


def logprob_of(token: int, logits: NDArray[np.float32], count: int) -> TokenLogprob:
    """Return a token's log-probability from a causal row's logits ``(V,)``."""
    values = log_softmax(logits)
    best = (
        np.argpartition(logits, values.size - count)[values.size - count :]
        if 0 < count < values.size
        else np.arange(values.size)[: count or 0]
    )
    best = best[np.lexsort((best, -values[best]))]
    return TokenLogprob(
        token, float(values[token]), tuple((int(i), float(values[i])) for i in best)
    )


def _column(table: Array, columns: Ids) -> Array:
    """Take one column a row, ``table (L, n)`` -> ``(L,)``."""
    return np.take_along_axis(table, columns[:, None], -1)[:, 0]

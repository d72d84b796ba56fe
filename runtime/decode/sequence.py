"""Holds one text in the making: its tokens and the cache.

It knows how far the cache agrees with the tokens.

What needs a forward is a generator that asks for it (:mod:`trimode.runtime.decode.forward`):
``yield from`` it in an algorithm, and hand it to :meth:`Sequence.run` elsewhere.

The cache holds causal K/V of the first ``cached_length`` tokens, never of more than there are.
Denoise and draft forwards write into the slots after that and leave the length alone, so the next
causal forward overwrites what they wrote. Rolling back is setting the length.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.formats.contract import ModelInfo
from trimode.runtime.auto.policy import Policy
from trimode.runtime.decode.forward import Effect, Forward, Outputs, T, ask, perform, read_logits
from trimode.runtime.sessions.base import (
    Array,
    DeviceArray,
    Ids,
    Session,
    check_open,
    expect_length,
    of_row,
)

PREFILL_CHUNK = 512
"""Most prompt rows in one forward: bounds the score matrix, which grows with rows times
capacity.
"""


@dataclass
class Forwards:
    """Counts forward passes by phase, as executed."""

    prefill: int = 0
    decode: int = 0
    denoise: int = 0
    draft: int = 0
    verify: int = 0
    commit: int = 0
    quadratic: int = 0


@dataclass
class Verification:
    """Holds what a verify forward says of a block of L tokens.

    It is valid until the next one.

    Attributes:
        greedy_ids: Most probable token after each, ``(L,)``.
        accepted_length: Number of the block's drafts, from its second token on, that are these.
        forward: Forward that says so.
        logits: Logits of the token after each, ``(L, V)``, perhaps on a GPU.
    """

    greedy_ids: Ids
    accepted_length: int
    forward: Forward
    logits: Any
    _rows: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    def row(self, index: int) -> NDArray[np.float32]:
        """Return one row of the logits, ``(V,)``.

        It is copied from a GPU when first asked for, without the others where that is possible.
        """
        if not (isinstance(self.logits, DeviceArray) and self.logits.reads_parts):
            return self._all_rows[index]  # type: ignore[no-any-return]
        if index not in self._rows:
            self._rows[index] = read_logits(self.forward, self.logits.of_row(index), index)
        return self._rows[index]

    @cached_property
    def _all_rows(self) -> NDArray[np.float32]:
        return read_logits(self.forward, self.logits)


@dataclass(kw_only=True)
class Speculation(Verification):
    """Holds what a forward of quadratic self-speculation says of L drafts.

    It also holds what the forward drafts behind the right ones.

    Attributes:
        accepted: Right drafts, at least one: the first was known to be, ``accepted_length`` more
            proved so.
        next_drafts: Drafts ``(L,)`` of what follows these, of which again the first is right.
    """

    accepted: list[int]
    next_drafts: Ids


class Sequence:
    """Grows a text over a session.

    Modes may alternate; none re-reads what is cached.

    Args:
        session: Session with loaded graphs.
        model: Facts of the contract.
        token_ids: Tokens of the prompt, at least one.

    Attributes:
        reader: Ticket of the stream that continues it, and alone may.
        policy: Policy that mode ``auto`` follows in place of its own; None = none.
    """

    def __init__(self, session: Session, model: ModelInfo, token_ids: Seq[int]) -> None:
        self.model = model
        self.tokens = list(token_ids)
        self.cached_length = 0
        self.forwards = Forwards()
        self.reader: object = None
        self.policy: Policy | None = None
        self._session = session
        self._cache = session.new_cache()
        # greedy token after self.tokens, where a forward has already told it
        self._next: int | None = None
        self._next_logits: Callable[[], NDArray[np.float32]] | None = None  # of that forward

    @property
    def room(self) -> int:
        """Number of tokens that may still be added before ``max_length``."""
        return self.model.max_length - len(self.tokens)

    def check_open(self) -> None:
        """Raise :class:`UsageError` where the model has been closed."""
        check_open(self._session)

    def run(self, effect: Effect[T]) -> T:
        """Do at once what needs forwards: ``sequence.run(sequence.predict())``."""
        return perform(effect, self.answer)

    def answer(self, forward: Forward) -> Outputs:
        """Run a forward that this sequence asked for, over its own cache."""
        ids = forward.token_ids[None]
        outputs = self._session.run(
            forward.graph_name, self._cache, ids, forward.past_length, forward.drafter_scale
        )
        return tuple(of_row(output, 0) for output in outputs)

    def predict(self) -> Effect[int]:
        """Return the greedy next token.

        It runs the tokens that are not cached yet: a prompt in chunks (prefill), or the last token
        (decode).
        """
        if self._next is not None:
            return self._next
        self.cached_length = min(self.cached_length, len(self.tokens) - 1)
        pending = self.tokens[self.cached_length :]
        phase = "decode" if len(pending) == 1 and self.cached_length else "prefill"
        if phase == "prefill":
            expect_length(self._cache, len(self.tokens))
        chunk = min(PREFILL_CHUNK, self._session.max_prefill_rows or PREFILL_CHUNK)
        predicted = -1
        for start in range(0, len(pending), chunk):
            predicted = yield from self._causal(pending[start : start + chunk])
            setattr(self.forwards, phase, getattr(self.forwards, phase) + 1)
        self._next = predicted  # not before: a sequence may be left between two chunks
        return predicted

    def predicted_logits(self) -> NDArray[np.float32]:
        """Return logits ``(V,)`` of the token that :meth:`predict` has told.

        They are valid until the next causal forward.
        """
        assert self._next is not None
        assert self._next_logits is not None
        return self._next_logits()

    def append(self, token_ids: Seq[int]) -> None:
        """Add tokens that were decided on, or given.

        The next turn of a conversation is given.
        """
        self.tokens += token_ids
        self._next = None

    def truncate(self, length: int) -> None:
        """Forget every token after the first ``length``."""
        if length < len(self.tokens):
            del self.tokens[length:]
            self.cached_length = min(self.cached_length, length)
            self._next = None

    def denoise(self, block: Ids) -> Effect[tuple[Array, Array]]:
        """Run a bidirectional forward over ``block (L,)``, placed after the tokens.

        Returns ids and probabilities ``(L, 5)``, best first.
        """
        self.forwards.denoise += 1
        return (yield from self._bidirectional(block, 0.0))

    def draft(self, block: Ids, *, use_drafter: bool) -> Effect[tuple[Array, Array]]:
        """Do as :meth:`denoise`, with the drafter's adapter.

        ``block[0]`` is the last token, which is not cached yet.
        """
        self.forwards.draft += 1
        return (yield from self._bidirectional(block, 1.0 if use_drafter else 0.0))

    def verify(self, block: Ids) -> Effect[Verification]:
        """Run a causal forward over a drafted block.

        The block's first token is the last of the sequence. The caller decides what to
        :meth:`accept`.
        """
        self.forwards.verify += 1
        forward = Forward("verify", block, self.cached_length)
        greedy, accepted, logits = yield from ask(forward)
        return Verification(greedy, int(accepted), forward, logits)

    def first_drafts(self, block_length: int) -> Effect[Ids]:
        """Make drafts ``(L,)`` of what follows the tokens.

        The first is the causal prediction. The others come from a forward over masked slots behind
        all tokens.
        """
        first = yield from self.predict()
        ids, _ = yield from self.draft(
            np.full(block_length, self.model.mask_token_id, np.int64), use_drafter=False
        )
        return _drafts(ids, first)

    def speculate(self, drafts: Ids) -> Effect[Speculation]:
        """Verify ``drafts (L,)``, and draft anew, in one forward.

        The first draft is known to be right. The new ones are behind those that are right.

        All tokens must be cached. The caller decides how many of the right drafts to
        :meth:`accept_drafts`.
        """
        assert self.cached_length == len(self.tokens)
        self.forwards.quadratic += 1
        forward = Forward("quadratic", drafts, self.cached_length)
        greedy, accepted, logits, ids, _ = yield from ask(forward)
        last = int(accepted)
        return Speculation(
            greedy,
            last,
            forward,
            logits,
            accepted=drafts[: last + 1].tolist(),
            next_drafts=_drafts(ids, int(greedy[last])),
        )

    def accept_drafts(self, count: int, speculation: Speculation) -> None:
        """Append the first ``count`` of the right drafts, which :meth:`speculate` cached.

        With all of them the token after them is known, too.
        """
        self.cached_length += count
        self.append(speculation.accepted[:count])
        if count == len(speculation.accepted):
            last = speculation.accepted_length
            self._next, self._next_logits = (
                int(speculation.greedy_ids[last]),
                partial(speculation.row, last),
            )

    def accept(self, token_ids: Seq[int]) -> None:
        """Append what follows the first token of the verified block.

        That is its drafts, as it has them, and any one token after these. :meth:`verify` cached the
        block's first token and all of these but the last.
        """
        self.cached_length += len(token_ids)
        self.append(token_ids)

    def commit(self, block: Ids) -> Effect[None]:
        """Append a finished block and cache it with a causal forward.

        The forward also predicts the token after it.
        """
        self.forwards.commit += 1
        self._next = yield from self._causal(block.tolist())
        self.tokens += block.tolist()

    def _causal(self, token_ids: list[int]) -> Effect[int]:
        forward = Forward("ar", np.array(token_ids, np.int64), self.cached_length)
        greedy, logits = yield from ask(forward)
        self._next_logits = partial(read_logits, forward, logits)
        self.cached_length += len(token_ids)
        return int(greedy)

    def _bidirectional(self, block: Ids, drafter_scale: float) -> Effect[tuple[Array, Array]]:
        ids, probabilities = yield from ask(
            Forward("draft", block, self.cached_length, drafter_scale)
        )
        return ids, probabilities


def _drafts(candidates: Array, first: int) -> Ids:
    """Take the best candidate of each slot, ``(L, 5)`` -> ``(L,)``.

    The first is replaced by a token that is certain.
    """
    drafts: Ids = candidates[:, 0].astype(np.int64)
    drafts[0] = first
    return drafts

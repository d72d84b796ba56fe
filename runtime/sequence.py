"""One text in the making: its tokens, the cache, and how far the cache agrees with the tokens.

The cache holds causal K/V of the first ``cached_length`` tokens, never of more than there are. Denoise and draft forwards write into the
slots after that and leave the length alone, so the next causal forward overwrites what they wrote. Rolling back is setting the length.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trimode.graphs.contract import ModelInfo
from trimode.runtime.session import Array, Ids, Session

PREFILL_CHUNK = 512
"""Most prompt rows in one forward: bounds the score matrix, which grows with rows times capacity."""


@dataclass
class Forwards:
    """Forward passes by phase, as executed."""

    prefill: int = 0
    decode: int = 0
    denoise: int = 0
    draft: int = 0
    verify: int = 0
    commit: int = 0


@dataclass
class Verification:
    """What a verify forward says of a block of L tokens; valid until the next one.

    Attributes:
        greedy_ids: ``(L,)``, the most probable token after each.
        accepted_length: how many of the block's drafts, from its second token on, are these.
    """

    greedy_ids: Ids
    accepted_length: int
    raw_logits: Array

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """``(L, V)``, of the token after each; copied from a GPU when first asked for."""
        return np.asarray(self.raw_logits)[0]  # type: ignore[no-any-return]

    def row(self, index: int) -> NDArray[np.float32]:
        """One row of :attr:`logits`."""
        return self.logits[index]  # type: ignore[no-any-return]


class Sequence:
    """A sequence over a session. Modes may alternate; none re-reads what is cached.

    Args:
        session: loaded graphs.
        model: the contract's facts.
        token_ids: the prompt, at least one token.
    """

    def __init__(self, session: Session, model: ModelInfo, token_ids: Seq[int]) -> None:
        self.model = model
        self.tokens = list(token_ids)
        self.cached_length = 0
        self.forwards = Forwards()
        self._session = session
        self._cache = session.new_cache()
        self._next: int | None = None  # greedy token after self.tokens, where a forward has already told it
        self._next_logits: Array | None = None  # of that forward

    @property
    def room(self) -> int:
        """Tokens that may still be added before ``max_length``."""
        return self.model.max_length - len(self.tokens)

    def predict(self) -> int:
        """Greedy next token. Runs the tokens that are not cached yet: a prompt in chunks (prefill), or the last token (decode)."""
        if self._next is not None:
            return self._next
        self.cached_length = min(self.cached_length, len(self.tokens) - 1)
        pending = self.tokens[self.cached_length :]
        phase = "decode" if len(pending) == 1 and self.cached_length else "prefill"
        chunk = min(PREFILL_CHUNK, self._session.max_prefill_rows or PREFILL_CHUNK)
        for start in range(0, len(pending), chunk):
            self._next = self._causal(pending[start : start + chunk])
            setattr(self.forwards, phase, getattr(self.forwards, phase) + 1)
        assert self._next is not None
        return self._next

    def predict_logits(self) -> NDArray[np.float32]:
        """Logits ``(V,)`` of the token that :meth:`predict` tells; runs the same forwards. Valid until the next causal one."""
        self.predict()
        return np.asarray(self._next_logits)[0]  # type: ignore[no-any-return]

    def append(self, token_ids: Seq[int]) -> None:
        """Add tokens that were decided on, or given (the next turn of a conversation)."""
        self.tokens += token_ids
        self._next = None

    def truncate(self, length: int) -> None:
        """Forget every token after the first ``length``."""
        if length < len(self.tokens):
            del self.tokens[length:]
            self.cached_length = min(self.cached_length, length)
            self._next = None

    def denoise(self, block: Ids) -> tuple[Array, Array]:
        """Bidirectional forward over ``block (L,)`` placed after the tokens; ids and probabilities ``(L, 5)``, best first."""
        self.forwards.denoise += 1
        return self._bidirectional(block, 0.0)

    def draft(self, block: Ids, *, use_drafter: bool) -> tuple[Array, Array]:
        """Like :meth:`denoise`, with the drafter's adapter; ``block[0]`` is the last token, which is not cached yet."""
        self.forwards.draft += 1
        return self._bidirectional(block, 1.0 if use_drafter else 0.0)

    def verify(self, block: Ids) -> Verification:
        """Causal forward over a drafted block whose first token is the last of the sequence. The caller decides what to :meth:`accept`."""
        self.forwards.verify += 1
        greedy, accepted, logits = self._session.run("verify", self._cache, block[None], self.cached_length)
        return Verification(greedy[0], int(accepted[0]), logits)

    def accept(self, token_ids: Seq[int]) -> None:
        """Append what follows the first token of the verified block: its drafts, as it has them, and any one token after these.

        :meth:`verify` cached the block's first token and all of these but the last.
        """
        self.cached_length += len(token_ids)
        self.append(token_ids)

    def commit(self, block: Ids) -> None:
        """Append a finished block and cache it with a causal forward, which also predicts the token after it."""
        self.forwards.commit += 1
        self._next = self._causal(block.tolist())
        self.tokens += block.tolist()

    def _causal(self, token_ids: list[int]) -> int:
        ids = np.array([token_ids], np.int64)
        greedy, self._next_logits = self._session.run("ar", self._cache, ids, self.cached_length)
        self.cached_length += len(token_ids)
        return int(greedy[0])

    def _bidirectional(self, block: Ids, drafter_scale: float) -> tuple[Array, Array]:
        ids, probabilities = self._session.run("draft", self._cache, block[None], self.cached_length, drafter_scale)
        return ids[0], probabilities[0]

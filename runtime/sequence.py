"""One text in the making: its tokens, the cache, and how far the cache agrees with the tokens.

The cache holds causal K/V of the first ``cached_length`` tokens, never of more than there are. Denoise and draft forwards write into the
slots after that and leave the length alone, so the next causal forward overwrites what they wrote. Rolling back is setting the length.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

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
    quadratic: int = 0


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

    def verify(self, block: Ids) -> list[int]:
        """Causal forward over a drafted block whose first token is the last of the sequence.

        Returns what follows that first token: the accepted drafts and one token more. The caller decides how many of them to
        :meth:`accept`.
        """
        self.forwards.verify += 1
        greedy, accepted, _ = self._session.run("verify", self._cache, block[None], self.cached_length)
        return greedy[0, : int(accepted[0]) + 1].tolist()  # type: ignore[no-any-return]

    def first_drafts(self, block_length: int) -> Ids:
        """Drafts ``(L,)`` of what follows: the causal prediction, then what a forward over masked slots behind all tokens gives."""
        first = self.predict()
        ids, _ = self.draft(np.full(block_length, self.model.mask_token_id, np.int64), use_drafter=False)
        return _drafts(ids, first)

    def speculate(self, drafts: Ids) -> tuple[list[int], Ids]:
        """One forward that verifies ``drafts (L,)``, of which the first is known to be right, and drafts anew behind those that are.

        All tokens must be cached. Returns the right drafts, at least one, which the caller hands to :meth:`accept`, and ``(L,)`` drafts of what
        follows them, of which again the first is right.
        """
        assert self.cached_length == len(self.tokens)
        self.forwards.quadratic += 1
        greedy, accepted, _, ids, _ = self._session.run("quadratic", self._cache, drafts[None], self.cached_length)
        last = int(accepted[0])
        return drafts[: last + 1].tolist(), _drafts(ids[0], int(greedy[0, last]))

    def accept(self, token_ids: Seq[int], following: int | None = None) -> None:
        """Append the first tokens of what :meth:`verify` or :meth:`speculate` returned.

        The former cached the block's first token and all of these but the last, the latter all of these. ``following`` is the greedy token
        behind them, where it is known.
        """
        self.cached_length += len(token_ids)
        self.append(token_ids)
        self._next = following

    def commit(self, block: Ids) -> None:
        """Append a finished block and cache it with a causal forward, which also predicts the token after it."""
        self.forwards.commit += 1
        self._next = self._causal(block.tolist())
        self.tokens += block.tolist()

    def _causal(self, token_ids: list[int]) -> int:
        ids = np.array([token_ids], np.int64)
        greedy, _ = self._session.run("ar", self._cache, ids, self.cached_length)
        self.cached_length += len(token_ids)
        return int(greedy[0])

    def _bidirectional(self, block: Ids, drafter_scale: float) -> tuple[Array, Array]:
        ids, probabilities = self._session.run("draft", self._cache, block[None], self.cached_length, drafter_scale)
        return ids[0], probabilities[0]


def _drafts(candidates: Array, first: int) -> Ids:
    """The best candidate of each slot, ``(L, 5)`` -> ``(L,)``, the first replaced by a token that is certain."""
    drafts: Ids = candidates[:, 0].astype(np.int64)
    drafts[0] = first
    return drafts

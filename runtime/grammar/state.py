"""Follows a text through its grammar, and says what may come.

Two rules make the answers of all modes equal:

- An end token may come where the grammar accepts the text, and nowhere else.
- Where the grammar leaves one text only, its tokens are those that the tokenizer writes it with:
  they are *forced*, and no forward is asked. Elsewhere every token may come that some answer goes
  on with.

Both depend on the tokens so far alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.errors import UsageError
from trimode.runtime.grammar.vocabulary import Vocabulary

_LONGEST_RUN = 64
"""Bytes that are looked ahead for forced tokens."""


class GrammarState:
    """Follows one text.

    Args:
        matcher: Matcher of the library, at the beginning, not shared.
        vocabulary: Tokens of the model.
        ends: Tokens that end a text.
        end_think: Token after which the grammar begins; None = at once.

    Attributes:
        is_thinking: Whether the grammar has not begun.
        has_ended: Whether an end token has come.
    """

    def __init__(
        self, matcher: Any, vocabulary: Vocabulary, ends: frozenset[int], end_think: int | None
    ) -> None:
        self._matcher, self._vocabulary, self._ends = matcher, vocabulary, ends
        # The library's own end token stands for "accepts"; texts never have it
        self._never = ends | {vocabulary.table.eos_token_id}
        self._end_think, self.is_thinking = end_think, end_think is not None
        self._forced: list[int] | None = None  # None = not looked for
        self._known: NDArray[np.bool_] | None = None  # what the library takes
        self.has_ended = False

    def copy(self) -> GrammarState:
        """Return a state that goes its own way."""
        other = object.__new__(GrammarState)
        other.__dict__.update(self.__dict__)
        other._matcher = self._matcher.deep_copy()
        return other

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow, not even an end token."""
        return self.has_ended or (not self._ends and self._is_complete)

    def forced(self) -> int | None:
        """Return the only token that may come; None where several may.

        Raises:
            UsageError: the grammar is too complex to follow.
        """
        if self.is_thinking or self.has_ended:
            return None
        if self._forced is None:
            self._forced = self._find_forced()
        return self._forced[0] if self._forced else None

    def allows(self, token: int, *, may_end: bool = True) -> bool:
        """Whether a token may come.

        Args:
            token: Token to ask about.
            may_end: Whether the text has the tokens that it must have. Where the grammar leaves
                nothing else, it may end all the same.
        """
        if self.has_ended or token == self._vocabulary.mask_token_id:
            return False
        if token in self._ends:
            return self._may_end(may_end)
        if self.is_thinking:
            return True
        if (forced := self.forced()) is not None:
            return token == forced
        return bool(self._matcher.validate_tokens([token]) == 1)

    def mask(self, *, may_end: bool = True) -> NDArray[np.bool_]:
        """Return which tokens may come, ``(V,)``.

        Raises:
            UsageError: no token may come, or the grammar is too complex to follow.
        """
        forced = self.forced()
        if self.is_thinking or forced is not None:
            mask = np.full(self._vocabulary.size, self.is_thinking)
        else:
            mask = self._taken().copy()
        if forced is not None:
            mask[forced] = True
        mask[[self._vocabulary.mask_token_id, *self._ends]] = False
        mask[list(self._ends)] = self._may_end(may_end)
        if not mask.any():
            raise _dead_end()
        return mask

    def advance(self, token: int) -> None:
        """Take a token that is allowed.

        Raises:
            UsageError: the grammar is too complex to follow.
        """
        rest = self._forced
        self._forced, self._known = None, None
        if token in self._ends:
            self.has_ended = True
        elif self.is_thinking:
            self.is_thinking = token != self._end_think
        else:
            if rest and rest[0] == token and len(rest) > 1:
                self._forced = rest[1:]
            self._matcher.consume_token(token)
            self._check()

    def _may_end(self, may_end: bool) -> bool:
        if self.is_thinking or not self._ends:
            return False
        return self._is_complete if not may_end else bool(self._matcher.is_accepting())

    @property
    def _is_complete(self) -> bool:
        """Whether the grammar accepts the text, and takes no more of it."""
        if self.is_thinking or not self._matcher.is_accepting():
            return False
        return bool(self._matcher.is_stopped()) or not self._taken().any()

    def _taken(self) -> NDArray[np.bool_]:
        """Return which tokens the library takes, ``(V,)``, without end tokens."""
        if self._known is None:
            self._known = self._taken_by(self._matcher)
            self._check()
        return self._known

    def _taken_by(self, matcher: Any) -> NDArray[np.bool_]:
        if matcher.is_stopped():
            return np.zeros(self._vocabulary.size, bool)
        mask = self._vocabulary.read_mask(matcher.compute_bitmask())
        mask[list(self._never)] = False
        return mask

    def _find_forced(self) -> list[int]:
        if self._is_free():
            return []
        if self._is_complete:
            return list(self._ends) if len(self._ends) == 1 else []
        text, is_whole = self._forced_text()
        tokens = self._vocabulary.tokenize(text, is_whole=is_whole) if text else []
        # Bytes that no token writes are missing among them
        return tokens[: self._matcher.validate_tokens(tokens)] if tokens else []

    def _is_free(self) -> bool:
        """Whether two texts are seen to be possible, without a mask."""
        found = 0
        for token in self._vocabulary.probes:
            found += self._matcher.validate_tokens([token])
            if found > 1:
                return True
        return False

    def _forced_text(self) -> tuple[bytes, bool]:
        """Find the bytes that must follow, up to a limit.

        The second value says whether nothing can come after them.
        """
        walk, text, vocabulary = self._matcher.deep_copy(), b"", self._vocabulary
        while len(text) < _LONGEST_RUN:
            if walk.is_accepting():
                return text, not self._taken_by(walk).any()
            if walk.is_stopped():
                return text, False
            token = vocabulary.common_beginning(walk.compute_bitmask(), self._never)
            if token is None:
                return text, False
            text += vocabulary.table.tokens[token]
            walk.consume_token(token)
        return text, False

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        reason = " ".join(self._matcher.get_error().split("\n")[0].split())[:120]
        if reason.startswith("NoExtension"):
            raise _dead_end()
        raise UsageError(
            f"structured_outputs: expected a grammar that can be followed, found: {reason}",
            "simplify the grammar: fewer alternatives and repetitions",
        )


def _dead_end() -> UsageError:
    return UsageError(
        "structured_outputs: expected text that the model's tokens can write, "
        "found none that goes on",
        "use characters that the tokenizer knows, and a grammar that some text follows",
    )

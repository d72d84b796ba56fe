"""Decodes tokens one by one into text that stays as it is.

Only a few tokens are decoded at each step: the last ones, whose text is out (for what a decoder
does at a seam), and the new ones. So the work for a token is bounded, however long the answer is.
What can still change is held back:

- An incomplete character at the end. It has three bytes at most, and is one U+FFFD of the decoded
  text.
- A run of byte tokens (``<0xE6>``), which decoders with byte fallback show as U+FFFD one and all
  if the whole run is not UTF-8. It is held until it ends, or until a byte shows that it is not.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

REPLACEMENT = "\ufffd"
_LIMIT = 8  # tokens of a window, before it is cut
_CONTEXT = 4  # tokens it is cut to: the longest character


@dataclass(frozen=True)
class Decoding:
    """Describes how a tokenizer decodes.

    Attributes:
        decode: Returns the text of tokens.
        is_silent: Tells whether a token is left out of the text, wherever it stands.
        byte_values: Byte tokens; empty if the decoder knows none.
    """

    decode: Callable[[Seq[int]], str]
    is_silent: Callable[[int], bool]
    byte_values: Mapping[int, int]


class TokenWindow:
    """Holds the last tokens of a text that is decoded stepwise."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._tokens: list[int] = []
        self._num_out = 0  # characters of these tokens' text that are out
        self._run = _ByteRun()
        self._broken: list[int] = []  # where the window ends in a run that is not: what broke it

    def push(self, token_ids: Seq[int]) -> str:
        """Return the text that became certain with these tokens."""
        before = len(self._tokens)
        for token in token_ids:
            self._append(token)
        return self._take() if len(self._tokens) > before else ""

    @property
    def num_pending(self) -> int:
        """Number of whole characters in a run that may still change."""
        return len(self._run.characters)

    def last_pending(self, count: int) -> str:
        """Return the last of those characters."""
        return "".join(self._run.characters[-count:])

    def rest(self) -> str:
        """Return all text that is not out."""
        return self._decoding.decode([*self._tokens, *self._run.tokens])[self._num_out :]

    def _append(self, token: int) -> None:
        if self._decoding.is_silent(token):
            return
        value = self._decoding.byte_values.get(token)
        if value is None:
            self._tokens += [*self._run.tokens, token]
            self._run, self._broken = _ByteRun(), []
        elif self._broken:
            self._tokens.append(token)
        elif not self._run.add(token, value):
            self._tokens += self._run.tokens
            self._run, self._broken = _ByteRun(), self._tokens[-_CONTEXT:]

    def _take(self) -> str:
        text = self._decoding.decode(self._tokens)
        is_open = text.endswith(REPLACEMENT) and not self._decoding.byte_values
        end = max(self._num_out, len(text) - is_open)
        new, self._num_out = text[self._num_out : end], end
        if len(self._tokens) > _LIMIT:
            self._cut(len(text) - end)
        return new

    def _cut(self, num_held: int) -> None:
        # What ends a broken run is not UTF-8 by itself, so that the bytes that follow stay U+FFFD.
        self._tokens = list(self._broken) or self._tokens[-_CONTEXT:]
        self._num_out = len(self._decoding.decode(self._tokens)) - num_held


class _ByteRun:
    """Byte tokens in a row that are UTF-8 so far."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.characters: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def add(self, token: int, value: int) -> bool:
        """Add a byte; whether the run can still be UTF-8."""
        self.tokens.append(token)
        try:
            character = self._utf8.decode(bytes([value]))
        except UnicodeDecodeError:
            return False
        if character:
            self.characters.append(character)
        return True

"""Turns pieces of tokens into pieces of text, up to a stop."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from trimode.runtime.text.cleanup import CleanUp
from trimode.runtime.text.token_window import Decoding, TokenWindow


class Codec(Protocol):
    """Declares what a stream needs of a tokenizer."""

    @property
    def decoding(self) -> Decoding:
        """Way in which tokens become text, before blanks are taken out."""
        ...

    @property
    def cleans_up(self) -> bool:
        """Whether blanks before punctuation are taken out of the text."""
        ...


class TextStream:
    """Turns tokens into text as they come, and never takes text back.

    Held back is text that later tokens may change (see :mod:`trimode.runtime.text.token_window`),
    and text that may be the beginning of a stop string. All pieces together are the decoded text.

    Args:
        codec: Tokenizer of the text.
        stop: Stop strings; the text ends before the first that is complete, wherever tokens begin
            and end.
        min_tokens: Number of tokens before which a complete stop string ends nothing.

    Attributes:
        is_stopped: Whether a stop string is complete; no more text will come.
    """

    def __init__(self, codec: Codec, stop: Seq[str] = (), min_tokens: int = 0) -> None:
        self._window = TokenWindow(codec.decoding)
        self._clean_up = CleanUp() if codec.cleans_up else None
        self._stop, self._min_tokens, self._count = tuple(stop), min_tokens, 0
        self._longest = max(map(len, self._stop), default=0)
        self._tail = ""  # certain text that may be the beginning of a stop string
        self._num_passed = 0  # characters from the tail on, in which a stop string ends nothing
        self.is_stopped = False

    def push(self, token_ids: Seq[int]) -> str:
        """Return the text that became certain with these tokens."""
        if not self._stop:
            return self._complete(token_ids)
        # One by one, to know the token that completes a stop string.
        return "".join(self._push_watched(token) for token in token_ids)

    def finish(self) -> str:
        """Return what was still held back."""
        if self.is_stopped:
            return ""
        rest = self._window.rest()
        if self._clean_up is not None:
            rest = self._clean_up.push(rest) + self._clean_up.finish()
        return self._tail + rest

    def _push_watched(self, token: int) -> str:
        if self.is_stopped:
            return ""
        self._count += 1
        self._tail += self._complete([token])
        if self._count < self._min_tokens:
            self._num_passed = len(self._tail) + self._window.num_pending
        elif (text := self._before_stop()) is not None:
            self.is_stopped = True
            return text
        certain = len(self._tail) - _beginning(self._tail, self._stop)
        out, self._tail = self._tail[:certain], self._tail[certain:]
        self._num_passed = max(0, self._num_passed - certain)
        return out

    def _before_stop(self) -> str | None:
        """Return the held text before a complete stop string, or None."""
        text = self._tail
        if self._clean_up is None and self._window.num_pending:
            last = text + self._window.last_pending(self._longest)
            if last.endswith(self._stop):  # by its last character: the others were looked at before
                text += self._window.rest()
        end = first_stop(text, self._stop, self._num_passed)
        return None if end is None else text[:end]

    def _complete(self, token_ids: Seq[int]) -> str:
        text = self._window.push(token_ids)
        return text if self._clean_up is None else self._clean_up.push(text)


def first_stop(text: str, stop: Seq[str], passed: int = 0) -> int | None:
    """Find the stop string that is complete first, the longest of several.

    Args:
        text: Text to search.
        stop: Stop strings, none empty.
        passed: Number of characters at the beginning in which none may end.

    Returns:
        Its first character's place; None if there is none.
    """
    found = [
        (begin + len(one), begin)
        for one in stop
        if (begin := text.find(one, max(0, passed - len(one) + 1))) >= 0
    ]
    return min(found)[1] if found else None


def _beginning(text: str, stop: Seq[str]) -> int:
    """Count the last characters that may begin a stop string."""
    longest = min(len(text), max(map(len, stop)) - 1)
    return next((n for n in range(longest, 0, -1) if _may_end(text[-n:], stop)), 0)


def _may_end(end: str, stop: Seq[str]) -> bool:
    return any(len(one) > len(end) and one.startswith(end) for one in stop)

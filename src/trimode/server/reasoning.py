"""Splits a text at ``</think>`` into thinking and answer, as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from trimode.server.tags import held_back

OPEN, CLOSE = "<think>", "</think>"


class Split(NamedTuple):
    """Holds what became certain of a text.

    Attributes:
        reasoning: Thinking, without its tags.
        content: Answer.
    """

    reasoning: str
    content: str


class Place(Enum):
    """Says where in a text one is."""

    BEFORE = "before"
    THINKING = "thinking"
    GAP = "gap"
    ANSWER = "answer"


def place_after(prompt: str) -> Place:
    """Return where a text begins that follows a rendered prompt.

    Chat templates open the tag, or write it closed where no thinking is wanted. Without either
    the text itself may begin with it.
    """
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return Place.THINKING
    return Place.ANSWER if end.endswith(CLOSE) else Place.BEFORE


class ThinkSplitter:
    """Splits a text that comes in pieces, cut anywhere.

    The first ``</think>`` ends the thinking; later tags are part of the answer. Where none comes,
    all is thinking. Line breaks between the tag and the answer belong to neither.

    Args:
        place: Place in which the text begins.
    """

    def __init__(self, place: Place) -> None:
        self._place, self._held = place, ""
        self._is_first = place is Place.THINKING  # the model may write the prompt's tag once more

    def push(self, text: str) -> Split:
        """Take a piece; return what is certain."""
        reasoning = content = ""
        self._held += text
        while True:
            place = self._place
            out = self._step()
            if place is Place.THINKING:
                reasoning += out
            else:
                content += out
            if self._place is place:
                return Split(reasoning, content)

    def finish(self) -> Split:
        """Return what was held back."""
        held, self._held = self._held, ""
        if self._place is Place.THINKING:
            return Split(held, "")
        return Split("", "" if self._place is Place.GAP else held)

    def _step(self) -> str:
        """Advance within a place, or to the next place."""
        if self._place is Place.BEFORE:
            return self._before()
        if self._place is Place.THINKING:
            return self._thinking()
        if self._place is Place.GAP:
            self._held = self._held.lstrip("\n")
            self._place = Place.ANSWER if self._held else Place.GAP
            return ""
        out, self._held = self._held, ""
        return out

    def _before(self) -> str:
        """Find out whether the text begins with the tag."""
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._held, self._place = start[len(OPEN) :], Place.THINKING
        elif not OPEN.startswith(start):
            self._place = Place.ANSWER
        return ""

    def _thinking(self) -> str:
        if self._is_first:
            start = self._held.lstrip()
            if OPEN.startswith(start) and start != OPEN:
                return ""
            self._is_first = False
            self._held = start[len(OPEN) :] if start.startswith(OPEN) else self._held
        before, tag, after = self._held.partition(CLOSE)
        if tag:
            self._held, self._place = after, Place.GAP
            return before
        certain = len(self._held) - held_back(self._held, CLOSE)
        out, self._held = self._held[:certain], self._held[certain:]
        return out


def count_reasoning(token_ids: Sequence[int], place: Place, end_think: int | None) -> int:
    """Count the tokens of the thinking, the one of its end included.

    Args:
        token_ids: Tokens of the text.
        place: Place in which the text begins.
        end_think: Token of ``</think>``; None where the tokenizer has none.
    """
    if place is Place.ANSWER or end_think is None:
        return 0
    for count, token in enumerate(token_ids, 1):
        if token == end_think:
            return count
    return len(token_ids) if place is Place.THINKING else 0

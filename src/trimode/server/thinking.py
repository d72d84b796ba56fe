"""Tells thinking and answer apart in what a client reads."""

from __future__ import annotations

from trimode.server.outputs import Delta
from trimode.server.reasoning import Split, ThinkSplitter, place_after


class ThinkingProcessor:
    """Moves thinking into ``reasoning_content``.

    Args:
        prompt: Rendered prompt, which tells whether the text begins in the thinking.
    """

    def __init__(self, prompt: str) -> None:
        self._splitter = ThinkSplitter(place_after(prompt))

    def push(self, delta: Delta) -> Delta:
        """Take text; return what is certain."""
        return _delta(self._splitter.push(delta.content))

    def finish(self) -> Delta:
        """Return what was held back."""
        return _delta(self._splitter.finish())

    def finish_reason(self, reason: str) -> str:
        """Return the reason as it is."""
        return reason


def _delta(split: Split) -> Delta:
    return Delta(split.content, split.reasoning)

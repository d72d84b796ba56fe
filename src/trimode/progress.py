"""How long work tells what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Advance = Callable[[int], None]
"""Told how many more steps a stage has made; may be called from another thread than the one that
began it.
"""


class Progress(Protocol):
    """Told what happens, so that the work itself draws nothing."""

    def stage(self, name: str, total: int) -> Advance:
        """Begin a stage of ``total`` steps; stages may overlap.

        A step is a byte, a graph, or a hundredth of an engine.
        """
        ...


class Silent:
    """A :class:`Progress` that shows nothing."""

    def stage(self, name: str, total: int) -> Advance:  # noqa: ARG002
        """See :class:`Progress`."""
        return lambda _: None

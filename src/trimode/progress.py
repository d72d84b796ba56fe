"""Declares how long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Advance = Callable[[int], None]
"""Takes the number of further steps of a stage; callable from any thread."""


class Progress(Protocol):
    """Receives the progress of work, which draws nothing itself."""

    def stage(self, name: str, total: int) -> Advance:
        """Begin a stage of ``total`` steps; stages may overlap.

        A step is a byte, a graph, or a hundredth of an engine.
        """
        ...


class Silent:
    """Ignores all progress."""

    def stage(self, name: str, total: int) -> Advance:  # noqa: ARG002
        return lambda _: None

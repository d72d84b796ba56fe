"""Who is told what a job does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Told what happens."""

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        """A stage begins that will make ``total`` steps; the result is told how many more were made."""
        ...

"""What the tests of training jobs have in common."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def some_texts(count: int = 15) -> list[list[int]]:
    """Ragged prompts."""
    rng = np.random.default_rng(8)
    return [rng.integers(12, 99, length).tolist() for length in rng.integers(3, 10, count)]


class Quiet:
    """Remembers the stages; calls ``on_step`` with the stage's name and the steps it has made."""

    def __init__(self, on_step: Callable[[str, int], None] = lambda *_: None) -> None:
        self.done: dict[str, int] = {}
        self._on_step = on_step

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        self.done[name] = 0

        def advance(count: int) -> None:
            self.done[name] += count
            assert self.done[name] <= total
            self._on_step(name, self.done[name])

        return advance

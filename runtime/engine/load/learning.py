"""What forwards really take, over what the table says: learned while an engine runs."""

from __future__ import annotations

from collections.abc import Hashable

MEMORY_FORWARDS = 32.0
"""Forwards after which what was seen weighs 1/e."""
COMMON_WEIGHT = 4.0
"""Forwards of a cell that weigh as much as what all cells together say of it.

A machine that has become slower shows it first in the forwards that it happens to run. If the
others kept their old times, they would look better than they are, and modes would swing.
"""
LEAST_FACTOR, GREATEST_FACTOR = 0.5, 2.0


class Corrections:
    """Keeps measured over predicted milliseconds, for each cell of a table and for all of them.

    A cell leans on the common factor as far as it was not seen.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[float, float]] = {}
        self._weight = self._total = 0.0

    @property
    def common(self) -> float:
        """Factor of a cell that was never seen."""
        return (self._total + COMMON_WEIGHT) / (self._weight + COMMON_WEIGHT)

    def factor(self, cell: Hashable) -> float:
        """What to multiply a cell's milliseconds by, within 0.5 and 2."""
        weight, total = self._seen.get(cell, (0.0, 0.0))
        value = (total + COMMON_WEIGHT * self.common) / (weight + COMMON_WEIGHT)
        return min(max(value, LEAST_FACTOR), GREATEST_FACTOR)

    def observe(self, cell: Hashable, ratio: float) -> None:
        """Take note of one forward: measured over predicted; what is out of range is clipped."""
        ratio = min(max(ratio, LEAST_FACTOR), GREATEST_FACTOR)
        keep = 1 - 1 / MEMORY_FORWARDS
        weight, total = self._seen.get(cell, (0.0, 0.0))
        self._seen[cell] = keep * weight + 1, keep * total + ratio
        self._weight, self._total = keep * self._weight + 1, keep * self._total + ratio

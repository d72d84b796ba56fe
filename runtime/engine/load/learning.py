"""Learns how long forwards really take, over what the table says.

It learns while an engine runs.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

MEMORY_FORWARDS = 32.0
"""Forwards after which what was seen weighs 1/e."""
COMMON_WEIGHT = 4.0
"""Forwards of a cell that weigh as much as what the others together say of it.

A machine that has become slower shows it first in the forwards that it happens to run. If the
others kept their old times, they would look better than they are, and modes would swing.
"""
LEAST_FACTOR, GREATEST_FACTOR = 0.5, 2.0


class Corrections:
    """Keeps measured over predicted milliseconds, at three levels.

    There is a ratio for each cell of a table, one for each group of cells, and one for all. A cell
    leans on its group as far as it was not seen, and a group on all.
    """

    def __init__(self) -> None:
        self._cells: dict[Hashable, _Average] = {}
        self._groups: dict[Hashable, _Average] = {}
        self._all = _Average()

    @property
    def common(self) -> float:
        """Factor of a cell whose group was never seen."""
        return self._all.leaning_on(1.0)

    def factor(self, group: Hashable, cell: Hashable) -> float:
        """Return the factor of a cell's milliseconds, within 0.5 and 2."""
        value = self._groups.get(group, _NOTHING).leaning_on(self.common)
        value = self._cells.get(cell, _NOTHING).leaning_on(value)
        return min(max(value, LEAST_FACTOR), GREATEST_FACTOR)

    def observe(self, group: Hashable, cell: Hashable, ratio: float) -> None:
        """Take note of one forward: measured over predicted milliseconds.

        A ratio that is out of range is clipped.
        """
        ratio = min(max(ratio, LEAST_FACTOR), GREATEST_FACTOR)
        self._cells[cell] = self._cells.get(cell, _NOTHING).after(ratio)
        self._groups[group] = self._groups.get(group, _NOTHING).after(ratio)
        self._all = self._all.after(ratio)


class _Average(NamedTuple):
    """Holds a moving average.

    It is the weight of what was seen, and the weighted sum of it.
    """

    weight: float = 0.0
    total: float = 0.0

    def after(self, value: float) -> _Average:
        keep = 1 - 1 / MEMORY_FORWARDS
        return _Average(keep * self.weight + 1, keep * self.total + value)

    def leaning_on(self, usual: float) -> float:
        return (self.total + COMMON_WEIGHT * usual) / (self.weight + COMMON_WEIGHT)


_NOTHING = _Average()

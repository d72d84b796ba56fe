"""Moves rows of a cache, so that those in use are neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Row = TypeVar("Row")


def make_neighbours(rows: list[Row | None], move: Callable[[Row, int, int], None]) -> None:
    """Move rows from the end into free places.

    Args:
        rows: Row at each place; None = free. Changed in place.
        move: Function that copies a row's K/V. It gets the row, its place, and its new one. What
            it raises leaves the row where it was.
    """
    count = len(rows) - rows.count(None)
    while None in rows[:count]:
        free = rows.index(None)
        last = max(place for place, row in enumerate(rows) if row is not None)
        row = rows[last]
        assert row is not None
        move(row, last, free)
        rows[free], rows[last] = row, None

"""Predicts a forward's milliseconds from a table: measured, then learned.

The table goes by graph, rows, new tokens and cached tokens.

Between measured points the time follows the roofline that fits them; at the points it is what was
measured. How far the two differ is interpolated, in powers of two, and held beyond the last point.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.errors import UsageError
from trimode.formats.contract import GraphName
from trimode.formats.hints import BENCH
from trimode.runtime.auto.timings import Timings
from trimode.runtime.engine.load.learning import Corrections
from trimode.runtime.engine.load.roofline import Forwards, fit_roofline

CACHED_STEP = 32
"""Cached tokens between which a prediction is taken to be the same."""

MOST_KNOWN = 4096
"""Predictions that are kept."""
LEARNED_FORWARDS = 5
"""Forwards of which one is learned from: an odd number, since drafts and verifications take turns.
"""


class Cell(NamedTuple):
    """Holds a forward that was measured.

    Attributes:
        rows: Texts in the forward.
        tokens: New tokens of each text.
        cached: Tokens cached before them.
        ms: Time of the forward, in milliseconds.
    """

    rows: int
    tokens: int
    cached: int
    ms: float


class CostTable:
    """Predicts forwards, and learns from those that ran.

    Args:
        cells: Measured forwards of the graphs ``ar``, ``draft`` and ``verify``.
        is_frozen: Whether :meth:`observe` changes nothing, so that choices can be repeated.

    Raises:
        UsageError: a graph has no cells, or none of one token in ``ar``.
    """

    def __init__(
        self, cells: Mapping[GraphName, Sequence[Cell]], *, is_frozen: bool = False
    ) -> None:
        self.is_frozen = is_frozen
        self._corrections = Corrections()
        self._num_forwards = 0
        if not cells.get("ar") or not any(cell.tokens == 1 for cell in cells["ar"]):
            raise UsageError("expected timings of AR steps, found none", BENCH)
        self._grids = {graph_name: _Grid(found) for graph_name, found in cells.items() if found}
        drafted, verified = (
            {cell.tokens for cell in cells.get(graph_name, ())} for graph_name in _SPECULATION
        )
        self.lengths = tuple(sorted(drafted & verified))
        self._known: dict[tuple[GraphName, int, int, int], tuple[float, _Place]] = {}

    @classmethod
    def from_timings(
        cls, timings: Timings, *, use_drafter: bool, is_frozen: bool = False
    ) -> CostTable:
        """Make the table from what ``trimode bench --batch`` stored.

        Of each forward, the least time counts.
        """
        cells: dict[GraphName, list[Cell]] = {}
        for one in timings.forwards:
            if one.graph != "draft" or one.drafter == use_drafter:
                cell = Cell(one.batch, one.rows, one.past, one.least_ms)
                cells.setdefault(one.graph, []).append(cell)
        return cls(cells, is_frozen=is_frozen)

    @property
    def has_batches(self) -> bool:
        """Whether AR forwards were measured for one text and for several."""
        return self._grids["ar"].num_row_counts > 1

    @property
    def drift(self) -> float:
        """Measured over predicted milliseconds, of late and over all forwards."""
        return self._corrections.common

    def knows(self, graph_name: GraphName) -> bool:
        """Whether a graph was measured."""
        return graph_name in self._grids

    def ms(self, graph_name: GraphName, rows: int, tokens: int, cached: int) -> float:
        """Predict the milliseconds that a forward takes.

        Raises:
            UsageError: the graph was not measured.
        """
        base, place = self._predicted(graph_name, rows, tokens, cached)
        return base * self._corrections.factor((graph_name, tokens > 1), place)

    def observe(
        self, graph_name: GraphName, rows: int, tokens: int, cached: int, ms: float
    ) -> float | None:
        """Learn from a forward that took ``ms`` milliseconds.

        Its host time is included. Only every fifth forward is looked at, which is enough.

        Of forwards with more new tokens than were measured nothing is learned: how far a fit is
        off there says nothing of the forwards that it was made from.

        Returns:
            Measured over stored milliseconds; None for a forward that was not looked at.
        """
        self._num_forwards += 1
        if self._num_forwards % LEARNED_FORWARDS:
            return None
        if graph_name not in self._grids or tokens > self._grids[graph_name].most_tokens:
            return None
        base, place = self._predicted(graph_name, rows, tokens, cached)
        if not self.is_frozen:
            self._corrections.observe((graph_name, tokens > 1), place, ms / base)
        return ms / base

    def _predicted(
        self, graph_name: GraphName, rows: int, tokens: int, cached: int
    ) -> tuple[float, _Place]:
        key = graph_name, rows, tokens, round(cached / CACHED_STEP)
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        if key not in self._known:
            if graph_name not in self._grids:
                raise UsageError(f"expected timings of {graph_name}, found none", BENCH)
            grid, at = (
                self._grids[graph_name],
                (float(rows), float(tokens), float(key[3] * CACHED_STEP)),
            )
            self._known[key] = grid.ms(at), _Place(graph_name, *grid.nearest(at))
        return self._known[key]


_SPECULATION: tuple[GraphName, GraphName] = ("draft", "verify")


class _Place(NamedTuple):
    """Names a cell of the table.

    Its rows, tokens and cached tokens are given by their places on their axes.
    """

    graph_name: GraphName
    rows: int
    tokens: int
    cached: int


class _Grid:
    """Holds one graph's roofline, and how far measurements differ from it.

    Measured over fitted milliseconds is kept for each point of a grid.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        columns = np.array(cells, np.float64).T
        found = Forwards(*columns)
        self._roofline = fit_roofline(found)
        self._axes = [np.unique(axis).tolist() for axis in columns[:3]]
        self._ratios = self._filled(columns, self._roofline.ms(*columns[:3]))

    def _filled(self, columns: NDArray[np.float64], fitted: NDArray[np.float64]) -> _Numbers:
        """Return measured over fitted milliseconds at all points.

        A point that was not measured has the geometric mean of those that were.
        """
        ratios = columns[3] / fitted
        filled = np.full([len(axis) for axis in self._axes], np.exp(np.log(ratios).mean()))
        places = tuple(
            np.searchsorted(axis, column)
            for axis, column in zip(self._axes, columns[:3], strict=True)
        )
        filled[places] = ratios
        return filled

    @property
    def num_row_counts(self) -> int:
        """Number of batch sizes that were measured."""
        return len(self._axes[0])

    @property
    def most_tokens(self) -> float:
        """Most new tokens of a text that were measured."""
        return float(self._axes[1][-1])

    def ms(self, at: Sequence[float]) -> float:
        """Predict the milliseconds of a forward of ``(rows, tokens, cached)``."""
        between = [_between(axis, value) for axis, value in zip(self._axes, at, strict=True)]
        ratio = sum(
            math.prod(share for _, share in corner)
            * float(self._ratios[tuple(place for place, _ in corner)])
            for corner in product(*between)
        )
        return ratio * float(self._roofline.ms(*at))

    def nearest(self, at: Sequence[float]) -> tuple[int, int, int]:
        """Find the point that weighs most at ``(rows, tokens, cached)``."""
        rows, tokens, cached = (
            max(_between(axis, value), key=lambda one: one[1])[0]
            for axis, value in zip(self._axes, at, strict=True)
        )
        return rows, tokens, cached


_Numbers = NDArray[np.float64]


def _between(axis: Sequence[float], value: float) -> tuple[tuple[int, float], ...]:
    """Find a value's neighbouring places on an axis, with their shares.

    Shares are linear in the logarithm to base two.
    """
    right = bisect_right(axis, value)
    if right in (0, len(axis)):
        return ((max(right - 1, 0), 1.0),)
    low, high = math.log2(axis[right - 1] + 1), math.log2(axis[right] + 1)
    share = (math.log2(value + 1) - low) / (high - low)
    return (right - 1, 1 - share), (right, share)

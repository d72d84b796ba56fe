"""Tells when forwards take much longer than the table says.

They must have done so for a minute.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from trimode.formats.hints import BENCH_BATCH

MOST_RATIO, LASTING_S = 1.5, 60.0
"""Measured over stored milliseconds, and for how long, until it is told."""
CALM_RATIO = 1.3
"""Ratio below which it may be told again."""
MEMORY = 32.0
"""Forwards after which what was seen weighs 1/e."""
LONGEST_GAP_S = 1.0
"""Most seconds that count between two forwards: an idle engine shows nothing."""

logger = logging.getLogger("trimode.runtime")


class DriftAlarm:
    """Warns once each time that the table has become wrong.

    Args:
        clock: Function that gives the time in seconds.

    Attributes:
        count: Warnings so far.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._log_ratio, self._lasted_s, self._last = 0.0, 0.0, clock()
        self._is_on = False
        self.count = 0

    @property
    def ratio(self) -> float:
        """Measured over stored milliseconds, of late.

        It is the geometric mean, so that one forward that stood still says little.
        """
        return math.exp(self._log_ratio)

    def note(self, ratio: float) -> None:
        """Take note of a forward: measured over stored milliseconds."""
        now = self._clock()
        gap, self._last = min(now - self._last, LONGEST_GAP_S), now
        self._log_ratio += (math.log(ratio) - self._log_ratio) / MEMORY
        self._lasted_s = self._lasted_s + gap if self.ratio > MOST_RATIO else 0.0
        if self._is_on:
            self._is_on = self.ratio > CALM_RATIO
        elif self._lasted_s >= LASTING_S:
            self._warn()

    def _warn(self) -> None:
        self._is_on, self.count = True, self.count + 1
        logger.warning(
            "forwards take %.1f times as long as the table of timings says, for %.0f s; %s",
            self.ratio,
            self._lasted_s,
            BENCH_BATCH,
        )

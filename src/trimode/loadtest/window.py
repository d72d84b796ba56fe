"""Decides which conversations begin, and which requests count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from trimode.loadtest.options import Span

_PATIENCE = 200
"""Failures in a row after which a run is given up."""


class Window:
    """Follows the time of one run: warm-up, measurement, end.

    With a duration, a request counts if it is sent within it. With a number of prompts, whole
    conversations count.
    """

    def __init__(self, span: Span, clock: Callable[[], float] = time.perf_counter) -> None:
        self._span, self._clock = span, clock
        self.measure_from = clock() + span.warmup
        self._until = math.inf if span.duration is None else self.measure_from + span.duration
        self._remaining = math.inf if span.num_prompts is None else span.num_prompts
        self._failures = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more is sent."""
        return self._clock() >= self._until or self.is_given_up

    @property
    def is_given_up(self) -> bool:
        """Whether many requests in a row failed, so the server seems gone."""
        return self._failures >= _PATIENCE

    def begin(self) -> bool | None:
        """Begin a conversation.

        Returns:
            Whether the conversation counts; None if no more may begin.
        """
        if self.is_over or self._remaining <= 0:
            return None
        is_measured = self._clock() >= self.measure_from
        if is_measured:
            self._remaining -= 1
        return is_measured

    def counts(self, sent: float, *, is_measured: bool) -> bool:
        """Tell whether a request that was sent at this time counts.

        ``is_measured`` tells whether its conversation does.
        """
        return is_measured or (self._span.duration is not None and sent >= self.measure_from)

    def note(self, *, succeeded: bool) -> None:
        """Note how a request ended."""
        self._failures = 0 if succeeded else self._failures + 1

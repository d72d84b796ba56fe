"""Draws when the conversations of an open loop begin."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def arrivals(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Yield the seconds from the start at which conversations begin, without end.

    Gaps follow a gamma distribution of mean ``1 / rate`` and shape ``burstiness``: 1 is a Poisson
    process, below 1 comes in bursts, far above 1 is a steady beat.
    """
    rng = np.random.default_rng(seed)
    scale, now = 1 / (rate * burstiness), 0.0
    while True:
        now += float(rng.gamma(burstiness, scale))
        yield now

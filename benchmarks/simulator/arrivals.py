"""When requests come: clients who ask again as soon as they are answered, and strangers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.simulator.engine import Outcome, Simulator, Text
from benchmarks.simulator.texts import Profile

Clients = Callable[[float], int]
"""Number of clients at a time in milliseconds."""


@dataclass(frozen=True)
class Source:
    """Makes texts of one profile.

    Attributes:
        profile: How drafts are accepted; or, where it differs with time, a function of it.
        prompt_length: Tokens of a prompt.
        tokens: Least and most tokens of a text.
        seed: Seed of the texts.
    """

    profile: Profile | Callable[[float], Profile]
    prompt_length: int = 256
    tokens: tuple[int, int] = (100, 300)
    seed: int = 0

    def text(self, number: int, at_ms: float) -> Text:
        rng = np.random.default_rng((self.seed, number))
        length = int(rng.integers(*self.tokens, endpoint=True))
        profile = self.profile if isinstance(self.profile, Profile) else self.profile(at_ms)
        return Text(at_ms, self.prompt_length, profile.accepted_from(rng, length))


def closed_loop(simulator: Simulator, source: Source, clients: Clients, until_ms: float) -> Outcome:
    """Run with so many clients, each of whom asks again when answered."""
    starts = [
        at
        for at in np.arange(0.0, until_ms, until_ms / 400).tolist()
        for _ in range(clients(at) - (clients(at - until_ms / 400) if at else 0))
    ]
    count = len(starts)

    def renew(now: float, active: int) -> Text | None:
        nonlocal count
        if active >= clients(now):
            return None
        count += 1
        return source.text(count, now)

    return simulator.run(
        [source.text(number, at) for number, at in enumerate(starts)], until_ms, renew
    )


def open_loop(
    simulator: Simulator, source: Source, rate: Callable[[float], float], until_ms: float
) -> Outcome:
    """Run with requests that come at random, ``rate`` a second, until all are answered."""
    rng, now, texts = np.random.default_rng(source.seed), 0.0, []
    most = max(rate(at) for at in np.linspace(0, until_ms, 400))
    while (now := now + 1e3 * float(rng.exponential(1 / most))) < until_ms:
        if rng.random() < rate(now) / most:
            texts.append(source.text(len(texts), now))
    return simulator.run(texts)


def steady(count: int) -> Clients:
    return lambda _: count


def ramp(most: int, period_ms: float) -> Clients:
    """From 1 to ``most`` and back, in equal ratios."""

    def clients(at: float) -> int:
        share = 1 - abs(2 * (at / period_ms % 1) - 1)
        return round(most**share)

    return clients


def bursts(least: int, most: int, period_ms: float) -> Clients:
    """``most`` for a third of each period, else ``least``."""
    return lambda at: most if at / period_ms % 1 > 2 / 3 else least


def sawtooth(most: int, period_ms: float) -> Clients:
    """From 1 to ``most`` in each period, and at once back to 1."""
    return lambda at: round(most ** (at / period_ms % 1))

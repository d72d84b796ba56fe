"""Texts whose drafts are accepted as a rate says, for policies of mode auto to write; the benchmark
of these reads them too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trimode.runtime.auto.policy import Policy, StepCosts

CPU = StepCosts(
    (64,), (0.9,), {8: (2.1,), 16: (2.9,), 32: (4.6,)}, {8: (1.8,), 16: (2.7,), 32: (4.4,)}
)
"""Compute-bound: rows cost time."""
GPU = StepCosts(
    (64,),
    (7.0,),
    {4: (7.0,), 8: (7.0,), 16: (7.2,), 32: (7.5,)},
    {4: (6.9,), 8: (7.0,), 16: (7.1,), 32: (7.5,)},
)
"""Memory-bound: rows hardly cost anything."""

Rates = Callable[[np.random.Generator, int], np.ndarray]
"""Acceptance of each position's draft, given that those before it in its block were accepted."""


def constant(rate: float) -> Rates:
    return lambda _, length: np.full(length, rate)


def by_text(rng: np.random.Generator, length: int) -> np.ndarray:
    return np.full(length, rng.choice([0.2, 0.6, 0.9, 0.99]))


def by_stretch(rng: np.random.Generator, length: int) -> np.ndarray:
    """Two kinds of stretches of 40 tokens on average."""
    return np.where((rng.random(length) < 1 / 40).cumsum() % 2 == 0, 0.98, 0.5)


def bursts(rng: np.random.Generator, length: int) -> np.ndarray:
    """Certain drafts, and a hard one after every 3 to 12 of them."""
    rates = np.full(length, 0.995)
    rates[rng.integers(3, 13, length).cumsum().clip(max=length - 1)] = 0.1
    return rates


def milliseconds_per_token(
    make: Callable[[], Policy],
    costs: StepCosts,
    rates: Rates,
    length: int,
    texts: int,
    *,
    is_confident: bool,
    limit: int | None = None,
) -> float:
    """The acceptance of a position is drawn before any policy comes, so that all face the same
    texts; drafts may know how likely it was.

    With a ``limit`` the policy knows that one alone, not how long a text is; drafts show its end.
    """
    spent = 0.0
    for text in range(texts):
        rng, policy, position = np.random.default_rng((5, text)), make(), 0
        likely = rates(rng, length)
        accepts = rng.random(length) < likely
        while position < length:
            left = length - position
            block, tokens = policy.choose(64, limit - position if limit else left), 1
            if block == 1:
                spent += costs.ar_ms[0]
            else:
                confidence = np.concatenate(([1.0], likely[position:], np.full(block, 0.5)))[:block]
                rows = policy.rows_to_verify(min(left, block), confidence if is_confident else None)
                spent += costs.draft_ms[block][0] + costs.verify_ms[rows][0]
                drafts = accepts[position : position + rows - 1]
                tokens = min(len(drafts) if drafts.all() else int(drafts.argmin()), left - 1) + 1
            policy.record(tokens)
            position += tokens
    return spent / (length * texts)

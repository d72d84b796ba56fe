"""Limits a training run, and schedules its learning rate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Limits a training to ``seconds`` or ``steps``, whichever ends first."""

    seconds: float | None = None
    steps: int | None = None

    def progress(self, seconds: float, steps: int) -> float:
        """Return the share of the budget that is used, 0 to 1."""
        shares = [
            used / limit
            for used, limit in ((seconds, self.seconds), (steps, self.steps))
            if limit is not None
        ]
        return min(1.0, max(shares, default=1.0))


def budget_of(steps: int | None, minutes: float | None, default_steps: int) -> Budget:
    """Return the budget of these limits; by default, ``default_steps``."""
    return Budget(
        None if minutes is None else minutes * 60,
        default_steps if steps is None and minutes is None else steps,
    )


def rate_at(share: float, *, warm_up: float, decay: float) -> float:
    """Return the learning rate as a share of its peak.

    It goes up over ``warm_up``, is level, and goes down to zero over ``decay``, all in straight
    lines.
    """
    return max(0.0, min(1.0, (share + 1e-3) / warm_up, (1 - share) / decay))

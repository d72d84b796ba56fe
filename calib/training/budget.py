"""How long a training run may take, and the learning rate that goes with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Says when to stop: after ``seconds`` or after ``steps``, whichever comes first."""

    seconds: float | None = None
    steps: int | None = None

    def progress(self, seconds: float, steps: int) -> float:
        """Share of the budget that is used, 0 to 1."""
        shares = [
            used / limit
            for used, limit in ((seconds, self.seconds), (steps, self.steps))
            if limit is not None
        ]
        return min(1.0, max(shares, default=1.0))


def budget_of(steps: int | None, minutes: float | None, default_steps: int) -> Budget:
    """The budget of a command line; the default goes where neither is given."""
    return Budget(
        None if minutes is None else minutes * 60,
        default_steps if steps is None and minutes is None else steps,
    )


def rate_at(share: float, *, warm_up: float, decay: float) -> float:
    """Give the learning rate as a share of its peak.

    It goes up over ``warm_up``, is level, and goes down to zero over ``decay``, all in straight
    lines.
    """
    return max(0.0, min(1.0, (share + 1e-3) / warm_up, (1 - share) / decay))

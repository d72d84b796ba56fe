"""Runs a training as a stage of a job.

It is shown, stopped where it diverges, and kept so that an interrupted run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from trimode.calib.training.budget import Budget
from trimode.calib.training.run_state import RunState, held_interrupts, keep
from trimode.errors import BuildError
from trimode.progress import Progress


class TrainingProgress(Protocol):
    """Counts what a training has done so far."""

    step: int
    seconds: float
    loss: float


class Training(Protocol):
    """Gives a state that can be kept."""

    def state(self) -> dict[str, Any]:
        """Return all that it needs to go on.

        The types are those that ``torch.load(weights_only=True)`` reads.
        """
        ...


P = TypeVar("P", bound=TrainingProgress)


def run_training(
    training: Training,
    run: Callable[[Callable[[P, float], None]], P],
    budget: Budget,
    state: RunState,
    progress: Progress,
) -> P:
    """Train until the budget is used up.

    Args:
        training: Training whose state is kept.
        run: Trains, and calls its argument after each step.
        budget: Budget of ``run``, to show how far it is.
        state: State of the job's run.
        progress: Display of the stage.

    Raises:
        BuildError: the loss is no finite number.
    """
    advance, shown = progress.stage("train", 100), 0

    def report(done: P, _share: float) -> None:
        nonlocal shown
        _check_loss(done)
        percent = int(100 * budget.progress(done.seconds, done.step))
        advance(percent - shown)
        shown = percent
        state.training = training.state()
        keep(state, interrupted=is_interrupted())

    with held_interrupts() as is_interrupted:
        result = run(report)
    state.save()
    return result


def _check_loss(done: TrainingProgress) -> None:
    if not math.isfinite(done.loss):
        raise BuildError(
            f"expected a finite loss, found {done.loss} at step {done.step}",
            "train with a lower `learning_rate`",
        )

"""Holds the settings that every training job has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimode.calib.data.checks import (
    check_above_zero,
    check_at_least,
    check_device_name,
    check_dtype,
    check_learning_rate,
)
from trimode.calib.training.budget import Budget, budget_of
from trimode.formats.contract import DType


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Holds the choices of a caller that every training job offers.

    Attributes:
        dtype: Type of the bundle's weights that are not quantized. They, scales and a drafter's
            adapter are rounded to it.
        steps, minutes: Budget, whichever ends first; ``default_steps`` if neither is given.
        num_samples: Prompts to train on and to decide by, drawn by the seed; None = all that are
            not held out.
        num_held_out: Prompts that are set aside to measure with; None = a quarter, at most 64.
        learning_rate: Peak of the learning rate; None = the job's default.
        batch_size: Texts or slots in a step.
        seed: Seed for drawing prompts, for fresh weights and for the steps' data.
        max_new_tokens: Most tokens of an answer.
        device: Device of the checkpoint and of the training, ``cpu`` or ``cuda``.
    """

    default_steps: ClassVar[int]

    dtype: DType = "float32"
    steps: int | None = None
    minutes: float | None = None
    num_samples: int | None = None
    num_held_out: int | None = None
    learning_rate: float | None = None
    batch_size: int
    seed: int = 0
    max_new_tokens: int = 256
    device: str = "cpu"

    @property
    def budget(self) -> Budget:
        """Budget of the training."""
        return budget_of(self.steps, self.minutes, self.default_steps)

    def check(self) -> None:
        """Raise :class:`UsageError` for a value out of its range."""
        check_at_least(
            self,
            steps=1,
            num_samples=2,
            num_held_out=1,
            batch_size=1,
            seed=0,
            max_new_tokens=2,
        )
        check_above_zero("minutes", self.minutes)
        check_learning_rate(self.learning_rate)
        check_dtype(self.dtype)
        check_device_name(self.device)

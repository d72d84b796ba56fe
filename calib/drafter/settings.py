"""What the training of a drafter is told."""

from __future__ import annotations

from dataclasses import dataclass

from trimode.calib.data.checks import (
    check_above_zero,
    check_at_least,
    check_device_name,
    check_dtype,
    check_learning_rate,
)
from trimode.calib.training.budget import Budget, budget_of
from trimode.errors import UsageError
from trimode.formats.contract import MAX_BLOCK_LENGTH, DType
from trimode.graphs.adapter import Drafter

DEFAULT_STEPS = 300
FRESH_RATE, REPAIR_RATE = 2e-3, 5e-4
ALPHA_OF_RANK = 4
"""The family's adapters have alpha 512 and rank 128."""


@dataclass(frozen=True)
class DrafterJobSettings:
    """What a caller can choose.

    Attributes:
        dtype: what the bundle will store weights in that are not quantized; they, scales and the
        adapter are rounded to it.
        steps, minutes: when to stop, whichever comes first; :data:`DEFAULT_STEPS` where neither is
        given.
        num_samples: prompts to train on, drawn by the seed; None = all that are not held out.
        num_held_out: prompts that are set aside for the measurement; None = a quarter, at most 64.
        block_length: slots of a block that will be drafted; None = the model's.
        rank, alpha: of a fresh adapter; None = the checkpoint's, and alpha 4 times the rank where
        it has none.
        from_scratch: begin with a fresh adapter although the checkpoint has one.
        learning_rate: its peak; None = 2e-3 for a fresh adapter and 5e-4 for one that is there.
        batch_size: texts in a step.
        seed: Seed of the draw, of a fresh adapter and of the steps' data.
        max_new_tokens: most tokens of an answer.
        device: Device of the trunk, ``cpu`` or ``cuda``.
    """

    dtype: DType = "float32"
    steps: int | None = None
    minutes: float | None = None
    num_samples: int | None = None
    num_held_out: int | None = None
    block_length: int | None = None
    rank: int | None = None
    alpha: float | None = None
    from_scratch: bool = False
    learning_rate: float | None = None
    batch_size: int = 8
    seed: int = 0
    max_new_tokens: int = 256
    device: str = "cpu"

    @property
    def budget(self) -> Budget:
        """When to stop."""
        return budget_of(self.steps, self.minutes, DEFAULT_STEPS)

    def check(self) -> None:
        """Raise :class:`UsageError` for a value out of its range."""
        check_at_least(
            (
                ("steps", self.steps, 1),
                ("samples", self.num_samples, 2),
                ("held-out", self.num_held_out, 1),
                ("block-length", self.block_length, 2),
                ("rank", self.rank, 1),
                ("batch-size", self.batch_size, 1),
                ("seed", self.seed, 0),
                ("max-new-tokens", self.max_new_tokens, 2),
            )
        )
        check_learning_rate(self.learning_rate)
        check_above_zero("minutes", self.minutes)
        check_above_zero("alpha", self.alpha)
        if self.block_length is not None and self.block_length > MAX_BLOCK_LENGTH:
            raise UsageError(
                f"expected --block-length up to {MAX_BLOCK_LENGTH}, found {self.block_length}",
                "no bundle drafts longer blocks",
            )
        check_dtype(self.dtype)
        check_device_name(self.device)

    def shape(self, own: Drafter | None) -> Drafter:
        """Rank and alpha of the adapter that is trained; ``own`` is the checkpoint's.

        Raises:
            UsageError: they are needed and not given, or given and already decided.
        """
        if own is not None and not self.from_scratch:
            if self.rank is not None or self.alpha is not None:
                raise UsageError(
                    "expected --rank and --alpha together with --from-scratch, "
                    "found a checkpoint with an adapter to start from",
                    f"leave them out to train on its adapter (rank {own.rank}), "
                    "or pass --from-scratch",
                )
            return own
        if own is None and self.rank is None:
            raise UsageError(
                "expected --rank for a checkpoint without a drafter adapter, found none",
                "the published ones have --rank 128",
            )
        rank = self.rank if self.rank is not None else own.rank if own is not None else 0
        alpha = own.alpha if own is not None and self.rank is None else float(ALPHA_OF_RANK * rank)
        return Drafter(rank, alpha if self.alpha is None else self.alpha)

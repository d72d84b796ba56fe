"""Holds the settings of ``calibrate drafter``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimode.calib.data.checks import check_above_zero, check_at_least
from trimode.calib.training.settings import TrainingSettings
from trimode.errors import UsageError
from trimode.formats.contract import MAX_BLOCK_LENGTH
from trimode.graphs.adapter import Drafter

FRESH_RATE, REPAIR_RATE = 2e-3, 5e-4
ALPHA_OF_RANK = 4
"""Alpha of a rank, in the family: its adapters have alpha 512 and rank 128."""


@dataclass(frozen=True, kw_only=True)
class DrafterJobSettings(TrainingSettings):
    """Holds the choices of a caller.

    The learning rate is 2e-3 for a fresh adapter and 5e-4 for an existing one if None. A batch
    counts texts.

    Attributes:
        block_length: Slots of a drafted block; None = the model's block size.
        rank, alpha: Shape of a fresh adapter; None = the checkpoint's, and alpha 4 times the rank
            if it has none.
        from_scratch: Whether to begin with a fresh adapter although the checkpoint has one.
    """

    default_steps: ClassVar[int] = 300

    batch_size: int = 8
    block_length: int | None = None
    rank: int | None = None
    alpha: float | None = None
    from_scratch: bool = False

    def check(self) -> None:
        """Raise :class:`UsageError` for a value out of its range."""
        super().check()
        check_at_least(self, block_length=2, rank=1)
        check_above_zero("alpha", self.alpha)
        if self.block_length is not None and self.block_length > MAX_BLOCK_LENGTH:
            raise UsageError(
                f"expected `block_length` up to {MAX_BLOCK_LENGTH}, found {self.block_length}",
                "no bundle drafts longer blocks",
            )

    def shape(self, own: Drafter | None) -> Drafter:
        """Return rank and alpha of the adapter to train.

        Args:
            own: Adapter of the checkpoint, if it has one.

        Raises:
            UsageError: rank or alpha are needed and not given, or given and already decided.
        """
        if own is not None and not self.from_scratch:
            self._check_unshaped(own)
            return own
        rank, alpha = self.rank, self.alpha
        if rank is None:
            if own is None:
                raise UsageError(
                    "expected `rank` for a checkpoint without a drafter adapter, found none",
                    "the published ones have rank 128",
                )
            return Drafter(own.rank, own.alpha if alpha is None else alpha)
        return Drafter(rank, float(ALPHA_OF_RANK * rank) if alpha is None else alpha)

    def _check_unshaped(self, own: Drafter) -> None:
        if self.rank is not None or self.alpha is not None:
            raise UsageError(
                "expected `rank` and `alpha` together with `from_scratch`, "
                "found a checkpoint with an adapter to start from",
                f"leave them out to train its adapter (rank {own.rank}), or pass `from_scratch`",
            )

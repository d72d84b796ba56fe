"""Holds the settings of ``calibrate sampler``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from trimode.calib.data.checks import check_at_least
from trimode.calib.sampler.trajectories import Target
from trimode.calib.training.settings import TrainingSettings
from trimode.errors import UsageError
from trimode.formats.contract import MAX_BLOCK_LENGTH
from trimode.graphs.sampler.network import SamplerShape

DEFAULT_BLOCK_LENGTHS = (8, 32)
"""Block lengths of the report."""


@dataclass(frozen=True, kw_only=True)
class SamplerJobSettings(TrainingSettings):
    """Holds the choices of a caller; a batch counts slots.

    Attributes:
        target: Text that labels go by: ``serial`` or ``leftmost`` denoising, or the model's own
            ``ar`` text.
        block_lengths: Lengths of the blocks to train on and to measure.
        d_model, num_layers, num_heads, feed_forward: Sizes of the network.
    """

    default_steps: ClassVar[int] = 2000

    learning_rate: float = 1e-3
    batch_size: int = 1024
    target: Target = "serial"
    block_lengths: tuple[int, ...] = DEFAULT_BLOCK_LENGTHS
    d_model: int = SamplerShape.d_model
    num_layers: int = SamplerShape.num_layers
    num_heads: int = SamplerShape.num_heads
    feed_forward: int = SamplerShape.feed_forward

    @property
    def shape(self) -> SamplerShape:
        """Sizes of the network."""
        return SamplerShape(self.d_model, self.num_layers, self.num_heads, self.feed_forward)

    def check(self) -> None:
        """Raise :class:`UsageError` for a value out of its range."""
        super().check()
        check_at_least(self, d_model=2, num_layers=1, num_heads=1, feed_forward=1)
        self._check_blocks()
        if self.d_model % (2 * self.num_heads):
            raise UsageError(
                "expected `d_model` that is a multiple of twice the heads "
                f"({2 * self.num_heads}), found {self.d_model}",
                "positions rotate pairs of numbers in each head",
            )
        if self.target not in get_args(Target):
            raise UsageError(
                f"expected a `target` among {', '.join(get_args(Target))}, found {self.target!r}",
                "choose one of these",
            )

    def _check_blocks(self) -> None:
        if not self.block_lengths or len(set(self.block_lengths)) < len(self.block_lengths):
            found = ",".join(map(str, self.block_lengths)) or "none"
            raise UsageError(
                f"expected `block_lengths` with one or several different lengths, found {found}",
                "pass 8 and 32, for example",
            )
        for length in self.block_lengths:
            if not 2 <= length <= MAX_BLOCK_LENGTH:
                raise UsageError(
                    f"expected `block_lengths` from 2 to {MAX_BLOCK_LENGTH}, found {length}",
                    "no bundle denoises longer blocks",
                )

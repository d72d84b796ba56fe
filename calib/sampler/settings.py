"""What the training of a sampler is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from trimode.calib.data.checks import (
    check_above_zero,
    check_at_least,
    check_device_name,
    check_dtype,
    check_learning_rate,
)
from trimode.calib.sampler.trajectories import Target
from trimode.calib.training.budget import Budget, budget_of
from trimode.errors import UsageError
from trimode.formats.contract import MAX_BLOCK_LENGTH, DType
from trimode.graphs.sampler.network import SamplerShape

DEFAULT_STEPS = 2000
DEFAULT_BLOCK_LENGTHS = (8, 32)
"""The report's."""


@dataclass(frozen=True)
class SamplerJobSettings:
    """What a caller can choose.

    Attributes:
        dtype: what the bundle will store weights in that are not quantized; they and scales are
        rounded to it.
        steps, minutes: when to stop, whichever comes first; :data:`DEFAULT_STEPS` where neither is
        given.
        num_samples: prompts to train on and to decide by, drawn by the seed; None = all that are
        not held out.
        num_held_out: prompts that are set aside for the measurement; None = a quarter, at most 64.
        target: what the labels go by: ``serial`` or ``leftmost`` denoising, or the model's own
        ``ar`` text.
        block_lengths: Lengths of the blocks that are denoised, to train on and to measure.
        d_model, num_layers, num_heads, feed_forward: sizes of the network.
        learning_rate: its peak.
        batch_size: slots in a step.
        seed: Seed of the draw, of the network and of the steps' data.
        max_new_tokens: most tokens of an answer.
        device: Device of the checkpoint and the network, ``cpu`` or ``cuda``.
    """

    dtype: DType = "float32"
    steps: int | None = None
    minutes: float | None = None
    num_samples: int | None = None
    num_held_out: int | None = None
    target: Target = "serial"
    block_lengths: tuple[int, ...] = DEFAULT_BLOCK_LENGTHS
    d_model: int = SamplerShape.d_model
    num_layers: int = SamplerShape.num_layers
    num_heads: int = SamplerShape.num_heads
    feed_forward: int = SamplerShape.feed_forward
    learning_rate: float = 1e-3
    batch_size: int = 1024
    seed: int = 0
    max_new_tokens: int = 256
    device: str = "cpu"

    @property
    def budget(self) -> Budget:
        """When to stop."""
        return budget_of(self.steps, self.minutes, DEFAULT_STEPS)

    @property
    def shape(self) -> SamplerShape:
        """Sizes of the network."""
        return SamplerShape(self.d_model, self.num_layers, self.num_heads, self.feed_forward)

    def check(self) -> None:
        """Raise :class:`UsageError` for a value out of its range."""
        check_at_least(
            (
                ("steps", self.steps, 1),
                ("samples", self.num_samples, 2),
                ("held-out", self.num_held_out, 1),
                ("d-model", self.d_model, 2),
                ("layers", self.num_layers, 1),
                ("heads", self.num_heads, 1),
                ("feed-forward", self.feed_forward, 1),
                ("batch-size", self.batch_size, 1),
                ("seed", self.seed, 0),
                ("max-new-tokens", self.max_new_tokens, 2),
            )
        )
        check_above_zero("minutes", self.minutes)
        check_learning_rate(self.learning_rate)
        self._check_blocks()
        if self.d_model % (2 * self.num_heads):
            raise UsageError(
                "expected --d-model that is a multiple of twice the heads "
                f"({2 * self.num_heads}), found {self.d_model}",
                "positions rotate pairs of numbers in each head",
            )
        check_dtype(self.dtype)
        if self.target not in get_args(Target):
            raise UsageError(
                f"expected a --target among {', '.join(get_args(Target))}, found {self.target!r}",
                "choose one of these",
            )
        check_device_name(self.device)

    def _check_blocks(self) -> None:
        if not self.block_lengths or len(set(self.block_lengths)) < len(self.block_lengths):
            found = ",".join(map(str, self.block_lengths)) or "none"
            raise UsageError(
                f"expected --block-length with one or several different lengths, found {found}",
                "pass for example --block-length 8,32",
            )
        for length in self.block_lengths:
            if not 2 <= length <= MAX_BLOCK_LENGTH:
                raise UsageError(
                    f"expected --block-length from 2 to {MAX_BLOCK_LENGTH}, found {length}",
                    "no bundle denoises longer blocks",
                )

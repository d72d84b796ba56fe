"""Puts a command's flags in the place of the library's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trimode.errors import TrimodeError

_ALIKE = (
    "alpha",
    "batch_size",
    "block_length",
    "block_size",
    "d_model",
    "device",
    "dtype",
    "feed_forward",
    "from_scratch",
    "learning_rate",
    "max_drop",
    "max_new_tokens",
    "minutes",
    "modes",
    "precision",
    "rank",
    "ranking_samples",
    "resume",
    "seed",
    "steps",
    "target",
)
FLAGS = {
    **{name: f"--{name.replace('_', '-')}" for name in _ALIKE},
    "block_lengths": "--block-length",
    "calibrations": "--calibration",
    "is_per_channel": "--per-channel",
    "memory_gib": "--memory",
    "num_heads": "--heads",
    "num_held_out": "--held-out",
    "num_layers": "--layers",
    "num_samples": "--samples",
}
"""Flags of ``trimode calibrate`` and ``trimode report``, by parameter of the library."""


@contextmanager
def flags_in_errors() -> Iterator[None]:
    """Name :data:`FLAGS` in the errors of the block."""
    try:
        yield
    except TrimodeError as error:
        error.rename(FLAGS)
        raise

"""Checks what a verification is asked for, before any work."""

from __future__ import annotations

from pathlib import Path

from trimode.errors import UsageError
from trimode.formats.manifest import Manifest
from trimode.graphs.checkpoint import Checkpoint
from trimode.runtime.model import TriModeModel

AFFORDABLE_FLOPS = 2e13
"""What the default long position may cost the reference: some minutes on few cores."""
DEFAULT_LONG_POSITION = 1024


def check_numbers(seed: int, max_new_tokens: int) -> None:
    """Raise :class:`UsageError` for a number out of its range."""
    if max_new_tokens < 1:
        raise UsageError(
            f"expected `max_new_tokens` of at least 1, found {max_new_tokens}", "64 is usual"
        )
    if seed < 0:
        raise UsageError(
            f"expected `seed` of at least 0, found {seed}", "any whole number from 0 on will do"
        )


def check_calibration(model: TriModeModel, calibration: Path | None) -> None:
    """Raise :class:`UsageError` where a calibration is given for a precision that has none."""
    record = model.bundle.chosen.calibration
    if calibration is not None and (record is None or record.scales_sha256 is None):
        raise UsageError(
            "expected `calibration` with a precision that was built by one,"
            f" found {model.bundle.precision}",
            "leave `calibration` out",
        )


def check_shape(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Raise :class:`UsageError` where the checkpoint is of another shape than the bundle's."""
    config, model = checkpoint.config, manifest.model
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "mask_token_id",
    )
    pairs = [(name, getattr(model, name), getattr(config, name)) for name in names]
    for name, expected, found in (
        *pairs,
        ("a drafter", model.has_drafter, checkpoint.drafter is not None),
    ):
        if expected != found:
            raise UsageError(
                f"{checkpoint.path}: expected a checkpoint like the bundle's, {name} {expected},"
                f" found {found}",
                f"the bundle was built from {manifest.source.name}",
            )


def long_position(checkpoint: Checkpoint, manifest: Manifest, wanted: int | None) -> int:
    """Choose the position of the long comparisons.

    By default, twice the rope's original length and a block, as far as the bundle reaches and the
    reference is quick.

    Raises:
        UsageError: ``wanted`` is out of range.
    """
    limit = max(1, manifest.model.max_length - manifest.model.block_size)
    if wanted is not None:
        if not 1 <= wanted <= limit:
            raise UsageError(
                f"expected `long` from 1 to {limit}, found {wanted}",
                "a block has to fit behind it; only a bundle that was built longer takes more",
            )
        return wanted
    original = checkpoint.config.rope.original_max_position_embeddings
    goal = 2 * original + manifest.model.block_size if original else DEFAULT_LONG_POSITION
    affordable = int(AFFORDABLE_FLOPS / (2 * manifest.source.num_parameters))
    return max(1, min(goal, affordable, limit))

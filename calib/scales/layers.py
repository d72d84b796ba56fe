"""Chooses the layers to quantize, and their blocks."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from trimode.calib.scales.settings import DEFAULT_BLOCK, SMALLEST_BLOCK, QuantizeSettings
from trimode.errors import UsageError
from trimode.graphs.config import ModelConfig
from trimode.graphs.numerics.nvfp4 import BLOCK_SIZE
from trimode.graphs.numerics.scales import HEAD, linear_layers

log = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, int]]
"""``(out, in)`` of linear layers, by the checkpoint's names without ``.weight``."""


def quantized_layers(config: ModelConfig, settings: QuantizeSettings) -> tuple[Shapes, int | None]:
    """Choose the layers to quantize, and the block size.

    Only int4 and nvfp4 have blocks. They leave out layers whose inputs the block size does not
    divide: those stay in high precision.

    Raises:
        UsageError: no layer is left.
    """
    shapes: Shapes = linear_layers(config)
    if not settings.quantizes_head:
        del shapes[HEAD]
    if settings.precision not in ("int4", "nvfp4"):
        return shapes, None
    block = _block_size(shapes, settings) if settings.precision == "int4" else BLOCK_SIZE
    for name in [name for name, (_, width) in shapes.items() if width % block]:
        log.warning(
            "%s stays in high precision: blocks of %d do not divide its %d inputs",
            name,
            block,
            shapes[name][1],
        )
        del shapes[name]
    if not shapes:
        raise UsageError(
            f"expected layers whose inputs come in blocks of {block}, found none",
            "choose another `precision` for this checkpoint",
        )
    return shapes, block


def _block_size(shapes: Mapping[str, tuple[int, int]], settings: QuantizeSettings) -> int:
    """Find the largest power of two that divides all inputs.

    It is at most the size asked for. Only layers whose inputs 16 divides are asked.
    """
    block = settings.block_size or DEFAULT_BLOCK
    widths = {width for _, width in shapes.values() if width % SMALLEST_BLOCK == 0}
    while block > SMALLEST_BLOCK and any(width % block for width in widths):
        block //= 2
    return block

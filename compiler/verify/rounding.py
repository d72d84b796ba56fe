"""Handles inputs on the border between two codes.

It says what rounding them to the other side does, and what a graph rounded them to.

A quantized input is the nearest code of a number that two correct computations know only up to
their rounding. Where it lies on the border of two codes they may choose differently; that is a
whole step, which moves others across their borders in the layers behind. Comparing outputs alone
then bounds little. Two answers:

- *Perturbed*: the reference chooses at random wherever the bound of the compute type leaves the
  choice open. By how far that takes it from itself says what a target may differ by whose codes
  cannot be seen.
- *Guided*: the reference takes the codes that a graph has chosen, provided that each is one that
  the bound leaves open. From there on both compute with the same numbers, and their outputs must
  agree as if nothing was quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trimode.calib.reference.fake_quant import (
    CODE_RANGES,
    SMALLEST_NORMAL,
    InputQuantizer,
    blocks_of,
    int8_steps,
    nearest_code,
    spacing_of_e2m1,
    steps_in_blocks,
    steps_of_blocks,
)
from trimode.calib.reference.torch_session import TorchCache, TorchSession
from trimode.formats.contract import DType, GraphName
from trimode.formats.verification import CodesRecord
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.numerics.integers import FORMATS
from trimode.graphs.numerics.nvfp4 import LARGEST_CODE
from trimode.runtime.sessions.base import Array, Ids

NUM_DITHERED = 2
"""Perturbed runs of the reference; the farthest counts."""
SPREAD_FACTOR = 3
"""Allowed difference of a target, in differences of the farthest perturbed run. The farthest of two
is not the farthest there is.
"""


class CodeSelector(Protocol):
    """Decides which code an input becomes."""

    def choose(self, layer: str, dtype: DType, steps: Tensor, reach: Tensor | float) -> Tensor:
        """Choose codes, as numbers, for ``steps`` of a type.

        ``steps`` are values in units of the scale, cut to the type's range and known up to
        ``reach`` either side.

        ``layer`` is :func:`scales_name` of it where the codes are scales of blocks.
        """
        ...


class GuidedQuantizer(nn.Module):
    """Asks a selector for codes, where there is one.

    All quantizers of a trunk ask the same.
    """

    def __init__(self, layer: str, quantizer: InputQuantizer, guide: Guide) -> None:
        super().__init__()
        self._layer, self.quantizer, self._guide = layer, quantizer, guide

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` as the product reads it."""
        quantizer, guide = self.quantizer, self._guide
        scale = quantizer.scale
        if guide.selector is None or (scale is None and not quantizer.is_rounded):
            return quantizer(x)  # type: ignore[no-any-return]
        if quantizer.factor is not None:
            x = x * quantizer.factor
        if scale is None:
            return self._in_int8_blocks(x, guide.selector)
        if quantizer.precision == "nvfp4":
            return self._in_blocks(x, scale, guide.selector)
        dtype = FORMATS[quantizer.precision].dtype
        steps = torch.clamp(x / scale, *CODE_RANGES[dtype])
        reach = guide.relative * float(x.abs().max() / scale)
        return guide.selector.choose(self._layer, dtype, steps, reach) * scale

    def _in_int8_blocks(self, x: Tensor, selector: CodeSelector) -> Tensor:
        """Round int4 weights' inputs in blocks, as a CPU does.

        Each block has the scale of its largest magnitude.
        """
        steps, scale = int8_steps(x, self.quantizer.block_size)
        off = self._guide.relative * float(x.abs().max())
        return (selector.choose(self._layer, "int8", steps, off / scale) * scale).reshape(x.shape)

    def _in_blocks(self, x: Tensor, global_scale: Tensor, selector: CodeSelector) -> Tensor:
        """Round inputs as NVFP4, which has codes of two kinds.

        Those of the second kind are in units of the first.
        """
        off = self._guide.relative * float(x.abs().max())
        reach = float(off / (LARGEST_CODE * global_scale))
        scale = (
            selector.choose(
                scales_name(self._layer), "float8e4m3fn", steps_of_blocks(x, global_scale), reach
            )
            * global_scale
        )
        steps = steps_in_blocks(blocks_of(x), scale)
        return (
            selector.choose(
                self._layer, "float4e2m1", steps, off / torch.clamp(scale, min=SMALLEST_NORMAL)
            )
            * scale
        ).flatten(-2)


def scales_name(layer: str) -> str:
    """What the scales of a layer's blocks are called among codes."""
    return f"{layer} (scales)"


class Guide:
    """Holds the selector that the quantizers of a trunk ask.

    Attributes:
        selector: CodeSelector of the codes; None lets each quantizer take the nearest.
        relative: Largest error of a value, over the largest of its layer's input.
    """

    def __init__(self) -> None:
        self.selector: CodeSelector | None = None
        self.relative = 0.0

    @contextmanager
    def asking(self, selector: CodeSelector, relative: float) -> Iterator[None]:
        """Let the quantizers ask ``selector`` meanwhile."""
        self.selector, self.relative = selector, relative
        try:
            yield
        finally:
            self.selector = None


def guide_inputs(trunk: TriModeTrunk) -> Guide | None:
    """Let all quantized inputs of a trunk ask one guide.

    None where no layer quantizes its input.
    """
    guide, count = Guide(), 0
    for name, module in list(trunk.named_modules()):
        quantizer = getattr(module, "quantizer", None)
        if isinstance(quantizer, InputQuantizer) and (
            quantizer.is_rounded or quantizer.scale is not None
        ):
            module.quantizer = GuidedQuantizer(name, quantizer, guide)
            count += 1
    return guide if count else None


class DitheredSession(TorchSession):
    """Runs the trunk and rounds each input at random.

    Each is moved up to ``relative``, or half a step, whichever is nearer.

    Args:
        trunk: Trunk whose quantizers ask ``guide``.
        guide: Guide of the trunk.
        relative: Largest error of an input, over the largest of its layer.
        seed: Seed of the draw.
    """

    def __init__(self, trunk: TriModeTrunk, guide: Guide, relative: float, seed: int) -> None:
        super().__init__(trunk)
        self._guide, self._relative = guide, relative
        self._generator = torch.Generator(trunk.diffusion_head.weight.device).manual_seed(seed)

    def forward(
        self,
        graph_name: GraphName,
        cache: TorchCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
        input_length: int | None = None,
    ) -> tuple[Array, ...]:
        """Run one forward, perturbed."""
        with self._guide.asking(self, self._relative):
            return super().forward(
                graph_name, cache, input_ids, past_length, drafter_scale, input_length
            )

    def choose(
        self,
        layer: str,  # noqa: ARG002  (the protocol's)
        dtype: DType,
        steps: Tensor,
        reach: Tensor | float,
    ) -> Tensor:
        """Draw a code within reach of each value."""
        farthest = torch.minimum(
            _spacing(steps, dtype) / 2,
            torch.as_tensor(reach, dtype=steps.dtype, device=steps.device),
        )
        drawn = torch.rand(steps.shape, generator=self._generator, device=steps.device) * 2 - 1
        return _nearest(steps + drawn * farthest, dtype)


@dataclass
class GraphCodes:
    """Gives the reference the codes that a graph has chosen.

    Attributes:
        codes: Codes by layer, ``(rows, ...)``, of one sequence; or of its last rows only, where the
            graph computes no others. Rows before these take the nearest codes.
        num_other: Number of codes that are not the nearest to the reference's value.
        refused: Number of codes out of the bound's reach, by layer.
    """

    codes: Mapping[str, NDArray[Any]]
    num_compared: int = 0
    num_other: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def choose(self, layer: str, dtype: DType, steps: Tensor, reach: Tensor | float) -> Tensor:
        """Take the graph's codes, and count those that are out of reach."""
        if layer not in self.codes:  # the graph does not quantize this input
            self.refused[layer] = self.refused.get(layer, 0) + steps.numel()
            return _nearest(steps, dtype)
        chosen = torch.from_numpy(np.ascontiguousarray(self.codes[layer], np.float32)).to(
            steps.device
        )
        reach = torch.as_tensor(reach, dtype=steps.dtype, device=steps.device).expand(steps.shape)
        shape, (steps, reach) = (
            steps.shape,
            (of_rows.reshape(-1, *chosen.shape[1:]) for of_rows in (steps, reach)),
        )
        count = len(steps) - len(chosen)
        before, steps, reach = steps[:count], steps[count:], reach[count:]
        # Rounding is monotone: a code between those of both ends is that of some value between
        # them. NaN is none.
        is_open = (chosen >= _nearest(steps - reach, dtype)) & (
            chosen <= _nearest(steps + reach, dtype)
        )
        self.num_compared += chosen.numel()
        self.num_other += int((chosen != _nearest(steps, dtype)).sum())
        if num_refused := int((~is_open).sum()):
            self.refused[layer] = self.refused.get(layer, 0) + num_refused
        return torch.cat((_nearest(before, dtype), chosen)).reshape(shape)

    def add_to(self, record: CodesRecord | None) -> CodesRecord:
        """The record of these codes and of those before."""
        before = record or CodesRecord(num_compared=0, num_other=0, refused={}, passed=True)
        refused = {
            name: self.refused.get(name, 0) + before.refused.get(name, 0)
            for name in {**before.refused, **self.refused}
        }
        return CodesRecord(
            num_compared=before.num_compared + self.num_compared,
            num_other=before.num_other + self.num_other,
            refused=refused,
            passed=not refused,
        )


def _nearest(steps: Tensor, dtype: DType) -> Tensor:
    return nearest_code(torch.clamp(steps, *CODE_RANGES[dtype]), dtype)


def _spacing(steps: Tensor, dtype: DType) -> Tensor:
    """Distance of neighbouring codes at each value.

    It is 1; for E2M1 0.5 to 2; for E4M3 an eighth of the power of two below the value, and at least
    2**-9.
    """
    if dtype == "int8":
        return torch.ones_like(steps)
    if dtype == "float4e2m1":
        return spacing_of_e2m1(steps)
    _, exponent = torch.frexp(torch.clamp(steps.abs(), min=2.0**-6))
    return torch.ldexp(torch.ones_like(steps), exponent - 4)

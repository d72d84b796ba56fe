"""Quantizes one weight to NVFP4 on its way into the pack.

It works as :class:`.integer_stream.WeightStream`, but there are two scales, and neither is of the
compute type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from trimode.compiler.pack.integer_stream import about, check_range, whole_rows
from trimode.formats.contract import DType
from trimode.graphs.numerics.integers import Floats, largest_magnitudes, round_to, scale_of
from trimode.graphs.numerics.nvfp4 import BLOCK_SIZE, encode
from trimode.graphs.numerics.scales import LayerScales


class Nvfp4Stream:
    """Quantizes one weight to NVFP4, row by row.

    Args:
        layer: Name of the layer without ``.weight``, for messages.
        shape: ``(out, in)``.
        read: Function that yields the weight's bytes as float32.
        look: Function that yields them once more, beforehand. It is called only where the largest
            magnitude is not known, since every number depends on it.
        scales: Scales that are known beforehand.
        stored: The type of what is not quantized, which graphs compute in.
    """

    def __init__(
        self,
        layer: str,
        shape: tuple[int, ...],
        read: Callable[[], Iterator[bytes]],
        look: Callable[[], Iterator[bytes]],
        scales: LayerScales,
        stored: DType = "float32",
    ) -> None:
        self._layer, self._shape, self._read, self._look, self._given = (
            layer,
            shape,
            read,
            look,
            scales,
        )
        self._stored = stored
        self._global: Floats | None = None
        self._found: list[bytes] = []

    @property
    def scales(self) -> dict[str, tuple[DType, tuple[int, ...]]]:
        """Types and shapes of the weight's scales, by ends of names."""
        rows, columns = self._shape
        found: dict[str, tuple[DType, tuple[int, ...]]] = {
            "weight_scale": ("float8e4m3fn", (rows, columns // BLOCK_SIZE)),
            "weight_scale_2": ("float32", ()),
        }
        return found | ({"input_scale": ("float32", ())} if self._given.input is not None else {})

    def weight(self) -> Iterator[bytes]:
        """Yield the quantized weight.

        Raises:
            BuildError: a weight is not a number, or the largest is infinite, or becomes so in the
                type that graphs compute in.
        """
        self._found = []
        with about(self._layer):
            self._global = self._global_scale()
            check_range(self._global, "nvfp4", self._stored)
            for values in whole_rows(self._read(), self._shape[1]):
                codes, scales = encode(values, self._global)
                self._found.append(scales.tobytes())
                yield codes.tobytes()

    def scale(self, kind: str) -> Iterator[bytes]:
        """Yield the scales of one kind, once the weight has been read.

        Those of the blocks can be had once: they are let go.
        """
        if kind == "weight_scale":
            yield from self._found
            self._found = []
            return
        wanted = self._global if kind == "weight_scale_2" else self._given.input
        assert wanted is not None
        yield round_to(wanted, "float32").tobytes()

    def _global_scale(self) -> Floats:
        if self._given.weight is not None:
            return round_to(self._given.weight, "float32")
        largest = [
            largest_magnitudes(values, "nvfp4", None)
            for values in whole_rows(self._look(), self._shape[1])
        ]
        return scale_of(np.asarray(np.max(largest), np.float32), "nvfp4", "float32")

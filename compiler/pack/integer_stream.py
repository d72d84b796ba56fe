"""Quantizes one weight on its way into the pack.

It is read in pieces and quantized row by row, so that memory does not follow its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from trimode.errors import BuildError
from trimode.formats.calibration import QuantizedPrecision
from trimode.formats.contract import DType
from trimode.formats.finite import first_not_finite
from trimode.graphs.numerics.integers import (
    FORMATS,
    Floats,
    bytes_of,
    largest_magnitudes,
    quantize,
    round_to,
    scale_of,
)
from trimode.graphs.numerics.scales import LayerScales

_FIRST_INFINITE_FP16 = 65520.0
"""What is nearer to 65536 than to 65504 is infinite in fp16."""


class WeightStream:
    """Quantizes one weight, row by row.

    Args:
        layer: Name of the layer without ``.weight``, for messages.
        shape: ``(out, in)``.
        read: Function that yields the weight's bytes as float32.
        scales: Scales that are known beforehand.
        precision: The type of the weight.
        stored: The type of the scales.
    """

    def __init__(
        self,
        layer: str,
        shape: tuple[int, ...],
        read: Callable[[], Iterator[bytes]],
        *,
        scales: LayerScales,
        precision: QuantizedPrecision,
        stored: DType,
    ) -> None:
        self._layer, self._shape, self._read, self._given = layer, shape, read, scales
        self._precision, self._stored = precision, stored
        self._found: list[bytes] = []

    @property
    def scales(self) -> dict[str, tuple[DType, tuple[int, ...]]]:
        """Types and shapes of the weight's scales, by ends of names."""
        rows, columns = self._shape
        given = self._given
        shape = (rows, columns // given.block_size) if given.block_size else (rows,)
        shapes = {"weight_scale": shape if given.weight is None else given.weight.shape}
        if given.pre_quant is not None:
            shapes["pre_quant_scale"] = given.pre_quant.shape
        if given.input is not None:
            shapes["input_scale"] = ()
        return {kind: (self._stored, shape) for kind, shape in shapes.items()}

    def weight(self) -> Iterator[bytes]:
        """Yield the quantized weight.

        Raises:
            BuildError: a weight is not finite, or a scale or what it stands for does not fit its
                type.
        """
        self._found = []
        with about(self._layer):
            divisor, scale = self._rounded(self._given.pre_quant), self._rounded(self._given.weight)
            row = 0
            for values in whole_rows(self._read(), self._shape[1]):
                divided = values if divisor is None else _divided(values, divisor)
                yield self._quantized(divided, scale, row)
                row += values.shape[0]

    def scale(self, kind: str) -> Iterator[bytes]:
        """Yield the scales of one kind; the weight must have been read.

        Raises:
            BuildError: a scale does not fit its type.
        """
        with about(self._layer):
            yield from self._scale(kind)

    def _scale(self, kind: str) -> Iterator[bytes]:
        given = {
            "weight_scale": self._given.weight,
            "input_scale": self._given.input,
            "pre_quant_scale": self._given.pre_quant,
        }
        values = self._rounded(given[kind])
        yield b"".join(self._found) if values is None else bytes_of(values, self._stored)

    def _quantized(self, values: Floats, scale: Floats | None, row: int) -> bytes:
        if scale is None:
            amax = largest_magnitudes(values, self._precision, self._given.block_size)
            scale = scale_of(amax, self._precision, self._stored)
            self._found.append(bytes_of(scale, self._stored))
        elif scale.ndim:
            scale = scale[row : row + values.shape[0]]
        check_range(scale, self._precision, self._stored)
        return quantize(values, scale, self._precision).tobytes()

    def _rounded(self, scales: Floats | None) -> Floats | None:
        return None if scales is None else round_to(scales, self._stored)


@contextmanager
def about(layer: str) -> Iterator[None]:
    """Let a :class:`BuildError` say which layer it is about."""
    try:
        yield
    except BuildError as error:
        raise BuildError(f"{layer}: {error.message}", error.hint) from error


def check_range(scale: Floats, precision: QuantizedPrecision, stored: DType) -> None:
    """Raise :class:`BuildError` where scaled numbers overflow fp16.

    Graphs compute in it, so the largest number that a scale stands for must be finite.
    """
    largest = float(scale.max(initial=0)) * FORMATS[precision].largest
    if stored == "float16" and largest >= _FIRST_INFINITE_FP16:
        hint = "build without a t4, whose graphs compute in fp16, or pass `precision` bf16 or fp32"
        raise BuildError(
            f"expected weights up to 65504, the largest of fp16, found {largest:.6g}", hint
        )


def _divided(values: Floats, divisor: Floats) -> Floats:
    with np.errstate(over="ignore"):  # looked for below
        quotients: Floats = values / divisor
    if first_not_finite(quotients) is not None:
        raise BuildError(
            "expected weights that stay finite when divided by their pre_quant_scale, found others",
            "calibrate this checkpoint again with `trimode calibrate`",
        )
    return quotients


def whole_rows(pieces: Iterator[bytes], columns: int) -> Iterator[Floats]:
    """Regroup the bytes of a float32 matrix into whole rows, ``(rows, columns)`` each."""
    rest = np.empty(0, np.float32)
    for piece in pieces:
        values = np.frombuffer(piece, "<f4")
        if rest.size:
            values = np.concatenate((rest, values))
        whole = values.size // columns * columns
        if whole:
            yield values[:whole].reshape(-1, columns)
        rest = values[whole:].copy()
    assert not rest.size

"""Holds tensors in ONNX Runtime's memory, bound to graphs by address.

The memory is the CPU's or a GPU's.

Numpy has no bfloat16, so such a tensor is moved as float16: the same two bytes. What they mean is
said when it is bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimode.errors import BundleError
from trimode.formats.contract import DType
from trimode.formats.hints import REBUILD
from trimode.runtime.bundle.weights import PrecisionWeights
from trimode.runtime.sessions.base import Array
from trimode.runtime.sessions.ort.library import Device, ort
from trimode.runtime.sessions.prefix import STORAGE

ONNX_TYPES: dict[DType, int] = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}
"""``onnx.TensorProto.DataType``."""

GRAPH_TYPES: dict[str, DType] = {
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}
"""Type of a graph's input, by the name that ONNX Runtime gives it."""


@dataclass(frozen=True)
class Buffer:
    """Holds one tensor.

    Attributes:
        value: OrtValue over the memory.
        array: Same memory on the CPU; None on a GPU.
        first: Index in the value's first dimension at which the tensor begins.
        is_whole: Whether it is all of the value.
    """

    value: Any
    array: Array | None
    dtype: DType
    shape: tuple[int, ...]
    device: Device
    first: int = 0
    is_whole: bool = True

    def part(self, rows: range) -> Buffer:
        """A stretch of the first dimension, in the same memory."""
        if rows == range(self.shape[0]):
            return self
        array = None if self.array is None else self.array[rows.start : rows.stop]
        return replace(
            self,
            array=array,
            shape=(len(rows), *self.shape[1:]),
            first=self.first + rows.start,
            is_whole=False,
        )

    def bind_input(self, binding: Any, name: str) -> None:
        """Let a graph read this memory as ``name``.

        The buffer must outlive the binding.
        """
        if self._is_value:
            binding.bind_ortvalue_input(name, self.value)
        else:
            binding.bind_input(
                name, self.device, 0, ONNX_TYPES[self.dtype], self.shape, self._address
            )

    def bind_output(self, binding: Any, name: str) -> None:
        """Let a graph write ``name`` into this memory.

        The buffer must outlive the binding.
        """
        if self._is_value:
            binding.bind_ortvalue_output(name, self.value)
        else:
            binding.bind_output(
                name, self.device, 0, ONNX_TYPES[self.dtype], self.shape, self._address
            )

    def numpy(self) -> Array:
        """Return the values in host memory, bfloat16 as float16.

        On the CPU this is the memory itself, on a GPU a copy.
        """
        if self.array is not None:
            return self.array
        whole: Array = self.value.numpy()
        return whole[self.first : self.first + self.shape[0]] if self.shape else whole

    @property
    def _is_value(self) -> bool:
        """Whether it is bound as a value, not by its address.

        It must be all of an OrtValue on the CPU, under its own type. Binding that takes a fraction
        of the time that an address takes.
        """
        return self.device == "cpu" and self.dtype != "bfloat16" and self.is_whole

    @property
    def _address(self) -> int:
        row_bytes = math.prod(self.shape[1:]) * np.dtype(STORAGE[self.dtype]).itemsize
        return int(self.value.data_ptr()) + self.first * row_bytes


def zeros(shape: tuple[int, ...], dtype: DType, device: Device) -> Buffer:
    """A buffer of zeros."""
    return place(np.zeros(shape, STORAGE[dtype]), dtype, device)


def place(array: Array, dtype: DType, device: Device) -> Buffer:
    """Return a buffer with the values of ``array``.

    On the CPU it is the array's own memory, where that is contiguous and aligned. On a GPU it is a
    copy.
    """
    array = np.require(array, STORAGE[dtype], ["C_CONTIGUOUS", "ALIGNED"])
    value = ort.OrtValue.ortvalue_from_numpy(array, device, 0)
    return Buffer(value, array if device == "cpu" else None, dtype, array.shape, device)


def place_weights(
    pack: PrecisionWeights, graphs: Iterable[Mapping[str, Any]], device: Device
) -> dict[str, Buffer]:
    """Return one buffer for every tensor of the pack that graphs read.

    What the pack stores narrower than a graph reads it is widened.

    Args:
        pack: Weights of the precision.
        graphs: Weight inputs of each graph by name, as ``InferenceSession.get_inputs`` describes
            them.
        device: Device to put them on.

    Raises:
        BundleError: a graph reads a tensor that is not in the pack, or has another shape or type
            there.
    """
    placed: dict[str, Buffer] = {}
    for graph in graphs:
        for name, declared in graph.items():
            dtype = GRAPH_TYPES.get(declared.type)
            if name not in placed and dtype is not None and name in pack.entries:
                placed[name] = _place_weight(pack, name, dtype, device)
            found = placed.get(name)
            if found is None or found.dtype != dtype or found.shape != tuple(declared.shape):
                held = f"{found.dtype} {found.shape}" if found else "none"
                raise BundleError(
                    f"{name}: expected {declared.type} of shape {tuple(declared.shape)} "
                    f"in the weight pack, found {held}",
                    REBUILD,
                )
    return placed


def _place_weight(pack: PrecisionWeights, name: str, dtype: DType, device: Device) -> Buffer:
    entry = pack.entries[name]
    if dtype == "float32":
        return place(pack.widened(name), dtype, device)
    raw = pack.raw(name).view(STORAGE[entry.dtype]).reshape(entry.shape)
    return place(raw, entry.dtype, device)

"""Keeps keys and values in ONNX Runtime's memory.

Graphs are bound to rows of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from trimode.formats.contract import (
    DType,
    GraphContract,
    GraphName,
    ModelInfo,
    TensorSpec,
    cache_specs,
)
from trimode.runtime.sessions.base import Array, BatchCache, DeviceArray, bucket
from trimode.runtime.sessions.ort.library import Device
from trimode.runtime.sessions.ort.memory import Buffer, place, zeros
from trimode.runtime.sessions.prefix import (
    SlotFormat,
    beyond_target,
    check_same_session,
    check_slots,
)


class OrtCache:
    """Holds keys and values as one buffer each per layer.

    Grows by copying into buffers of the next bucket.

    Args:
        model: Facts of the model, for the sizes.
        dtype: Type of keys and values.
        device: Device that they are on.
        fixed_capacity: Only capacity that the graphs accept; None = any.
        num_rows: Number of texts. On the CPU, rows that nobody has written yet take no memory until
            the buffers grow.

    Attributes:
        slots: Format of a slot of a row.
        bytes_per_token: Bytes of one slot of a row, in all layers together.
        bound: Graphs over neighbouring rows and a number of tokens.
        io: Inputs and outputs of the graphs, for all rows; graphs over some of them share it.
    """

    def __init__(
        self,
        model: ModelInfo,
        dtype: DType = "float32",
        device: Device = "cpu",
        fixed_capacity: int | None = None,
        num_rows: int = 1,
    ) -> None:
        self._model, self._dtype, self._fixed = model, dtype, fixed_capacity
        self.device: Device = device
        self.num_rows = num_rows
        self.slots = SlotFormat.of(model, dtype)
        self._kind = (self.slots, device)
        self.bytes_per_token = self.slots.bytes_per_token
        self._names = [
            spec.name.removeprefix("past_key_values")
            for spec in cache_specs(model, "past_key_values")
        ]
        self.values: dict[str, Buffer] = {}
        self.bound: dict[tuple[GraphName, range, int], BoundGraph] = {}
        self.io: dict[tuple[GraphName, int], GraphBuffers] = {}
        self.capacity = 0

    def reserve(self, length: int) -> None:
        if length <= self.capacity:
            return
        capacity = capacity_for(length, self._fixed)
        self.bound.clear()
        self.capacity = capacity
        # One after the other, so that never more than one buffer exists twice.
        for name in self._names:
            self.values[name] = self._grown(self.values.get(name))

    def move(self, source: int, destination: int, length: int | None = None) -> None:
        self.copy_prefix(source, destination, self.capacity if length is None else length)

    def copy_prefix(self, source: int, destination: int, length: int) -> None:
        self.copy_from(self, source, destination, length)

    def copy_from(self, other: BatchCache, source: int, destination: int, length: int) -> None:
        theirs = cast("OrtCache", other)
        check_same_session(self._kind, getattr(other, "_kind", None))
        check_slots(self, destination, 0, length)
        check_slots(theirs, source, 0, length)
        if length:
            self._write(destination, 0, theirs.read(source, 0, length))

    def export_prefix(self, row: int, start: int, length: int) -> list[Array]:
        check_slots(self, row, start, length)
        if not length:
            return list(self.slots.empty(0))
        return [values.copy() for values in self.read(row, start, length)]

    def import_prefix(self, row: int, start: int, arrays: Sequence[Array]) -> None:
        length = self.slots.length_of(arrays)
        check_slots(self, row, start, length)
        if length:
            self._write(row, start, arrays)

    def read(self, row: int, start: int, length: int) -> Iterator[Array]:
        """Yield a row's slots in each tensor, ``(heads, length, head size)``.

        On the CPU they are views.
        """
        for buffer in self.values.values():
            yield buffer.numpy()[row, :, start : start + length]

    def _write(self, row: int, start: int, arrays: Iterable[Array]) -> None:
        if self.device != "cpu":
            self.bound.clear()
        # the arrays may be read from these very buffers, one after the other
        for (name, buffer), new in zip(list(self.values.items()), arrays, strict=True):
            values = buffer.numpy()  # on a GPU a copy, as where it grows
            values[row, :, start : start + new.shape[1]] = new
            if self.device != "cpu":
                self.values[name] = place(values, self._dtype, self.device)

    def _grown(self, old: Buffer | None) -> Buffer:
        new = zeros(
            (self.num_rows, self._model.num_key_value_heads, self.capacity, self._model.head_dim),
            self._dtype,
            self.device,
        )
        if old is None:
            return new
        # on a GPU the copy goes through the host: rare, and ONNX Runtime copies whole tensors only
        grown = new.numpy()
        grown[:, :, : old.shape[2]] = old.numpy()
        return place(grown, self._dtype, self.device)


def capacity_for(length: int, fixed: int | None) -> int:
    """Smallest capacity of a cache that holds ``length`` slots.

    Raises:
        UsageError: the graphs fix the capacity, and it is smaller.
    """
    if fixed is not None and length > fixed:
        raise beyond_target(fixed, length)
    return fixed or bucket(length)


class GraphBuffers:
    """Holds the inputs and outputs of a graph.

    They are for a number of rows and of tokens a row.
    """

    def __init__(
        self, contract: GraphContract, num_rows: int, num_tokens: int, device: Device
    ) -> None:
        sizes = {"batch": num_rows, "rows": num_tokens}
        self.inputs = {spec.name: _array(spec, sizes) for spec in contract.inputs}
        self.outputs = {
            spec.name: zeros(_shape(spec, sizes), spec.dtype, _output_device(spec, device))
            for spec in contract.outputs
        }


class BoundGraph:
    """Binds one graph to neighbouring rows of one cache.

    A step writes the inputs in place, binds them and runs.

    Args:
        session: Inference session of the graph.
        cache: Cache of one text, or of a batch.
        rows: Texts of the cache that run.
        io: Inputs and outputs for at least as many rows; the first of them are used.
        weights: Further inputs that the graph takes, by name.
    """

    def __init__(
        self,
        session: Any,
        cache: OrtCache,
        rows: range,
        io: GraphBuffers,
        weights: Mapping[str, Buffer],
    ) -> None:
        self.binding = session.io_binding()
        first = range(len(rows))
        self._weights = dict(weights)  # kept alive, as all of it: the binding knows addresses only
        self._cache = {name: buffer.part(rows) for name, buffer in cache.values.items()}
        self._inputs = {
            name: array[: len(rows)] if array.ndim else array for name, array in io.inputs.items()
        }
        self._buffers = tuple(buffer.part(first) for buffer in io.outputs.values())
        for name, buffer in zip(io.outputs, self._buffers, strict=True):
            buffer.bind_output(self.binding, name)
        for name, buffer in self._weights.items():
            buffer.bind_input(self.binding, name)
        for name, buffer in self._cache.items():
            # The same memory as past and present: TensorScatter then writes the new rows and copies
            # nothing.
            buffer.bind_input(self.binding, f"past_key_values{name}")
            buffer.bind_output(self.binding, f"present{name}")
        self.bind_inputs()
        self.input_ids, self.past_length = self._inputs["input_ids"], self._inputs["past_length"]
        self.input_length, self.drafter_scale = (
            self._inputs.get("input_length"),
            self._inputs.get("drafter_scale"),
        )
        self.outputs = tuple(_as_array(buffer) for buffer in self._buffers)

    def bind_inputs(self) -> None:
        """Tell the graph the inputs' values.

        Where it runs on a GPU, binding an array copies it there.
        """
        for name, array in self._inputs.items():
            self.binding.bind_cpu_input(name, array)


def _shape(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)


def _array(spec: TensorSpec, sizes: dict[str, int]) -> Array:
    return np.zeros(_shape(spec, sizes), np.dtype(spec.dtype))


def _output_device(spec: TensorSpec, device: Device) -> Device:
    """Return where an output is kept.

    Logits are large and seldom read: they stay where they are computed. All else is small.
    """
    return device if spec.name == "logits" else "cpu"


def _as_array(buffer: Buffer) -> Any:
    if buffer.device == "cpu":
        return buffer.numpy()
    return DeviceArray(buffer.shape, np.dtype(buffer.dtype), buffer.numpy)

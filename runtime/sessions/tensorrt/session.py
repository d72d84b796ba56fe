"""TensorRT and TensorRT-RTX behind :class:`trimode.runtime.sessions.base.Session`.

The weights are uploaded once and bound by address to all engines; keys and values are updated in
place; a step copies token ids to the GPU and ids, probabilities and counts back, and nothing else.
Everything that needs no GPU is checked before the first call to one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np

from trimode.formats.contract import GRAPH_NAMES, GraphName, slots_written
from trimode.formats.manifest import TargetRecord
from trimode.formats.safetensors import SAFETENSORS_NAMES, to_float32
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.sessions.base import Array, Closable, DeviceArray, Ids, KVCache
from trimode.runtime.sessions.gpu import find_gpu
from trimode.runtime.sessions.tensorrt.cache import Lease, MemoryPool, TensorRTCache
from trimode.runtime.sessions.tensorrt.engines import LoadedEngines, load_graphs
from trimode.runtime.sessions.tensorrt.joint import joint_outputs, joint_values
from trimode.runtime.sessions.tensorrt.library import EngineLibrary
from trimode.runtime.sessions.tensorrt.memory import (
    DeviceMemory,
    PinnedMemory,
    Stream,
    upload,
)
from trimode.runtime.sessions.tensorrt.plan import (
    DEVICE_OUTPUTS,
    IoLayout,
    check_memory,
    lay_out,
    max_batch,
    max_rows,
    tensor_bytes,
    tensor_shape,
)
from trimode.runtime.sessions.tensorrt.target import check_block_length, check_gpu, prepare


class TensorRTSession(Closable):
    """Runs engines over one upload of the weights.

    One forward runs at a time; threads wait for each other.

    ``rows`` are those of a graph, the tokens of a sequence; the rows of a batch are called
    sequences here.

    Args:
        bundle: Opened bundle, whose chosen precision runs.
        target: Target that was built for this GPU.
        runtime_cache: Folder where kernels that TensorRT-RTX compiles while running are kept from
            one process to the next; written by :meth:`close`. None = compile them anew.

    Raises:
        DependencyError: the library is not installed.
        BundleError: the library has another version, or a file is damaged.
        DeviceError: no GPU, another one than the target's, or one that is too small.
    """

    free_tokens = 64

    def __init__(
        self, bundle: Bundle, target: TargetRecord, *, runtime_cache: Path | None = None
    ) -> None:
        prepared = prepare(bundle, target)
        check_memory(prepared.memory, check_gpu(target, find_gpu()))
        self._target, self._prepared, model = target, prepared, bundle.manifest.model
        self._stream = Stream()
        library = EngineLibrary(prepared.trt)
        self._graphs = {
            one.capacity: load_graphs(library, prepared, one, model, runtime_cache)
            for one in prepared.capacities
        }
        self._weights, addresses = self._upload_weights()
        self._engines = {
            one.capacity: LoadedEngines(
                self._graphs[one.capacity], one.graphs, model, addresses, self._stream
            )
            for one in prepared.capacities
        }
        self._engines[prepared.capacities[0].capacity].warm_up()
        layouts = [io for one in prepared.capacities for io in one.io.values()]
        self._pinned = PinnedMemory(max(io.copied_end for io in layouts))
        self._pool = MemoryPool(prepared.capacities, prepared.slots, self._stream)
        self._lock = self._pool.lock

    @property
    def max_prefill_rows(self) -> int:
        return max_rows(self._target.graphs["ar"])

    @property
    def max_batch(self) -> int:
        return max_batch(self._target.graphs.values())

    def check_block_length(
        self, block_length: int, graph_names: tuple[GraphName, ...] = GRAPH_NAMES
    ) -> None:
        check_block_length(self._target, block_length, graph_names)

    def new_cache(self) -> TensorRTCache:
        """Return a cache in memory that nobody uses any more, or new."""
        return self.new_batch_cache(1)

    def new_batch_cache(self, num_rows: int) -> TensorRTCache:
        """Return a cache in memory of as many sequences, unused or new."""
        return TensorRTCache(self._pool, num_rows)

    def capacity_for(self, length: int) -> int:
        return self._pool.engines_for(length).capacity

    def run(
        self,
        graph_name: GraphName,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        rows = input_ids.shape[1]
        cache.reserve(past_length + slots_written(graph_name, rows))
        values = {
            "input_ids": input_ids,
            "past_length": past_length,
            "input_length": rows,
            "drafter_scale": drafter_scale,
        }
        return self._run(graph_name, cast("TensorRTCache", cache).lease, range(1), rows, values)

    def run_rows(
        self,
        graph_name: GraphName,
        cache: KVCache,
        rows: range,
        input_ids: Ids,
        past_length: Ids,
        input_length: Ids,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        values = {
            "input_ids": input_ids,
            "past_length": past_length,
            "input_length": input_length,
            "drafter_scale": drafter_scale,
        }
        return self._run(
            graph_name, cast("TensorRTCache", cache).lease, rows, input_ids.shape[1], values
        )

    def _run(
        self,
        graph_name: GraphName,
        lease: Lease,
        sequences: range,
        rows: int,
        values: dict[str, Any],
    ) -> tuple[Array, ...]:
        self.check_open()
        memory, batch = lease.memory, len(sequences)
        io, engines = memory.layouts[graph_name], self._engines[memory.capacity]
        is_joint, place = self._target.is_joint(graph_name), engines.place(graph_name)
        values = joint_values(graph_name, values) if is_joint else values
        profile = engines.choose_profile(graph_name, rows, batch)
        with self._lock:
            self.check_open()  # again: another thread may have closed it meanwhile
            # a batch's; nothing is on its way between two forwards
            if io.copied_end > self._pinned.bytes.size:
                self._pinned.close()
                self._pinned = PinnedMemory(io.copied_end)
            write_inputs(io, self._pinned.bytes, values)
            address, returned = memory.io(place).address, io.copied_end - io.inputs_end
            self._stream.copy_in(address, self._pinned.address, io.inputs_end)
            engines.forward(graph_name, memory, sequences, profile, rows)
            self._stream.copy_out(
                self._pinned.address + io.inputs_end, address + io.inputs_end, returned
            )
            self._stream.synchronize()
            copied = read_outputs(io, self._pinned.bytes, rows, batch)
        kept = {
            spec.name: self._on_device(graph_name, lease, spec.name, rows, batch)
            for spec in io.contract.outputs
            if spec.name not in copied
        }
        if is_joint:
            return joint_outputs(graph_name, values, copied, kept["logits"])
        return tuple({**copied, **kept}[spec.name] for spec in io.contract.outputs)

    def close(self) -> None:
        """Save compiled kernels where they are kept, and free the GPU's memory."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            for graphs in self._graphs.values():
                for graph in set(graphs.values()):
                    graph.save_kernels()
            self._engines.clear()
            self._graphs.clear()
            self._pool.close()
            self._weights.close()
            self._pinned.close()
            self._stream.close()

    def _upload_weights(self) -> tuple[DeviceMemory, dict[str, int]]:
        loaded = (graph for graphs in self._graphs.values() for graph in graphs.values())
        names = sorted({name for graph in loaded for name in graph.bindings.weights})
        layout = lay_out({name: self._prepared.weights.entries[name].num_bytes for name in names})
        memory = DeviceMemory(layout.num_bytes, "the weights")
        upload(self._prepared.weights, layout.offsets, memory, self._stream)
        return memory, {name: memory.address + offset for name, offset in layout.offsets.items()}

    def _on_device(
        self, graph_name: GraphName, lease: Lease, name: str, rows: int, batch: int
    ) -> Any:
        # the output keeps the lease: nobody else writes there as long as it may be read
        io, place = (
            lease.memory.layouts[graph_name],
            self._engines[lease.memory.capacity].place(graph_name),
        )
        spec = next(spec for spec in io.contract.outputs if spec.name == name)
        shape = tensor_shape(spec, rows, batch)
        item_bytes = tensor_bytes(spec, rows, batch) // math.prod(shape)

        def fetch(*index: int) -> Array:
            part = shape[len(index) :]
            first = sum(i * math.prod(shape[axis + 1 :]) for axis, i in enumerate(index))
            raw = np.empty(math.prod(part) * item_bytes, np.uint8)
            address = lease.memory.io(place).address + io.layout.offsets[name] + first * item_bytes
            with self._lock:
                self.check_open()
                self._stream.copy_out(raw.ctypes.data, address, raw.nbytes)
                self._stream.synchronize()
            return to_float32(raw, SAFETENSORS_NAMES[spec.dtype]).reshape(part)

        return DeviceArray(shape, np.float32, fetch, fetch)


def write_inputs(io: IoLayout, memory: Any, values: dict[str, Any]) -> None:
    """Write the inputs of a forward into host memory.

    The memory is laid out like a sequence's.
    """
    for spec in io.contract.inputs:
        data = (
            np.ascontiguousarray(values[spec.name], np.dtype(spec.dtype)).reshape(-1).view(np.uint8)
        )
        begin = io.layout.offsets[spec.name]
        memory[begin : begin + data.size] = data


def read_outputs(io: IoLayout, memory: Any, rows: int, batch: int = 1) -> dict[str, Array]:
    """Return copies of the outputs that a forward left in host memory.

    It was one of ``batch`` sequences of ``rows`` rows.
    """
    outputs = {}
    for spec in io.contract.outputs:
        if spec.name not in DEVICE_OUTPUTS:
            begin = io.layout.offsets[spec.name]
            data = memory[begin : begin + tensor_bytes(spec, rows, batch)].copy()
            outputs[spec.name] = data.view(np.dtype(spec.dtype)).reshape(
                tensor_shape(spec, rows, batch)
            )
    return outputs

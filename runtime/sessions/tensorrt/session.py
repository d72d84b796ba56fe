"""TensorRT and TensorRT-RTX behind :class:`trimode.runtime.sessions.base.Session`.

The weights are uploaded once and bound by address to all engines; keys and values are updated in
place; a step copies token ids to the GPU and ids, probabilities and counts back, and nothing else.
Everything that needs no GPU is checked before the first call to one.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import numpy as np

from trimode.errors import DeviceError
from trimode.formats.contract import ROLES, Role, slots_written
from trimode.formats.manifest import TargetRecord
from trimode.formats.safetensors import SAFETENSORS_NAMES, to_float32
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.sessions.base import Array, Closable, DeviceArray, Ids, KVCache
from trimode.runtime.sessions.gpu import find_gpu
from trimode.runtime.sessions.tensorrt.cache import (
    Launchable,
    MemoryPool,
    RecordedForward,
    SequenceMemory,
    TensorRTCache,
)
from trimode.runtime.sessions.tensorrt.graph import LoadedGraph, Runner
from trimode.runtime.sessions.tensorrt.joint import joint_outputs, joint_values
from trimode.runtime.sessions.tensorrt.library import EngineLibrary
from trimode.runtime.sessions.tensorrt.memory import (
    DeviceMemory,
    PinnedMemory,
    RecordedWork,
    Stream,
    upload,
)
from trimode.runtime.sessions.tensorrt.plan import (
    DEVICE_OUTPUTS,
    IoLayout,
    check_memory,
    choose_profile,
    lay_out,
    max_batch,
    max_rows,
    recurs,
    tensor_bytes,
    tensor_shape,
)
from trimode.runtime.sessions.tensorrt.target import check_block_length, check_gpu, prepare

logger = logging.getLogger("trimode.runtime")


class TensorRTSession(Closable):
    """Engines over one upload of the weights.

    One forward runs at a time; threads wait for each other.

    ``rows`` are those of a graph, the tokens of a sequence; the rows of a batch are called
    sequences here.

    Args:
        bundle: an opened bundle, whose chosen precision runs.
        target: what was built for this GPU.
        runtime_cache: folder where kernels that TensorRT-RTX compiles while running are kept from
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
        self._target, self._prepared, self._model = target, prepared, bundle.manifest.model
        self._stream = Stream()
        library = EngineLibrary(prepared.trt)
        self._graphs = self._load(library, runtime_cache)
        self._weights, self._addresses = self._upload_weights()
        runners = {
            graph.role: Runner(graph, graph.new_context(), self._addresses, self._stream)
            for graph in dict.fromkeys(self._graphs.values())
        }
        self._runners = {role: runners[graph.role] for role, graph in self._graphs.items()}
        self._pinned = PinnedMemory(max(io.copied_end for io in prepared.io.values()))
        self._pool = MemoryPool(prepared, self._stream)
        self._lock = self._pool.lock

    @property
    def max_prefill_rows(self) -> int:
        """See :class:`trimode.runtime.sessions.base.Session`."""
        return max_rows(self._target.graphs["ar"])

    @property
    def max_batch(self) -> int:
        """See :class:`trimode.runtime.sessions.base.BatchSession`."""
        return max_batch(self._target.graphs.values())

    def check_block_length(self, block_length: int, roles: tuple[Role, ...] = ROLES) -> None:
        """See :class:`trimode.runtime.sessions.base.Session`."""
        check_block_length(self._target, block_length, roles)

    def new_cache(self) -> TensorRTCache:
        """See :class:`trimode.runtime.sessions.base.Session`. Takes the memory of a sequence that
        nobody uses any more, where there is one.
        """
        return self.new_batch_cache(1)

    def new_batch_cache(self, num_rows: int) -> TensorRTCache:
        """See :class:`trimode.runtime.sessions.base.BatchSession`. Takes the memory of as many
        sequences that nobody uses any more, where there is some.
        """
        return TensorRTCache(self._pool, num_rows)

    def capacity_for(self, length: int) -> int:
        """See :class:`trimode.runtime.sessions.base.BatchSession`."""
        return self._pool.capacity_for(length)

    def run(
        self,
        role: Role,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        """See :class:`trimode.runtime.sessions.base.Session`."""
        rows = input_ids.shape[1]
        cache.reserve(past_length + slots_written(role, rows))
        values = {
            "input_ids": input_ids,
            "past_length": past_length,
            "input_length": rows,
            "drafter_scale": drafter_scale,
        }
        return self._run(role, cast("TensorRTCache", cache).memory, range(1), rows, values)

    def run_rows(
        self,
        role: Role,
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
            role, cast("TensorRTCache", cache).memory, rows, input_ids.shape[1], values
        )

    def _run(
        self,
        role: Role,
        memory: SequenceMemory,
        sequences: range,
        rows: int,
        values: dict[str, Any],
    ) -> tuple[Array, ...]:
        self.check_open()
        profile, batch = (
            choose_profile(self._target.graphs[role], rows, len(sequences)),
            len(sequences),
        )
        graph, is_joint = self._graphs[role], self._target.is_joint(role)
        io, values = memory.layouts[role], joint_values(role, values) if is_joint else values
        with self._lock:
            self.check_open()  # again: another thread may have closed it meanwhile
            # a batch's; nothing is on its way between two forwards
            if io.copied_end > self._pinned.bytes.size:
                self._pinned.close()
                self._pinned = PinnedMemory(io.copied_end)
            write_inputs(io, self._pinned.bytes, values)
            address, returned = memory.io(graph.role).address, io.copied_end - io.inputs_end
            self._stream.copy_in(address, self._pinned.address, io.inputs_end)
            self._forward(role, memory, sequences, profile, rows)
            self._stream.copy_out(
                self._pinned.address + io.inputs_end, address + io.inputs_end, returned
            )
            self._stream.synchronize()
            copied = read_outputs(io, self._pinned.bytes, rows, batch)
        kept = {
            spec.name: self._on_device(role, memory, spec.name, rows, batch)
            for spec in io.contract.outputs
            if spec.name not in copied
        }
        if is_joint:
            return joint_outputs(role, values, copied, kept["logits"])
        return tuple({**copied, **kept}[spec.name] for spec in io.contract.outputs)

    def close(self) -> None:
        """Save compiled kernels where they are kept, and give the GPU's memory back."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            for graph in set(self._graphs.values()):
                graph.save_kernels()
            self._runners.clear()
            self._graphs.clear()
            self._pool.close()
            self._weights.close()
            self._pinned.close()
            self._stream.close()

    def _load(self, library: EngineLibrary, runtime_cache: Path | None) -> dict[Role, LoadedGraph]:
        """The engine of each role; one that is several is loaded once, under the first."""
        prepared, loaded = self._prepared, dict[Path, LoadedGraph]()
        for role, path in prepared.engines.items():
            if path not in loaded:
                loaded[path] = LoadedGraph(
                    library,
                    role,
                    self._target.graphs[role],
                    path,
                    io=prepared.io[role],
                    cache=prepared.cache,
                    model=self._model,
                    pack=prepared.weights.entries,
                    runtime_cache=runtime_cache / f"{role}.kernels" if runtime_cache else None,
                )
        return {role: loaded[path] for role, path in prepared.engines.items()}

    def _upload_weights(self) -> tuple[DeviceMemory, dict[str, int]]:
        names = sorted({name for graph in self._graphs.values() for name in graph.bindings.weights})
        layout = lay_out({name: self._prepared.weights.entries[name].num_bytes for name in names})
        memory = DeviceMemory(layout.num_bytes, "the weights")
        upload(self._prepared.weights, layout.offsets, memory, self._stream)
        return memory, {name: memory.address + offset for name, offset in layout.offsets.items()}

    def _forward(
        self, role: Role, memory: SequenceMemory, sequences: range, profile: int, rows: int
    ) -> None:
        """Queue a forward: as recorded before, or step by step, and then record it where that is
        possible.

        Of a batch, forwards of all its sequences are recorded: there are many ways to take some of
        them, and each would need a context.
        """
        graph, is_whole = self._graphs[role], len(sequences) == memory.batch
        engine = self._target.graphs[role]
        number = engine.first_profile + profile
        recorded = memory.recorded.get((role, rows)) if is_whole else None
        if recorded is not None:
            recorded.launch()
        elif (
            graph.replays_itself
            or not is_whole
            or not recurs(engine.profiles[profile], rows, self._model)
        ):
            runner = self._runners[role]
            runner.prepare(memory, sequences, number, rows)
            runner.launch()
        else:
            # A recorded forward holds only as long as its context is left alone, so it gets one of
            # its own. The first forward on it is executed step by step: it settles what depends on
            # the shapes, which must not be recorded.
            runner = Runner(graph, graph.new_recorded_context(), self._addresses, self._stream)
            runner.prepare(memory, sequences, number, rows)
            runner.launch()
            memory.recorded[role, rows] = self._record(runner)

    def _record(self, runner: Runner) -> Launchable:
        self._stream.synchronize()
        try:
            return RecordedForward(RecordedWork(self._stream, runner.launch), runner)
        except DeviceError as error:
            logger.info("forwards are queued step by step: %s", error.message)
            return runner

    def _on_device(
        self, role: Role, memory: SequenceMemory, name: str, rows: int, batch: int
    ) -> Any:
        io = memory.layouts[role]
        spec = next(spec for spec in io.contract.outputs if spec.name == name)
        shape, row_bytes = tensor_shape(spec, rows, batch), tensor_bytes(spec, rows, batch) // batch

        def fetch(first: int, count: int) -> Array:
            raw = np.empty(count * row_bytes, np.uint8)
            address = (
                memory.io(self._graphs[role].role).address
                + io.layout.offsets[name]
                + first * row_bytes
            )
            with self._lock:
                self.check_open()
                self._stream.copy_out(raw.ctypes.data, address, raw.nbytes)
                self._stream.synchronize()
            return to_float32(raw, SAFETENSORS_NAMES[spec.dtype]).reshape(count, *shape[1:])

        return DeviceArray(shape, np.float32, lambda: fetch(0, batch), lambda row: fetch(row, 1)[0])


def write_inputs(io: IoLayout, memory: Any, values: dict[str, Any]) -> None:
    """Write the inputs of a forward into host memory that is laid out like a sequence's."""
    for spec in io.contract.inputs:
        data = (
            np.ascontiguousarray(values[spec.name], np.dtype(spec.dtype)).reshape(-1).view(np.uint8)
        )
        begin = io.layout.offsets[spec.name]
        memory[begin : begin + data.size] = data


def read_outputs(io: IoLayout, memory: Any, rows: int, batch: int = 1) -> dict[str, Array]:
    """Copies of the outputs that a forward of ``batch`` sequences of ``rows`` rows has left in host
    memory.
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

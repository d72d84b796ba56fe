"""Loads one engine, and runs execution contexts on it.

A context is told only what changed since the last forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from trimode.formats.contract import SCRATCH, DType, GraphName, ModelInfo, TensorSpec
from trimode.formats.manifest import EngineRecord
from trimode.formats.safetensors import PackEntry
from trimode.runtime.sessions.tensorrt.library import (
    EngineLibrary,
    load_runtime_cache,
    save_runtime_cache,
)
from trimode.runtime.sessions.tensorrt.memory import DeviceMemory, Stream
from trimode.runtime.sessions.tensorrt.plan import (
    CacheLayout,
    EngineTensor,
    IoLayout,
    plan_bindings,
    tensor_shape,
)

_DTYPES: dict[str, DType] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "FP8": "float8e4m3fn",
    "INT8": "int8",
    "INT4": "int4",
    "FP4": "float4e2m1",
}


class Places(Protocol):
    """Where the tensors of sequences lie."""

    keys_values: DeviceMemory
    cache: CacheLayout
    layouts: dict[GraphName, IoLayout]

    def io(self, graph_name: GraphName) -> DeviceMemory:
        """Inputs and outputs of a graph, laid out as the graph says."""
        ...


class LoadedGraph:
    """Holds an engine whose tensors have been checked.

    Args:
        library: Library that loads it.
        graph_name: Graph that it is.
        record: File and profiles of the engine.
        path: Engine file.
        io: Inputs and outputs of the engine.
        cache: Type and shape of every cache tensor.
        model: Facts of the model.
        pack: Tensors of the precision.
        runtime_cache: File for compiled kernels; None = not kept.

    Raises:
        BundleError: the library refuses the engine, or its tensors are not as the contract says.
    """

    def __init__(
        self,
        library: EngineLibrary,
        graph_name: GraphName,
        record: EngineRecord,
        path: Path,
        *,
        io: IoLayout,
        cache: TensorSpec,
        model: ModelInfo,
        pack: Mapping[str, PackEntry],
        runtime_cache: Path | None = None,
    ) -> None:
        self.library, self.graph_name, self.record, self.io = library, graph_name, record, io
        self.engine = library.load(path)
        self.bindings = plan_bindings(
            graph_name, read_tensors(library.trt, self.engine), io.contract, model, cache, pack
        )
        self._kernels_path = runtime_cache
        self._config, self._kernels = self._configure()

    @property
    def replays_itself(self) -> bool:
        """Whether the library itself records and replays forwards as CUDA graphs."""
        return hasattr(self.library.trt, "CudaGraphStrategy")

    def new_context(self) -> Any:
        """An execution context that shares the engine.

        Its scratch memory is that of the largest profile.
        """
        if self._config is None:
            return self.library.accept(
                self.engine.create_execution_context(), f"create a context for {self.graph_name}"
            )
        return self.library.accept(
            self.engine.create_execution_context(self._config),
            f"create a context for {self.graph_name}",
        )

    def new_recorded_context(self) -> Any:
        """Return an execution context with scratch memory for one profile only."""
        strategy = self.library.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        return self.library.accept(
            self.engine.create_execution_context(strategy),
            f"create a context for {self.graph_name}",
        )

    def save_kernels(self) -> None:
        """Write the kernels that were compiled while running, where they are kept."""
        if self._kernels is not None and self._kernels_path is not None:
            save_runtime_cache(self._kernels, self._kernels_path)

    def addresses(self, memory: Places, first: int, weights: Mapping[str, int]) -> dict[str, int]:
        """Return where every tensor of the engine lies.

        Past and present of the cache lie in the same place, which updates it there.

        Args:
            memory: Memory of sequences.
            first: First of the sequences that run.
            weights: Address of every tensor of the pack that the engine reads.
        """
        io, offsets = (
            memory.io(self.graph_name).address,
            memory.layouts[self.graph_name].layout.offsets,
        )
        keys_values = memory.keys_values.address + first * memory.cache.sequence_bytes
        named = {
            name: io + offsets[name] for name in (*self.bindings.inputs, *self.bindings.outputs)
        }
        caches = {
            name: keys_values + memory.cache.layout.offsets[tensor]
            for name, tensor in self.bindings.caches.items()
        }
        scratch = dict.fromkeys(self.bindings.scratch, io + offsets[SCRATCH])
        return named | caches | scratch | {name: weights[name] for name in self.bindings.weights}

    def shapes(self, rows: int, batch: int) -> dict[str, tuple[int, ...]]:
        """Return shapes of the inputs that have no fixed one.

        They are for ``batch`` sequences of ``rows`` rows.
        """
        specs = {spec.name: spec for spec in self.io.contract.inputs}
        named = {
            name: tensor_shape(specs[name], rows, batch)
            for name in self.bindings.inputs
            if any(isinstance(d, str) for d in specs[name].shape)
        }
        caches = (name for name in self.bindings.caches if name.startswith("past_key_values"))
        return named | {
            name: (batch, *tuple(self.engine.get_tensor_shape(name))[1:]) for name in caches
        }

    def _configure(self) -> tuple[Any, Any]:
        if not hasattr(self.engine, "create_runtime_config"):
            return None, None
        config = self.engine.create_runtime_config()
        if self.replays_itself:
            config.cuda_graph_strategy = self.library.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config, load_runtime_cache(
            config, self._kernels_path
        ) if self._kernels_path else None


class Runner:
    """Runs one execution context, and knows what it is set to.

    Args:
        graph: Engine that runs.
        context: Context on that engine; nobody else sets it.
        weights: Address of every tensor of the pack that the engine reads.
        stream: Stream that forwards go to.
    """

    def __init__(
        self, graph: LoadedGraph, context: Any, weights: Mapping[str, int], stream: Stream
    ) -> None:
        self._graph, self._context, self._weights, self._stream = graph, context, weights, stream
        self._profile: int | None = None
        self._sizes = (0, 0)
        self._memory: Places | None = None
        self._first = 0

    def prepare(self, memory: Places, sequences: range, profile: int, rows: int) -> None:
        """Choose the profile, the shapes and the memory of the next forwards."""
        context, accept, graph_name = (
            self._context,
            self._graph.library.accept,
            self._graph.graph_name,
        )
        if profile != self._profile:
            accept(
                context.set_optimization_profile_async(profile, self._stream.handle),
                f"choose profile {profile} of {graph_name}",
            )
            self._profile, self._sizes, self._memory = profile, (0, 0), None
        if (rows, len(sequences)) != self._sizes:
            for name, shape in self._graph.shapes(rows, len(sequences)).items():
                accept(
                    context.set_input_shape(name, shape),
                    f"take {name} of shape {shape} in {graph_name}",
                )
            self._sizes = (rows, len(sequences))
        if memory is not self._memory or sequences.start != self._first:
            for name, address in self._graph.addresses(
                memory, sequences.start, self._weights
            ).items():
                accept(context.set_tensor_address(name, address), f"bind {name} of {graph_name}")
            self._memory, self._first = memory, sequences.start

    def launch(self) -> None:
        """Queue a forward."""
        self._graph.library.accept(
            self._context.execute_async_v3(self._stream.handle), f"run {self._graph.graph_name}"
        )


def read_tensors(trt: Any, engine: Any) -> list[EngineTensor]:
    """The inputs and outputs of an engine."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return [_read_tensor(trt, engine, name) for name in names]


def _read_tensor(trt: Any, engine: Any, name: str) -> EngineTensor:
    library_type = engine.get_tensor_dtype(name).name
    dtype = _DTYPES.get(library_type, library_type.lower())
    return EngineTensor(
        name,
        engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
        dtype,
        tuple(engine.get_tensor_shape(name)),
    )

"""The CUDA runtime and TensorRT, acted out in host memory, so that what talks to them can be tested
without a GPU.

Work is queued and runs only when somebody waits; fresh memory is full of NaN; a tensor that is
bound must be aligned; a context from which work was recorded must be left alone. An "engine" is the
magic number and an ONNX graph, which ONNX Runtime runs on the bound addresses.
``test_tensorrt_session`` checks that every function here exists in the real libraries.
"""

# ruff: noqa: N801, N802, N815

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

MAGIC = b"vtrt"
ONNX_TYPES = {
    "tensor(float)": ("FLOAT", 1),
    "tensor(int64)": ("INT64", 7),
    "tensor(float16)": ("HALF", 10),
    "tensor(bfloat16)": ("BF16", 16),
}


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidPitchValue = 12
    cudaErrorStreamCaptureInvalidated = 901


OK = cudaError_t.cudaSuccess


class HostCuda(ModuleType):
    """``cuda.bindings.runtime``; ``live`` holds what was allocated and not freed."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking, cudaHostAllocDefault, cudaEventDisableTiming = 1, 0, 2

    def __init__(self, capability: tuple[int, int] = (8, 9), memory_bytes: int = 1 << 40) -> None:
        super().__init__("cuda.bindings.runtime")
        self.properties = SimpleNamespace(
            name=b"HOST 4090", major=capability[0], minor=capability[1], totalGlobalMem=memory_bytes
        )
        self.live: dict[int, Any] = {}
        self.on_gpu: dict[int, int] = {}
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.refuses_recording = False
        self.num_replayed = 0
        self.largest_copy = 0
        self.num_line_copies = 0
        self._handles = iter(range(1, 1 << 30))

    def cudaGetDeviceCount(self) -> Any:
        return OK, 1

    def cudaGetDeviceProperties(self, _device: int) -> Any:
        return OK, self.properties

    def cudaGetErrorString(self, error: cudaError_t) -> Any:
        return OK, error.name.encode()

    def _allocate(self, num_bytes: int) -> Any:
        memory = np.full(num_bytes + 256, 0xFF, np.uint8)
        address = -(-memory.ctypes.data // 256) * 256
        self.live[address] = memory
        return OK, address

    def _release(self, handle: int) -> Any:
        del self.live[handle]  # twice, or never allocated: KeyError
        return (OK,)

    def cudaMalloc(self, size: int) -> Any:
        if self.num_bytes + size > self.properties.totalGlobalMem:
            return cudaError_t.cudaErrorMemoryAllocation, None
        _, address = self._allocate(size)
        self.on_gpu[address] = size
        return OK, address

    @property
    def num_bytes(self) -> int:
        """Bytes of the GPU that are in use."""
        return sum(size for address, size in self.on_gpu.items() if address in self.live)

    def is_on_gpu(self, address: int) -> bool:
        live = (begin for begin in self.on_gpu if begin in self.live)
        return any(begin <= address < begin + self.on_gpu[begin] for begin in live)

    def cudaHostAlloc(self, size: int, _flags: int) -> Any:
        return self._allocate(size)

    def cudaFree(self, pointer: int) -> Any:
        return self._release(pointer)

    def cudaFreeHost(self, pointer: int) -> Any:
        return self._release(pointer)

    def _enqueue(self, work: Callable[[], None]) -> Any:
        (self.queue if self.recording is None else self.recording).append(work)
        return (OK,)

    def _handle(self, kind: str) -> Any:
        handle = next(self._handles)
        self.live[handle] = kind
        return OK, handle

    def cudaStreamCreateWithFlags(self, _flags: int) -> Any:
        return self._handle("stream")

    def cudaStreamDestroy(self, stream: int) -> Any:
        return self._release(stream)

    def cudaStreamSynchronize(self, _stream: int) -> Any:
        assert self.recording is None
        while self.queue:
            self.queue.pop(0)()
        return (OK,)

    def cudaMemcpyAsync(
        self, destination: int, source: int, count: int, _kind: int, _stream: int
    ) -> Any:
        self.largest_copy = max(self.largest_copy, count)
        return self._enqueue(lambda: ctypes.memmove(destination, source, count) and None)

    def cudaMemcpy2DAsync(
        self,
        dst: int,
        dpitch: int,
        src: int,
        spitch: int,
        width: int,
        height: int,
        kind: int,
        _stream: int,
    ) -> Any:
        if width > min(dpitch, spitch):
            return cudaError_t.cudaErrorInvalidPitchValue, None
        places = (self.is_on_gpu(src), self.is_on_gpu(dst))
        assert kind == {(False, True): 1, (True, False): 2, (True, True): 3}[places]
        self.num_line_copies += 1

        def copy() -> None:
            for line in range(height):
                ctypes.memmove(dst + line * dpitch, src + line * spitch, width)

        return self._enqueue(copy)

    def cudaMemsetAsync(self, pointer: int, value: int, count: int, _stream: int) -> Any:
        return self._enqueue(lambda: ctypes.memset(pointer, value, count) and None)

    def cudaEventCreateWithFlags(self, _flags: int) -> Any:
        return self._handle("event")

    def cudaEventRecord(self, _event: int, _stream: int) -> Any:
        return (OK,)

    def cudaEventSynchronize(self, _event: int) -> Any:
        return self.cudaStreamSynchronize(0)

    def cudaEventDestroy(self, event: int) -> Any:
        return self._release(event)

    def cudaStreamBeginCapture(self, _stream: int, _mode: int) -> Any:
        assert self.recording is None
        self.recording = []
        return (OK,)

    def cudaStreamEndCapture(self, _stream: int) -> Any:
        graph, self.recording = self.recording, None
        return (
            (cudaError_t.cudaErrorStreamCaptureInvalidated, None)
            if self.refuses_recording
            else (OK, graph)
        )

    def cudaGraphInstantiate(self, graph: Any, _flags: int) -> Any:
        _, handle = self._handle("graph")
        self.live[handle] = graph
        return OK, handle

    def cudaGraphDestroy(self, _graph: Any) -> Any:
        return (OK,)

    def cudaGraphLaunch(self, executable: int, _stream: int) -> Any:
        self.num_replayed += 1
        self.queue.extend(self.live[executable])
        return (OK,)

    def cudaGraphExecDestroy(self, executable: int) -> Any:
        return self._release(executable)


class HostDriver(ModuleType):
    """``cuda.bindings.driver``."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")

    def cuInit(self, _flags: int) -> Any:
        return (0,)


class ILogger:
    ERROR, INTERNAL_ERROR = "ERROR", "INTERNAL_ERROR"

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, cuda: HostCuda) -> None:
        self._engine, self._cuda = engine, cuda
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._is_recorded = False
        self.num_profile_switches = 0

    def set_optimization_profile_async(self, profile_index: int, _stream: int) -> bool:
        assert not self._is_recorded
        self._profile = profile_index
        self.num_profile_switches += 1
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self._is_recorded
        declared = self._engine.get_tensor_shape(name)
        self._shapes[name] = shape
        return len(declared) == len(shape) and all(
            d in (-1, s) for d, s in zip(declared, shape, strict=True)
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert not self._is_recorded
        assert memory % 256 == 0
        assert memory >= min(a for a, m in self._cuda.live.items() if isinstance(m, np.ndarray))
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        if self._profile < 0 or set(self._addresses) != set(self._engine.tensors):
            return False
        self._is_recorded = self._is_recorded or self._cuda.recording is not None
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        self._cuda._enqueue(lambda: self._engine.execute(shapes, addresses))
        return True


class ICudaEngine:
    """The tensors of an ONNX graph."""

    def __init__(self, graph: bytes, cuda: HostCuda) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session, self._cuda = (
            ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]),
            cuda,
        )
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self.tensors = {
            **self._inputs,
            **{value.name: value for value in self._session.get_outputs()},
        }
        self.contexts: list[IExecutionContext] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=ONNX_TYPES[self.tensors[name].type][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self.tensors[name].shape)

    def create_execution_context(self, _how: Any = None) -> IExecutionContext:
        self.contexts.append(IExecutionContext(self, self._cuda))
        return self.contexts[-1]

    def execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        sizes = dict(zip(("batch", "rows"), shapes["input_ids"], strict=True))
        sizes["query_rows"] = (
            sizes["rows"] * (sizes["rows"] + 1)
            if "top_ids" in self.tensors and "greedy_ids" in self.tensors
            else sizes["rows"]
        )
        binding = self._session.io_binding()
        for name, value in self.tensors.items():
            shape = [sizes[d] if isinstance(d, str) else d for d in value.shape]
            if name in self._inputs:
                assert tuple(shape) == shapes.get(name, tuple(shape)), (name, shape, shapes[name])
                binding.bind_input(
                    name, "cpu", 0, ONNX_TYPES[value.type][1], shape, addresses[name]
                )
            else:
                binding.bind_output(
                    name, "cpu", 0, ONNX_TYPES[value.type][1], shape, addresses[name]
                )
        self._session.run_with_iobinding(binding)


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class IRuntimeCache:
    """Accepts only what one of its kind has written."""

    def __init__(self) -> None:
        self.content = b"kernels:"

    def deserialize(self, blob: bytes) -> bool:
        fits = bytes(blob).startswith(b"kernels:")
        self.content = bytes(blob) if fits else self.content
        return fits

    def serialize(self) -> bytes:
        return self.content + b"+"


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy: Any = None
        self._cache: IRuntimeCache | None = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class RtxEngine(ICudaEngine):
    """TensorRT-RTX: replays by itself, and keeps the kernels it compiles."""

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()


def host_tensorrt(cuda: HostCuda, name: str, version: str) -> ModuleType:
    """The package ``tensorrt_rtx`` or ``tensorrt``; ``engines`` are those that were loaded."""
    trt: Any = ModuleType(name)
    trt.__version__ = version
    trt.engines = []

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            data = bytes(serialized_engine)
            if len(data) < 1000:
                self.logger.log(ILogger.ERROR, "Serialization assertion failed\nmore")
                return None
            trt.engines.append(
                (RtxEngine if name == "tensorrt_rtx" else ICudaEngine)(data[4:], cuda)
            )
            return trt.engines[-1]

    trt.Runtime, trt.ILogger, trt.TensorIOMode = Runtime, ILogger, TensorIOMode
    trt.ICudaEngine, trt.IExecutionContext = ICudaEngine, IExecutionContext
    trt.ExecutionContextAllocationStrategy = SimpleNamespace(ON_PROFILE_CHANGE="on profile change")
    if name == "tensorrt_rtx":
        trt.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
    return trt  # type: ignore[no-any-return]

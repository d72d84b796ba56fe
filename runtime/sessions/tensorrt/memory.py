"""Memory, streams and recorded work on the GPU.

Each frees what it holds when it is no longer used.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.bundle.weights import PrecisionWeights
from trimode.runtime.sessions.gpu import check, cudart

Bytes = NDArray[np.uint8]

CHUNK_BYTES = 16 << 20
"""Weights travel through two page-locked buffers of this size: one is filled while the other is
sent.
"""


class Lines(NamedTuple):
    """Stretches of memory at equal distances.

    Attributes:
        address: Address at which the first begins.
        pitch: Bytes from the beginning of one to that of the next.
        is_on_gpu: Whether it is memory of the GPU, not of the host.
    """

    address: int
    pitch: int
    is_on_gpu: bool = True


class Stream:
    """Queues work that never waits for the default stream."""

    def __init__(self) -> None:
        cuda = cudart()
        self.handle = int(
            check(
                "cudaStreamCreateWithFlags",
                cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking),
            )
        )
        self.close = _release_with(self, cuda.cudaStreamDestroy, self.handle)

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        check("a forward on the GPU", cudart().cudaStreamSynchronize(self.handle))

    def copy_in(self, destination: int, source: int, num_bytes: int) -> None:
        """Queue a copy from host to GPU.

        The host memory must stay as it is until it is done.
        """
        kind = cudart().cudaMemcpyKind.cudaMemcpyHostToDevice
        check(
            f"a copy of {num_bytes} bytes to the GPU",
            cudart().cudaMemcpyAsync(destination, source, num_bytes, kind, self.handle),
        )

    def copy_out(self, destination: int, source: int, num_bytes: int) -> None:
        """Queue a copy from GPU to host."""
        kind = cudart().cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(
            f"a copy of {num_bytes} bytes from the GPU",
            cudart().cudaMemcpyAsync(destination, source, num_bytes, kind, self.handle),
        )

    def copy_lines(self, destination: Lines, source: Lines, width: int, height: int) -> None:
        """Queue a copy of ``height`` lines of ``width`` bytes.

        It goes from GPU to GPU, or from or to the host. Host memory must stay as it is until
        it is done.
        """
        kinds = cudart().cudaMemcpyKind
        kind = {
            (True, True): kinds.cudaMemcpyDeviceToDevice,
            (True, False): kinds.cudaMemcpyHostToDevice,
            (False, True): kinds.cudaMemcpyDeviceToHost,
        }[destination.is_on_gpu, source.is_on_gpu]
        copied = cudart().cudaMemcpy2DAsync(
            destination.address,
            destination.pitch,
            source.address,
            source.pitch,
            width,
            height,
            kind,
            self.handle,
        )
        check(f"a copy of {height} times {width} bytes", copied)


class DeviceMemory:
    """Holds bytes on the GPU.

    Args:
        num_bytes: Number of bytes.
        what: Use of the bytes, for the message when there is no room.
    """

    def __init__(self, num_bytes: int, what: str) -> None:
        self.num_bytes = num_bytes
        self.address = int(
            check(
                f"cudaMalloc of {num_bytes} bytes for {what}",
                cudart().cudaMalloc(max(num_bytes, 1)),
            )
        )
        self.close = _release_with(self, cudart().cudaFree, self.address)

    def clear(self, stream: Stream) -> None:
        """Queue setting every byte to zero."""
        check(
            f"clearing {self.num_bytes} bytes",
            cudart().cudaMemsetAsync(self.address, 0, self.num_bytes, stream.handle),
        )


class PinnedMemory:
    """Page-locked host memory, which the GPU reads and writes without a detour.

    ``bytes`` is a view of it.
    """

    def __init__(self, num_bytes: int) -> None:
        cuda = cudart()
        self.address = int(
            check(
                f"cudaHostAlloc of {num_bytes} bytes",
                cuda.cudaHostAlloc(max(num_bytes, 1), cuda.cudaHostAllocDefault),
            )
        )
        self.bytes: Bytes = np.ctypeslib.as_array(
            (ctypes.c_uint8 * max(num_bytes, 1)).from_address(self.address)
        )
        self.close = _release_with(self, cuda.cudaFreeHost, self.address)


class RecordedWork:
    """Records work from a stream as a CUDA graph.

    It can be launched again in one call.

    Args:
        stream: Stream that is idle; nothing of what is recorded is executed.
        enqueue: Function that puts the work on the stream. Addresses and shapes it uses must stay
            as they are.
    """

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        cuda = cudart()
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check("cudaStreamBeginCapture", cuda.cudaStreamBeginCapture(stream.handle, mode))
        try:
            enqueue()
        except BaseException:
            # leaves the stream usable; what it returns is of no use
            cuda.cudaStreamEndCapture(stream.handle)
            raise
        graph = check("cudaStreamEndCapture", cuda.cudaStreamEndCapture(stream.handle))
        try:
            self._executable = check("cudaGraphInstantiate", cuda.cudaGraphInstantiate(graph, 0))
        finally:
            cuda.cudaGraphDestroy(graph)
        self._stream = stream
        self.close = _release_with(self, cuda.cudaGraphExecDestroy, self._executable)

    def launch(self) -> None:
        """Queue the work."""
        check("cudaGraphLaunch", cudart().cudaGraphLaunch(self._executable, self._stream.handle))


def upload(
    weights: PrecisionWeights, offsets: Mapping[str, int], memory: DeviceMemory, stream: Stream
) -> None:
    """Copy tensors to ``offsets`` of ``memory``, piece by piece.

    Host memory stays constant whatever their size.
    """
    cuda = cudart()
    halves = [PinnedMemory(CHUNK_BYTES) for _ in range(2)]
    sent = [
        check(
            "cudaEventCreateWithFlags", cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming)
        )
        for _ in halves
    ]
    turn = 0
    try:
        for name, offset in offsets.items():
            raw = weights.raw(name)
            for begin in range(0, raw.size, CHUNK_BYTES):
                piece, half = raw[begin : begin + CHUNK_BYTES], halves[turn]
                check("copying the weights to the GPU", cuda.cudaEventSynchronize(sent[turn]))
                half.bytes[: piece.size] = piece
                stream.copy_in(memory.address + offset + begin, half.address, piece.size)
                check("cudaEventRecord", cuda.cudaEventRecord(sent[turn], stream.handle))
                turn = 1 - turn
        stream.synchronize()
    finally:
        for event, half in zip(sent, halves, strict=True):
            cuda.cudaEventDestroy(event)
            half.close()


def _release_with(
    owner: object, release: Callable[[Any], object], handle: Any
) -> Callable[[], object]:
    """Return a function that releases ``handle`` once.

    It is released when the function is called, or ``owner`` is no longer used. A process that ends
    releases all.
    """
    finalizer = weakref.finalize(owner, release, handle)
    finalizer.atexit = False
    return finalizer

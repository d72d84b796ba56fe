"""Which GPU is here, and calls to it that fail loudly."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from trimode.errors import DependencyError, DeviceError

_INSTALL = 'pip install "trimode[rtx]"'


@dataclass(frozen=True)
class Gpu:
    """Describes the first GPU that CUDA shows.

    ``CUDA_VISIBLE_DEVICES`` decides which that is.

    Attributes:
        compute_capability: Compute capability, as ``8.9``.
        memory_bytes: Size of all its memory, free or not.
    """

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class NoGpu:
    """Says why no GPU can be used.

    Attributes:
        reason: Finding, as a sentence: ``the NVIDIA driver is not installed``.
        is_certain: Whether there is none for certain. False where nothing could be asked, so that
            there may be one all the same.
    """

    reason: str
    is_certain: bool = True


def find_gpu() -> Gpu | NoGpu:
    """The first GPU, or why there is none. Creates no CUDA context."""
    try:
        runtime = cudart()
        driver = importlib.import_module("cuda.bindings.driver")
    except (DependencyError, ImportError):
        return NoGpu(f"cuda-bindings is not installed ({_INSTALL})", is_certain=False)
    try:
        # The runtime library reports a missing driver and one that is too old alike; the driver's
        # own library tells them apart.
        driver.cuInit(0)
    except RuntimeError:
        return NoGpu("the NVIDIA driver is not installed")
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess:
        return NoGpu(error_text(error))
    if not count:
        return NoGpu("the NVIDIA driver shows no device")
    properties = check("cudaGetDeviceProperties", runtime.cudaGetDeviceProperties(0))
    return Gpu(
        properties.name.decode().rstrip("\0"),
        f"{properties.major}.{properties.minor}",
        properties.totalGlobalMem,
    )


@cache
def cudart() -> Any:
    """The module ``cuda.bindings.runtime``.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise DependencyError("expected cuda-bindings, found it not installed", _INSTALL) from error


def check(call: str, result: tuple[Any, ...]) -> Any:
    """Return what a call of the CUDA runtime gave besides its status.

    That is None, the value, or a tuple of values.

    Args:
        call: Function and what it was asked for, for the message.
        result: Status and values.

    Raises:
        DeviceError: the status says that it failed.
    """
    status, *values = result
    if status != type(status)(0):
        raise DeviceError(
            f"expected {call} to succeed, found: {error_text(status)}", _advice(status)
        )
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def error_text(status: Any) -> str:
    """CUDA's own words for a status, and its name."""
    _, text = cudart().cudaGetErrorString(status)
    return f"{text.decode()} ({status.name})"


def _advice(status: Any) -> str:
    if status.name == "cudaErrorMemoryAllocation":
        return (
            "free memory on the GPU (nvidia-smi shows who uses it), "
            "or build the target with a smaller `max_length`"
        )
    return "nvidia-smi shows the state of the GPU and its driver"

"""Says which targets this machine can compile for and run."""

from __future__ import annotations

import functools
import importlib
import importlib.util

from trimode.compiler.targets import Backend, Target
from trimode.errors import BuildError, DependencyError
from trimode.formats.versions import version_of
from trimode.runtime.sessions.gpu import Gpu, NoGpu, find_gpu

_DISTRIBUTIONS: dict[Backend, tuple[str, str, str]] = {
    "onnxruntime": ("onnxruntime", "onnxruntime", "pip install 'trimode[ort]'"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt-rtx", "pip install 'trimode[rtx]'"),
    "tensorrt": ("tensorrt", "tensorrt", "pip install 'trimode[tensorrt]'"),
}


def library_of(backend: Backend) -> str:
    """Name and version of a backend's library, as ``tensorrt_rtx 1.7.1.116``.

    The compiler itself where no library takes part.

    Raises:
        DependencyError: it is not installed.
    """
    if backend == "onnxruntime":  # the graphs are standard ONNX: whatever version runs them
        return "onnx opset 24"
    module, distribution, hint = _DISTRIBUTIONS[backend]
    if not is_installed(backend):
        where = (
            ", on a machine with the GPU that the engines are for" if backend == "tensorrt" else ""
        )
        raise DependencyError(f"expected {module}, found it not installed", f"{hint}{where}")
    # where it was unpacked by hand, only the library itself can tell
    return f"{module} {version_of(distribution) or importlib.import_module(module).__version__}"


def is_installed(backend: Backend) -> bool:
    """Whether the library can be imported."""
    return importlib.util.find_spec(_DISTRIBUTIONS[backend][0]) is not None


def require_toolchain(target: Target) -> None:
    """Raise where this machine cannot compile for ``target``.

    Raises:
        DependencyError: the library is missing.
        BuildError: TensorRT compiles only on a GPU like the target's, and there is none here.
    """
    if target.backend != "onnxruntime":
        library_of(target.backend)
    reason = why_not_build(target)
    if reason is not None:
        where = f"{target.name} ({target.compute_capability})"
        raise BuildError(
            f"{where}: expected TensorRT on a GPU of that architecture, found that {reason}",
            "run this build on such a machine: it adds its engines to the same bundle",
        )


def why_not_build(target: Target) -> str | None:
    """What keeps this machine from compiling for ``target``; None where nothing does."""
    if target.backend == "onnxruntime":
        return None
    if not is_installed(target.backend):
        return f"{target.backend} is not installed ({_DISTRIBUTIONS[target.backend][2]})"
    return _why_wrong_gpu(target) if target.backend == "tensorrt" else None


def why_not_run(target: Target) -> str | None:
    """What keeps this machine from running ``target``; None where nothing does."""
    if not is_installed(target.backend):
        return f"{target.backend} is not installed ({_DISTRIBUTIONS[target.backend][2]})"
    if target.device == "cpu":
        return None
    if target.backend == "onnxruntime" and not _has_cuda_provider():
        return "onnxruntime has no CUDA execution provider (pip install onnxruntime-gpu)"
    return _why_wrong_gpu(target)


@functools.cache
def _found_gpu() -> Gpu | NoGpu:
    return find_gpu()


def _why_wrong_gpu(target: Target) -> str | None:
    gpu = _found_gpu()
    if not isinstance(gpu, Gpu):
        return gpu.reason
    if target.compute_capability not in (None, gpu.compute_capability):
        return f"the GPU here is a {gpu.name} ({gpu.compute_capability})"
    return None


def _has_cuda_provider() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()

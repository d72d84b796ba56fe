from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from host_gpu import HostCuda, HostDriver, cudaError_t

from trimode.errors import DependencyError, DeviceError
from trimode.runtime.sessions.gpu import Gpu, NoGpu, check, cudart, find_gpu


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    cudart.cache_clear()
    yield
    cudart.cache_clear()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    runtime = HostCuda((12, 0), 32 << 30)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", HostDriver())
    return runtime


def test_a_gpu(cuda: HostCuda) -> None:
    assert find_gpu() == Gpu("HOST 4090", "12.0", 32 << 30)


def test_a_driver_without_a_gpu(cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cuda, "cudaGetDeviceCount", lambda: (cudaError_t.cudaSuccess, 0), raising=False
    )
    assert find_gpu() == NoGpu("the NVIDIA driver shows no device")
    monkeypatch.setattr(
        cuda,
        "cudaGetDeviceCount",
        lambda: (cudaError_t.cudaErrorMemoryAllocation, None),
        raising=False,
    )
    assert find_gpu() == NoGpu("cudaErrorMemoryAllocation (cudaErrorMemoryAllocation)")


@pytest.mark.parametrize("missing", ["runtime", "driver"])
def test_without_the_bindings(
    cuda: HostCuda, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"cuda.bindings.{missing}", None)
    assert find_gpu() == NoGpu(
        'cuda-bindings is not installed (pip install "trimode[rtx]")', is_certain=False
    )


def test_calls_without_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(DependencyError, match="cuda-bindings"):
        cudart()


def test_check(cuda: HostCuda) -> None:
    ok = cudaError_t.cudaSuccess
    assert check("a call", (ok,)) is None
    assert check("a call", (ok, 3)) == 3
    assert check("a call", (ok, 3, 4)) == (3, 4)
    with pytest.raises(
        DeviceError,
        match=r"expected cudaMalloc of 5 bytes to succeed, found: .*cudaErrorMemoryAllocation",
    ) as raised:
        check("cudaMalloc of 5 bytes", (cudaError_t.cudaErrorMemoryAllocation, None))
    assert "nvidia-smi" in raised.value.hint
    with pytest.raises(DeviceError, match="a call"):
        check("a call", (cudaError_t.cudaErrorStreamCaptureInvalidated,))


def test_the_installed_bindings_on_this_machine() -> None:
    """Whatever is here, it is either found or explained, and a failing call is reported in CUDA's
    words.
    """
    runtime = pytest.importorskip("cuda.bindings.runtime")
    found = find_gpu()
    if isinstance(found, Gpu):
        assert float(found.compute_capability) >= 5
        assert found.memory_bytes > 1 << 28
        return
    assert found.is_certain
    assert "driver" in found.reason
    with pytest.raises(DeviceError, match=r"expected cudaMalloc to succeed, found: .*\(cudaError"):
        check("cudaMalloc", runtime.cudaMalloc(16))


def test_the_driver_is_told_from_its_library(
    cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_flags: int) -> None:
        raise RuntimeError("libcuda.so.1 not found")

    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", SimpleNamespace(cuInit=missing))  # type: ignore[misc]
    assert find_gpu() == NoGpu("the NVIDIA driver is not installed")

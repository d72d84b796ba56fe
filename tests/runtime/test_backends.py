"""Which target runs: every machine there could be is described, and this one is what it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Built

from trimode.errors import BundleError, DependencyError, DeviceError, TrimodeError, UsageError
from trimode.formats.manifest import EngineRecord, TargetRecord
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.model import TriModeModel
from trimode.runtime.sessions import select
from trimode.runtime.sessions.gpu import Gpu, NoGpu
from trimode.runtime.sessions.select import PORTABLE, open_session

SHAPE = "three_kv_heads"
ADA, HOPPER = Gpu("RTX 4090", "8.9", 24 << 30), Gpu("H100", "9.0", 80 << 30)
NO_DRIVER = NoGpu("the NVIDIA driver is not installed")
UNKNOWN = NoGpu("cuda-bindings is not installed", is_certain=False)


def record(
    backend: Any, device: Any, capability: str | None, placement: Any = "shared"
) -> TargetRecord:
    return TargetRecord(
        backend=backend,
        device=device,
        compute_capability=capability,
        compute_dtype="float32",
        placement=placement,
        capacity=None,
        workspace_mib=None,
        library=f"{backend} 1.0",
        graphs={
            "ar": EngineRecord(file="ar.onnx"),
            "draft": EngineRecord(file="draft.onnx"),
            "verify": EngineRecord(file="verify.onnx"),
        },
    )


TARGETS = {
    "cpu": record("onnxruntime", "cpu", None, "external"),
    "cuda": record("onnxruntime", "cuda", None),
    "h100": record("tensorrt", "cuda", "9.0"),
    "rtx-4090": record("tensorrt_rtx", "cuda", "8.9"),
}


@pytest.fixture
def bundle(built: Callable[[str], Built]) -> Bundle:
    opened = built(SHAPE).model.bundle
    return with_targets(opened, TARGETS)


def without(bundle: Bundle, *names: str) -> Bundle:
    return with_targets(
        bundle,
        {name: target for name, target in bundle.chosen.targets.items() if name not in names},
    )


def with_targets(bundle: Bundle, targets: dict[str, TargetRecord]) -> Bundle:
    record = bundle.chosen.model_copy(update={"targets": targets})
    return Bundle(
        bundle.path,
        bundle.manifest.model_copy(update={"precisions": {bundle.precision: record}}),
        bundle.precision,
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with this GPU, on which these libraries fail to open."""

    def describe(gpu: Gpu | NoGpu, **failures: TrimodeError) -> None:
        def opened(_bundle: Bundle, target: TargetRecord | None, *_: Any) -> Any:
            key = f"{target.backend}_{target.device}" if target else "portable"
            if key in failures:
                raise failures[key]
            return key

        monkeypatch.setattr(select, "find_gpu", lambda: gpu)
        monkeypatch.setattr(select, "_open", opened)

    return describe


def choose(bundle: Bundle, target: str | None = None) -> tuple[str, list[str]]:
    opened = open_session(bundle, target)
    return opened.target, list(opened.rejected)


OLD = BundleError("expected tensorrt_rtx 1.0, which compiled the engines, found tensorrt_rtx 2.0")
NO_PROVIDER = DependencyError(
    "expected an ONNX Runtime with the CUDA provider, found 1.31 without it"
)


def test_the_best_that_runs_is_chosen(bundle: Bundle, machine: Callable[..., None]) -> None:
    machine(ADA)
    assert choose(bundle) == choose(bundle, "auto") == ("rtx-4090", ["h100"])
    machine(HOPPER)
    assert choose(bundle) == ("h100", [])
    machine(ADA, tensorrt_rtx_cuda=OLD)
    assert choose(bundle) == ("cuda", ["h100", "rtx-4090"])
    machine(ADA, tensorrt_rtx_cuda=OLD, onnxruntime_cuda=NO_PROVIDER)
    assert choose(bundle) == ("cpu", ["h100", "rtx-4090", "cuda"])
    machine(NO_DRIVER)
    assert choose(bundle) == ("cpu", ["h100", "rtx-4090", "cuda"])
    assert choose(without(bundle, "cpu")) == (PORTABLE, ["h100", "rtx-4090", "cuda"])
    assert choose(without(bundle, *TARGETS)) == (PORTABLE, [])


def test_onnxruntime_may_find_a_gpu_that_we_cannot_see(
    bundle: Bundle, machine: Callable[..., None]
) -> None:
    machine(UNKNOWN)
    assert choose(bundle) == ("cuda", ["h100", "rtx-4090"])
    machine(UNKNOWN, onnxruntime_cuda=NO_PROVIDER)
    assert choose(bundle) == ("cpu", ["h100", "rtx-4090", "cuda"])


def test_what_was_chosen_and_why_is_logged(
    bundle: Bundle, machine: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def logged(of: Bundle) -> list[tuple[str, str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "trimode.runtime"):
            open_session(of)
        return [(r.levelname, r.getMessage()) for r in caplog.records]

    machine(NO_DRIVER)
    assert logged(without(bundle, "cuda", "h100")) == [
        (
            "WARNING",
            "target rtx-4090: found no GPU (the NVIDIA driver is not installed); running on ONNX "
            "Runtime (cpu)",
        )
    ]
    assert logged(without(bundle, "cuda", "h100", "rtx-4090")) == [
        ("INFO", "running on ONNX Runtime (cpu)")
    ]
    machine(HOPPER)
    assert logged(bundle) == [("INFO", "running on TensorRT (h100)")]
    machine(ADA, tensorrt_rtx_cuda=OLD)
    assert logged(bundle) == [
        (
            "WARNING",
            "target h100: found a GPU of compute capability 8.9 (RTX 4090), not 9.0; running on "
            "ONNX Runtime (cuda)",
        ),
        ("WARNING", f"target rtx-4090: {OLD.message}; running on ONNX Runtime (cuda)"),
    ]
    machine(ADA, onnxruntime_cpu=BundleError("ar.onnx is damaged"))
    assert logged(without(bundle, "cuda", "h100", "rtx-4090")) == [
        ("INFO", "target cpu: ar.onnx is damaged; running on ONNX Runtime (portable)")
    ]


def test_a_named_target_runs_or_fails(bundle: Bundle, machine: Callable[..., None]) -> None:
    machine(
        NO_DRIVER,
        tensorrt_rtx_cuda=DeviceError("expected a GPU, found none"),
        onnxruntime_cuda=NO_PROVIDER,
    )
    assert choose(bundle, "cpu") == ("cpu", [])
    assert choose(bundle, PORTABLE) == (PORTABLE, [])
    with pytest.raises(DeviceError, match="expected a GPU"):
        choose(bundle, "rtx-4090")
    with pytest.raises(DependencyError, match="CUDA provider"):
        choose(bundle, "cuda")
    with pytest.raises(
        UsageError,
        match=(
            r"a target of the bundle in fp32 \(cpu, cuda, h100, rtx-4090, portable\) or auto, "
            r"found 'tpu'"
        ),
    ):
        choose(bundle, "tpu")


def test_errors_that_no_fallback_helps(bundle: Bundle, machine: Callable[..., None]) -> None:
    machine(NO_DRIVER, onnxruntime_cpu=UsageError("expected at least 1 thread"))
    with pytest.raises(UsageError):
        choose(bundle)
    machine(
        NO_DRIVER,
        onnxruntime_cpu=NO_PROVIDER,
        portable=DependencyError("expected ONNX Runtime, found it not installed"),
    )
    with pytest.raises(DependencyError, match="not installed"):
        choose(bundle)


def test_no_gpu_is_looked_for_where_none_is_needed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "find_gpu", lambda: pytest.fail("nobody asked"))
    opened = open_session(without(bundle, "cuda", "h100", "rtx-4090"), num_threads=1)
    assert opened.target == "cpu"
    opened.session.close()


def test_from_pretrained(built: Callable[[str], Built], tmp_path: Path) -> None:
    path = built(SHAPE).bundle
    chosen = TriModeModel.from_pretrained(path, num_threads=1)
    assert chosen.target == "cpu"
    with TriModeModel.from_pretrained(
        path, target=PORTABLE, num_threads=1, verify=False, runtime_cache=tmp_path
    ) as portable:
        assert portable.target == PORTABLE
        assert (
            portable.ar_generate([[20, 30]])[0].tolist()
            == chosen.ar_generate([[20, 30]])[0].tolist()
        )
    with pytest.raises(UsageError, match="found 'rtx-4090'"):
        TriModeModel.from_pretrained(path, target="rtx-4090")
    with pytest.raises(UsageError, match="at least 1 thread"):
        TriModeModel.from_pretrained(path, num_threads=0)


def test_a_target_for_a_gpu_on_this_machine(bundle: Bundle) -> None:
    """The real modules: what is missing here is said, and the CPU takes over."""
    if isinstance(select.find_gpu(), Gpu):
        pytest.skip("there is a GPU")
    opened = open_session(bundle, num_threads=1)
    assert opened.target == "cpu"
    assert set(opened.rejected) >= {"h100", "rtx-4090"}
    opened.session.close()
    with pytest.raises((DeviceError, BundleError, DependencyError)) as raised:
        open_session(bundle, "rtx-4090")
    assert raised.value.hint

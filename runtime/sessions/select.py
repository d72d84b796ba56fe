"""Chooses the target that runs on this machine, and opens it.

It is one of those of a bundle's chosen precision.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from trimode.errors import TrimodeError, UsageError
from trimode.formats.hints import ADD_TARGET
from trimode.formats.manifest import TargetRecord
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.sessions.base import Session
from trimode.runtime.sessions.gpu import Gpu, NoGpu, find_gpu

AUTO = "auto"
PORTABLE = "portable"
"""Stands for the portable graphs, which every bundle has: ONNX Runtime on the CPU, in float32."""

logger = logging.getLogger("trimode.runtime")


@dataclass(frozen=True)
class OpenedSession:
    """A session ready to run.

    Attributes:
        target: Name of the bundle's target, or :data:`PORTABLE`.
        rejected: Targets that were preferred to it, and why each does not run here.
    """

    session: Session
    target: str
    rejected: dict[str, str]


def open_session(
    bundle: Bundle,
    target: str | None = None,
    num_threads: int | None = None,
    *,
    runtime_cache: Path | None = None,
) -> OpenedSession:
    """Open a target of a bundle's chosen precision.

    Args:
        bundle: Opened bundle.
        target: Name of a target, which is opened or fails. None or ``auto``: the first that runs
            here of TensorRT targets, ONNX Runtime on a GPU, ONNX Runtime on the CPU, and the
            portable graphs.
        num_threads: Threads inside one operator on the CPU; None = one per physical core.
        runtime_cache: Folder for what is made for this machine while running: kernels that
            TensorRT-RTX compiles (None = not kept) and int4 weights as ONNX Runtime arranges them
            (None = the user's cache folder).

    Raises:
        UsageError: the precision has no target of this name, or ``num_threads`` is below 1.
        BundleError: a file is damaged, or was compiled by another version of the library.
        DeviceError: the named target needs a GPU that is not here.
        DependencyError: the library that runs it is not installed.
    """
    if target not in (None, AUTO):
        assert target is not None
        return OpenedSession(
            _open(bundle, _find(bundle, target), num_threads, runtime_cache), target, {}
        )
    records: dict[str, TargetRecord | None] = {**bundle.chosen.targets, PORTABLE: None}
    gpu = (
        find_gpu()
        if any(record and record.device == "cuda" for record in records.values())
        else NoGpu("it was not looked for")
    )
    rejected: dict[str, str] = {}
    for name in sorted(records, key=lambda name: _rank(records[name])):
        record = records[name]
        reason = _why_not(record, gpu)
        if reason is None:
            try:
                session = _open(bundle, record, num_threads, runtime_cache)
            except UsageError:
                raise
            except TrimodeError as error:
                if name == PORTABLE:
                    raise
                reason = error.message
            else:
                _report(name, record, rejected, bundle)
                return OpenedSession(session, name, rejected)
        rejected[name] = reason
    raise AssertionError("the portable graphs either run or raise")


def _find(bundle: Bundle, target: str) -> TargetRecord | None:
    targets = bundle.chosen.targets
    if target == PORTABLE:
        return None
    if target not in targets:
        others = [
            name for name, record in bundle.manifest.precisions.items() if target in record.targets
        ]
        hint = (
            f"it is there in {', '.join(others)}: choose that precision" if others else ADD_TARGET
        )
        raise UsageError(
            f"expected a target of the bundle in {bundle.precision} "
            f"({', '.join((*targets, PORTABLE))}) or auto, found {target!r}",
            f"{hint}, or choose one of these",
        )
    return targets[target]


def _rank(record: TargetRecord | None) -> int:
    """Order of preference; equal ones stay in the bundle's order."""
    if record is None:
        return 3
    if record.backend != "onnxruntime":
        return 0
    return 1 if record.device == "cuda" else 2


def _why_not(record: TargetRecord | None, gpu: Gpu | NoGpu) -> str | None:
    """Return why a target cannot run here, or None.

    Only what shows before anything is loaded counts.
    """
    if record is None or record.device == "cpu":
        return None
    if isinstance(gpu, NoGpu):
        # ONNX Runtime brings its own way to the GPU; where we cannot look, it may still find one.
        return (
            f"found no GPU ({gpu.reason})"
            if gpu.is_certain or record.backend != "onnxruntime"
            else None
        )
    if record.compute_capability not in (None, gpu.compute_capability):
        return (
            f"found a GPU of compute capability {gpu.compute_capability} "
            f"({gpu.name}), not {record.compute_capability}"
        )
    return None


def _open(
    bundle: Bundle, record: TargetRecord | None, num_threads: int | None, runtime_cache: Path | None
) -> Session:
    # The libraries are optional extras: each is imported only where it is used.
    if record is None or record.backend == "onnxruntime":
        from trimode.runtime.sessions.ort.session import OrtSession

        return OrtSession(bundle, record, num_threads, runtime_cache=runtime_cache)
    from trimode.runtime.sessions.tensorrt.session import TensorRTSession

    return TensorRTSession(bundle, record, runtime_cache=runtime_cache)


def _report(
    name: str, record: TargetRecord | None, rejected: dict[str, str], bundle: Bundle
) -> None:
    """Log what runs, and why others do not.

    Falling back from a GPU is worth a warning, the rest is information.
    """
    chosen = f"{_LIBRARIES[record.backend] if record else 'ONNX Runtime'} ({name})"
    for other, reason in rejected.items():
        level = logging.WARNING if bundle.chosen.targets[other].device == "cuda" else logging.INFO
        logger.log(level, "target %s: %s; running on %s", other, reason, chosen)
    if not rejected:
        logger.info("running on %s", chosen)


_LIBRARIES = {"onnxruntime": "ONNX Runtime", "tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}

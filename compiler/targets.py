"""Lists the targets: where a bundle can run.

Each says what it can compute, and which library compiles for it.

Compute capabilities and memory are those of NVIDIA's product pages
(https://developer.nvidia.com/cuda-gpus); what TensorRT-RTX compiles ahead of time, without the GPU,
is its ``ComputeCapability`` enumeration. Memory bandwidths are peak figures, which no kernel quite
reaches, each with its source; for SXM modules where there are several forms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from trimode.errors import UsageError

Backend = Literal["onnxruntime", "tensorrt_rtx", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8", "nvfp4"]

DENSE_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
"""Those in which a whole model is computed."""

BUILT_PRECISIONS: tuple[Precision, ...] = (*DENSE_PRECISIONS, "fp8", "int8", "int4", "nvfp4")
"""What this version compiles."""


@dataclass(frozen=True)
class Target:
    """Describes one place to run.

    Attributes:
        name: Name that people call it.
        backend: Library that compiles and runs it.
        compute_capability: Compute capability of its GPU, as ``8.9``; None for a CPU, or where any
            GPU will do.
        precisions: Precisions that it can compute, the preferred one first.
        memory_gb: Memory of the GPU, in 10^9 bytes; the smallest variant sold; None where it
            depends on the machine.
        bandwidth_gb_s: Bandwidth of that memory, in 10^9 bytes a second; None where it depends on
            the machine.
        bandwidth_source: Page that has the bandwidth; None where there is none.
    """

    name: str
    backend: Backend
    compute_capability: str | None
    precisions: tuple[Precision, ...]
    memory_gb: int | None = None
    bandwidth_gb_s: int | None = None
    bandwidth_source: str | None = None

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Kind of device."""
        return "cpu" if self.name == "cpu" else "cuda"


# TensorRT-RTX refuses int4 below compute capability 8.0
_TURING: tuple[Precision, ...] = ("fp16", "int8")
_AMPERE: tuple[Precision, ...] = ("bf16", "fp16", "int8", "int4")
_ADA: tuple[Precision, ...] = (*_AMPERE, "fp8")
_BLACKWELL: tuple[Precision, ...] = (*_ADA, "nvfp4")

_ARCHITECTURES: dict[str, tuple[Backend, tuple[Precision, ...]]] = {
    "7.5": ("tensorrt_rtx", _TURING),
    "8.0": ("tensorrt_rtx", _AMPERE),
    "8.6": ("tensorrt_rtx", _AMPERE),
    "8.9": ("tensorrt_rtx", _ADA),
    "9.0": ("tensorrt", _ADA),
    "10.0": ("tensorrt", _BLACKWELL),
    "10.3": ("tensorrt", _BLACKWELL),
    "12.0": ("tensorrt_rtx", _BLACKWELL),
    "12.1": ("tensorrt_rtx", _BLACKWELL),
}

_DATABASE = "https://www.techpowerup.com/gpu-specs/"
_GPUS: tuple[tuple[str, str, int, int, str], ...] = (
    ("rtx-pro-6000", "12.0", 96, 1792, _DATABASE + "rtx-pro-6000-blackwell.c4272"),
    ("rtx-5090", "12.0", 32, 1792, _DATABASE + "geforce-rtx-5090.c4216"),
    ("dgx-spark", "12.1", 128, 273, _DATABASE + "gb10.c4342"),
    ("rtx-4090", "8.9", 24, 1008, _DATABASE + "geforce-rtx-4090.c3889"),
    ("l4", "8.9", 24, 300, _DATABASE + "l4.c4091"),
    ("l40s", "8.9", 48, 864, _DATABASE + "l40s.c4173"),
    ("rtx-3090", "8.6", 24, 936, _DATABASE + "geforce-rtx-3090.c3622"),
    ("a10", "8.6", 24, 600, _DATABASE + "a10-pcie.c3793"),
    ("a100", "8.0", 40, 1555, _DATABASE + "a100-sxm4-40-gb.c3506"),
    ("t4", "7.5", 16, 320, _DATABASE + "tesla-t4.c3316"),
    ("h100", "9.0", 80, 3350, "https://www.nvidia.com/en-us/data-center/h100/"),
    ("h200", "9.0", 141, 4800, "https://www.nvidia.com/en-us/data-center/h200/"),
    ("b200", "10.0", 180, 8000, "https://modal.com/gpu-glossary/perf/memory-bandwidth"),
    ("gb200", "10.0", 186, 8000, "https://www.nvidia.com/en-us/data-center/gb200-nvl72/"),
)

TARGETS: dict[str, Target] = {
    "cpu": Target(
        "cpu", "onnxruntime", None, ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "nvfp4")
    ),
    "cuda": Target("cuda", "onnxruntime", None, ("fp16", "bf16")),
    **{
        name: Target(
            name, _ARCHITECTURES[cc][0], cc, _ARCHITECTURES[cc][1], memory, bandwidth, source
        )
        for name, cc, memory, bandwidth, source in _GPUS
    },
}


def find_target(name: str) -> Target:
    """The target of this name, or of an architecture such as ``sm89``.

    Raises:
        UsageError: nobody knows it.
    """
    known = TARGETS.get(name.lower())
    if known is not None:
        return known
    match = re.fullmatch(r"sm_?(\d{1,2})(\d)", name.lower())
    if match:
        return architecture(f"{match[1]}.{match[2]}")
    known_names = ", ".join(TARGETS)
    raise UsageError(
        f"expected a target, found {name!r}",
        f"known are {known_names}, an architecture like sm89, and auto (see `trimode targets`)",
    )


def architecture(compute_capability: str) -> Target:
    """The target of any GPU with this compute capability, named ``smNN``."""
    if compute_capability not in _ARCHITECTURES:
        known = ", ".join(f"sm{cc.replace('.', '')}" for cc in _ARCHITECTURES)
        raise UsageError(
            f"expected a GPU architecture that TensorRT compiles for, found {compute_capability}",
            f"known are {known}",
        )
    backend, precisions = _ARCHITECTURES[compute_capability]
    return Target(
        f"sm{compute_capability.replace('.', '')}", backend, compute_capability, precisions
    )


def resolve_targets(names: tuple[str, ...]) -> tuple[Target, ...]:
    """Find targets by name, each once, in the order given.

    ``auto`` is the GPU of this machine.

    Raises:
        UsageError: an unknown name, none at all, or ``auto`` without a GPU.
    """
    if not names:
        raise UsageError(
            "expected at least one target, found none", "pass `targets`, for example `targets` cpu"
        )
    found = [_auto() if name == "auto" else find_target(name) for name in names]
    return tuple({target.name: target for target in found}.values())


def choose_precision(asked: str | None, targets: tuple[Target, ...]) -> Precision:
    """Choose the precision of a bundle for all of ``targets``.

    It is what was asked, or the first that the GPUs prefer and all can run; fp32 on a CPU.

    Raises:
        UsageError: no such precision, a target that cannot run it, or none that all can.
    """
    if asked is None:
        first = next((t for t in targets if t.device == "cuda"), targets[0])
        shared = [
            p
            for p in first.precisions
            if p in DENSE_PRECISIONS and all(p in t.precisions for t in targets)
        ]
        if shared:
            return shared[0]
        names = ", ".join(target.name for target in targets)
        raise UsageError(
            f"expected a precision that all of {names} can run, found none",
            "build them as separate bundles",
        )
    _check_precision(asked, targets)
    for precision in BUILT_PRECISIONS:
        if precision == asked:
            return precision
    raise UsageError(
        f"expected `precision` {', '.join(BUILT_PRECISIONS)}, found {asked!r}",
        "this version builds no other",
    )


def _check_precision(precision: str, targets: tuple[Target, ...]) -> None:
    known = get_args(Precision)
    if precision not in known:
        raise UsageError(
            f"expected `precision` {', '.join(BUILT_PRECISIONS)}, found {precision!r}",
            "this version builds no other",
        )
    for target in targets:
        if precision not in target.precisions:
            able = [p for p in target.precisions if p in BUILT_PRECISIONS]
            where = f"{target.name} ({target.compute_capability or target.backend})"
            why = (
                "; products of 4-bit floats begin with compute capability 10.0 (Blackwell)"
                if precision == "nvfp4" and target.name != "cuda"
                else ""
            )
            raise UsageError(
                f"{where}: expected a precision it can run ({', '.join(target.precisions)}),"
                f" found {precision}{why}",
                f"pass `precision` {able[0]}, or build {target.name} as a bundle of its own",
            )


def _auto() -> Target:
    from trimode.runtime.sessions.gpu import Gpu, find_gpu

    found = find_gpu()
    if not isinstance(found, Gpu):
        raise UsageError(
            f"`targets` auto: expected a GPU, found none: {found.reason}",
            "name the target, for example `targets` rtx-4090",
        )
    return architecture(found.compute_capability)

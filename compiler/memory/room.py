"""Refuses a build that its GPU cannot hold."""

from __future__ import annotations

from collections.abc import Mapping

from trimode.compiler.memory.use import fixed_use
from trimode.compiler.pack.layout import PackedTensor
from trimode.compiler.plan import BuildPlan
from trimode.compiler.targets import Target
from trimode.errors import UsageError
from trimode.formats.manifest import TargetRecord

_NARROWER = ("int4", "nvfp4", "fp8", "int8")


def memory_of(target: Target, gpu_memory_gb: float | None) -> int | None:
    """Return the bytes of a GPU's memory; None without a GPU.

    ``gpu_memory_gb`` takes the place of what is known of the target.
    """
    found = gpu_memory_gb or target.memory_gb
    return None if found is None else round(found * 1e9)


def check_room(plan: BuildPlan, tensors: Mapping[str, PackedTensor]) -> None:
    """Refuse a target whose GPU is too small for one sequence.

    Counted is what is known before the engines: weights, inputs and outputs, keys and values.

    Raises:
        UsageError: a GPU has less memory than that.
    """
    weights = sum(one.num_bytes for one in tensors.values())
    for name, record in plan.records.items():
        memory = memory_of(plan.targets[name], plan.options.gpu_memory_gb)
        if record.backend == "onnxruntime" or memory is None:
            continue
        smallest = next(iter(record.by_capacity()))
        io, cache = fixed_use(plan.model, smallest, 1)
        if weights + io + cache > memory:
            raise UsageError(
                f"{name}: expected at most {memory / 1e9:g} GB on the GPU, found"
                f" {weights / 1e9:.1f} of weights and {(io + cache) / 1e9:.1f} for one text of"
                f" {smallest.capacity} slots",
                _what_would_fit(plan, plan.targets[name], smallest, memory - weights - io),
            )


def _what_would_fit(plan: BuildPlan, target: Target, record: TargetRecord, left: int) -> str:
    _, cache = fixed_use(plan.model, record, 1)
    slots = left * (record.capacity or 1) // cache
    behind = (record.capacity or 0) - plan.model.max_length
    if slots - behind > plan.model.max_block_length:
        return (
            f"pass `max_length` below {slots - behind}, or `gpu_memory_gb` if your GPU has more;"
            " `trimode plan` tells what fits"
        )
    other = next((one for one in _NARROWER if one in target.precisions), None)
    narrower = f"pass `precision` {other}, " if other not in (None, plan.precision) else ""
    return f"{narrower}choose a larger GPU, or pass `gpu_memory_gb` if yours has more memory"

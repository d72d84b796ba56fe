"""Holds the choices of a build."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trimode.compiler.store.cache import DEFAULT_LIMIT_BYTES
from trimode.errors import UsageError
from trimode.formats.contract import MAX_BLOCK_LENGTH

MAX_BATCH = 128
Placement = Literal["shared", "baked"]


@dataclass(frozen=True)
class BuildOptions:
    """Holds what a user can choose about a build.

    Attributes:
        targets: Names of :mod:`trimode.compiler.targets`, or ``auto``.
        precision: Type of weights and activations, or of the weights of linear layers (fp8, int8,
            int4, nvfp4); None = the calibration's, else the first of the bundle that is added to,
            else the first that the GPUs prefer and all targets can run; fp32 on a CPU.
        calibration: Folder with the scales of fp8, int8, int4 or nvfp4; ``rtn``: int8, int4 or
            nvfp4 weights by rounding to nearest, without any data.
        drafter: Folder of a drafter adapter that takes the place of the checkpoint's own.
        sampler: Folder of a learned sampler of block diffusion (`trimode calibrate sampler`); a
            bundle that is added to gets it, too.
        max_length: Most tokens of prompt and answer together; None = the model's limit, at most
            32768.
        block_lengths: Block lengths that TensorRT's ``draft`` and ``verify`` are compiled for; None
            = 8, 16, 32 and the model's own.
        capacities: Lengths of texts that TensorRT engines are compiled for besides ``max_length``,
            ascending; a text runs in the smallest that holds it. None = ``max_length`` alone.
        max_batch: Most sequences in one forward of a TensorRT engine.
        quadratic: Whether the graph of quadratic self-speculation is built too; a bundle that is
            added to has it or has it not.
        quantize_head: Whether ``rtn`` quantizes the output head too; a calibration says so itself.
        exact: Whether a CPU multiplies int4 weights in float32; else inputs are rounded to int8 in
            the blocks of the weights, which is about twice as fast.
        weights: ``shared``: TensorRT engines take the weights as inputs, from the one pack;
            ``baked``: each holds its own copy.
        workspace_mib: Most scratch memory of an engine on the GPU; None = the library's choice.
        gpu_memory_gb: Memory of the GPU in 10^9 bytes; None = that of the smallest variant sold.
        timing_cache: File for TensorRT's timing cache (TensorRT-RTX has none).
        num_jobs: Engines compiled at a time; None = one a core.
        cache: Folder of traced graphs and engines; None keeps none.
        cache_limit_bytes: Size that the cache is pruned to after a build.
        force: Whether an existing bundle is replaced.
    """

    targets: tuple[str, ...] = ("cpu",)
    precision: str | None = None
    calibration: Path | Literal["rtn"] | None = None
    drafter: Path | None = None
    sampler: Path | None = None
    max_length: int | None = None
    block_lengths: tuple[int, ...] | None = None
    capacities: tuple[int, ...] | None = None
    max_batch: int = 1
    quadratic: bool = False
    quantize_head: bool = False
    exact: bool = False
    weights: Placement = "shared"
    workspace_mib: int | None = None
    gpu_memory_gb: float | None = None
    timing_cache: Path | None = None
    num_jobs: int | None = None
    cache: Path | None = None
    cache_limit_bytes: int = DEFAULT_LIMIT_BYTES
    force: bool = False

    def check(self) -> None:
        """Raise :class:`UsageError` for a value out of its range."""
        self._check_block_lengths()
        self._check_capacities()
        self._check_memory()
        if not 1 <= self.max_batch <= MAX_BATCH:
            raise UsageError(
                f"expected `max_batch` from 1 to {MAX_BATCH}, found {self.max_batch}",
                "each size costs memory; 1 is usual on a desk",
            )
        if self.quantize_head and self.calibration != "rtn":
            found = "none" if self.calibration is None else "a calibration"
            raise UsageError(
                f"`quantize_head`: expected `calibration` rtn, found {found}",
                "`trimode calibrate --quantize-head` makes a calibration with the head",
            )
        if self.weights not in ("shared", "baked"):
            raise UsageError(
                f"expected `weights` shared or baked, found {self.weights!r}",
                "shared keeps one copy for all engines",
            )
        for name, value in (("workspace_mib", self.workspace_mib), ("num_jobs", self.num_jobs)):
            if value is not None and value < 1:
                raise UsageError(
                    f"expected `{name}` of at least 1, found {value}",
                    "leave it out for the default",
                )

    def _check_block_lengths(self) -> None:
        for length in self.block_lengths or ():
            if not 1 <= length <= MAX_BLOCK_LENGTH:
                raise UsageError(
                    f"expected block lengths from 1 to {MAX_BLOCK_LENGTH}, found {length}",
                    "pass for example `block_lengths` 8,16,32",
                )
        if self.block_lengths == ():
            raise UsageError(
                "expected at least one block length, found none",
                "pass for example `block_lengths` 8,16,32",
            )

    def _check_memory(self) -> None:
        found = self.gpu_memory_gb
        if found is not None and not 0 < found < math.inf:
            raise UsageError(
                f"expected `gpu_memory_gb` above 0, found {found:g}",
                "leave it out for what the target's GPU has",
            )

    def _check_capacities(self) -> None:
        """Refuse capacities that suit no model.

        :mod:`trimode.compiler.tensorrt.capacities` checks the rest.
        """
        if self.capacities is None:
            return
        ascending = tuple(sorted(set(self.capacities)))
        if not ascending or ascending[0] < 1 or self.capacities != ascending:
            found = ",".join(map(str, self.capacities)) or "none"
            raise UsageError(
                f"expected capacities in ascending order, each once and at least 1, found {found}",
                "pass for example `capacities` 2048,8192,32768",
            )

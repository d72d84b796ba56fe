"""Declares the options of ``trimode build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        metavar="BUNDLE",
        help="Bundle folder to write, or an existing bundle of this checkpoint to extend.",
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Target to build for, repeatable; `trimode targets` lists them. [default: cpu]",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="Precision to build: fp32, fp16, bf16, fp8, int8, int4 or nvfp4; "
        "default: the bundle's first, or what the targets prefer."
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Calibration for fp8, int8, int4 or nvfp4; "
        "rtn rounds int8, int4 or nvfp4 weights to nearest without one.",
    ),
]
Drafter = Annotated[
    Path | None,
    typer.Option(
        metavar="ADAPTER",
        help="Drafter adapter that replaces the checkpoint's (from `trimode calibrate drafter`).",
    ),
]
Sampler = Annotated[
    Path | None,
    typer.Option(
        metavar="SAMPLER",
        help="Learned sampler for block diffusion (from `trimode calibrate sampler`).",
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of prompt and answer together; default: the model's limit, at most 32768."
    ),
]
BlockLengths = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...",
        help="Block lengths to compile engines for; default: 8,16,32 and the model's block size.",
    ),
]
Capacities = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...",
        help="Shorter texts to compile engines for too, as 2048,8192; default: --max-length alone.",
    ),
]
MaxBatch = Annotated[int, typer.Option(help="Most sequences in one forward of an engine.")]
Quadratic = Annotated[
    bool, typer.Option("--quadratic", help="Build the graph of quadratic self-speculation too.")
]
QuantizeHead = Annotated[
    bool,
    typer.Option("--quantize-head", help="With `--calibration rtn`: quantize the output head too."),
]
Exact = Annotated[
    bool,
    typer.Option("--exact", help="On a CPU, multiply int4 weights in float32 (half as fast)."),
]
Weights = Annotated[
    str,
    typer.Option(
        help="Placement of weights: shared (all engines read one pack) "
        "or baked (each engine holds a copy)."
    ),
]
Workspace = Annotated[
    int | None, typer.Option(metavar="MIB", help="Most scratch memory of an engine on the GPU.")
]
GpuMemory = Annotated[
    float | None,
    typer.Option(
        metavar="GB", help="Memory of the GPU in 10^9 bytes; default: the smallest variant sold."
    ),
]
TimingCache = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Timing cache of TensorRT; TensorRT-RTX has none."),
]
Jobs = Annotated[
    int | None,
    typer.Option(help="Engines to compile at the same time; default: one for each core."),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Ignore the cache of traced graphs and engines.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]

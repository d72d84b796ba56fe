"""``trimode build``: options to a bundle, and what to say about it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trimode.cli.options import CheckpointPath, Json
from trimode.cli.parse import need, parse_ints

if TYPE_CHECKING:
    from trimode.compiler.pipeline import BuildResult


def build(
    checkpoint: CheckpointPath,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="BUNDLE",
            help="Folder to write, or a bundle of this checkpoint to add to.",
        ),
    ],
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Where the bundle will run, repeatable; `trimode targets` lists them. [default: cpu]",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, bf16, fp8, int8, int4 or nvfp4; if left out the bundle's first, for a new one what its targets prefer."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Scales for fp8, int8, int4 or nvfp4; rtn rounds int8, int4 or nvfp4 weights to nearest, without calibration.",
        ),
    ] = None,
    drafter: Annotated[
        Path | None,
        typer.Option(
            metavar="ADAPTER",
            help="Drafter adapter in place of the checkpoint's own (`trimode calibrate drafter`).",
        ),
    ] = None,
    sampler: Annotated[
        Path | None,
        typer.Option(
            metavar="SAMPLER",
            help="Learned sampler of block diffusion (`trimode calibrate sampler`).",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of prompt and answer together; if left out the model's limit, at most 32768."
        ),
    ] = None,
    block_lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Block lengths to compile engines for; if left out 8, 16, 32 and the model's own.",
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Most sequences in one forward of an engine.")] = 1,
    quadratic: Annotated[
        bool, typer.Option("--quadratic", help="Build the graph of quadratic self-speculation too.")
    ] = False,
    weights: Annotated[
        str,
        typer.Option(
            help="Engines share the one pack (shared), or each holds its own copy (baked)."
        ),
    ] = "shared",
    workspace: Annotated[
        int | None, typer.Option(metavar="MIB", help="Most scratch memory of an engine on the GPU.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Timing cache of TensorRT (TensorRT-RTX has none)."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Engines compiled at a time; one a core if left out.")
    ] = None,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache", help="Neither use nor fill the cache of traced graphs and engines."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint into a bundle, for one target or several; add targets, or a precision,
    to a bundle that exists.
    """
    need("the compiler", "compile", "torch", "onnx", "onnx_ir", "onnxscript", "filelock")

    request = BuildRequest(
        tuple(target or ("cpu",)),
        precision,
        calibration,
        drafter,
        sampler,
        max_length,
        block_lengths,
        max_batch,
        quadratic,
        weights,
        workspace,
        timing_cache,
        jobs,
        no_cache,
        force,
        as_json,
    )
    run_build(checkpoint, output, request)


@dataclass(frozen=True)
class BuildRequest:
    """The command line's options, in its order."""

    targets: tuple[str, ...]
    precision: str | None
    calibration: str | None
    drafter: Path | None
    sampler: Path | None
    max_length: int | None
    block_lengths: str | None
    max_batch: int
    quadratic: bool
    weights: str
    workspace: int | None
    timing_cache: Path | None
    jobs: int | None
    no_cache: bool
    force: bool
    as_json: bool


def run_build(checkpoint: Path, output: Path, request: BuildRequest) -> None:
    """Build, with progress on stderr; say what was done, there or as JSON on stdout."""
    from trimode.cli.console import RichProgress
    from trimode.cli.output import print_json
    from trimode.compiler.options import BuildOptions
    from trimode.compiler.pipeline import build_bundle
    from trimode.runtime.bundle.cache_folder import usual_folder

    options = BuildOptions(
        targets=request.targets,
        precision=request.precision,
        calibration=_calibration(request.calibration),
        drafter=request.drafter,
        sampler=request.sampler,
        max_length=request.max_length,
        block_lengths=None
        if request.block_lengths is None
        else tuple(parse_ints(request.block_lengths)),
        max_batch=request.max_batch,
        quadratic=request.quadratic,
        weights=request.weights,  # type: ignore[arg-type]  # BuildOptions.check refuses any other
        workspace_mib=request.workspace,
        timing_cache=request.timing_cache,
        num_jobs=request.jobs,
        cache=None if request.no_cache else usual_folder(),
        force=request.force,
    )
    with RichProgress() as progress:
        result = build_bundle(checkpoint, output, options, progress)
    if request.as_json:
        print_json(_as_data(output, result))
    for line in (*_plan_warnings(output, result), _in_words(output, result)):
        sys.stderr.write(line + "\n")


def _plan_warnings(output: Path, result: BuildResult) -> list[str]:
    """What the plans of the engines that were built now give reason to say."""
    from trimode.compiler.plans.report import read_plans, warnings_of

    targets = {
        name: record for name, record in result.record.targets.items() if name in result.built
    }
    built = result.record.model_copy(update={"targets": targets})
    return list(warnings_of(read_plans(output, {result.precision: built})))


def _calibration(value: str | None) -> Path | Literal["rtn"] | None:
    """``rtn`` is the method, anything else a folder (``./rtn`` too)."""
    from trimode.graphs.numerics.scales import RTN

    if value is None or value == RTN:
        return None if value is None else RTN
    return Path(value)


def _as_data(output: Path, result: BuildResult) -> dict[str, Any]:
    manifest = result.manifest
    return {
        "bundle": str(output),
        "precision": result.precision,
        "precisions": list(manifest.precisions),
        "targets": list(result.record.targets),
        "built": list(result.built),
        "sampler": None if manifest.sampler is None else manifest.sampler.name,
        "cached_engines": result.num_cached,
        "num_bytes": sum(record.num_bytes for record in manifest.files.values()),
    }


def _in_words(output: Path, result: BuildResult) -> str:
    from trimode.compiler.plan import SAMPLER_FILE

    manifest = result.manifest
    size = sum(record.num_bytes for record in manifest.files.values()) / 1e6
    if not result.built and result.has_new_sampler:
        return f"added a sampler to {output}: {result.manifest.files[SAMPLER_FILE].num_bytes / 1e6:.1f} MB, {size:.1f} MB with all else"
    if not result.built:
        return f"{output} is up to date: {', '.join(result.record.targets)} in {result.precision}, {size:.1f} MB"
    others = [name for name in manifest.precisions if name != result.precision]
    beside = f" beside {', '.join(others)}" if others else ""
    cached = f" ({result.num_cached} engines from the cache)" if result.num_cached else ""
    return f"built {output}: {', '.join(result.built)} in {result.precision}{beside}, {size:.1f} MB{cached}"

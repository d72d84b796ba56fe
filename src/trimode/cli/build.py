"""Implements ``trimode build``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimode.cli.flags import BUILD_FLAGS, flags_in_errors
from trimode.cli.options import build as options
from trimode.cli.options.shared import CheckpointPath, Json
from trimode.cli.parse import need, parse_optional_ints

if TYPE_CHECKING:
    from trimode.compiler.options import BuildOptions
    from trimode.compiler.pipeline import BuildResult


def build(
    checkpoint: CheckpointPath,
    *,
    output: options.Output,
    target: options.Targets = None,
    precision: options.Precision = None,
    calibration: options.Calibration = None,
    drafter: options.Drafter = None,
    sampler: options.Sampler = None,
    max_length: options.MaxLength = None,
    block_lengths: options.BlockLengths = None,
    capacities: options.Capacities = None,
    max_batch: options.MaxBatch = 1,
    quadratic: options.Quadratic = False,
    quantize_head: options.QuantizeHead = False,
    exact: options.Exact = False,
    weights: options.Weights = "shared",
    workspace: options.Workspace = None,
    gpu_memory: options.GpuMemory = None,
    timing_cache: options.TimingCache = None,
    jobs: options.Jobs = None,
    no_cache: options.NoCache = False,
    force: options.Force = False,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint into a bundle, or add to a bundle.

    Targets and precisions can be added.
    """
    need("the compiler", "compile", "torch", "onnx", "onnx_ir", "onnxscript", "filelock")
    from trimode.compiler.options import BuildOptions
    from trimode.runtime.bundle.cache_folder import usual_folder

    chosen = BuildOptions(
        targets=tuple(target or ("cpu",)),
        precision=precision,
        calibration=read_calibration(calibration),
        drafter=drafter,
        sampler=sampler,
        max_length=max_length,
        block_lengths=parse_optional_ints(block_lengths),
        capacities=parse_optional_ints(capacities),
        max_batch=max_batch,
        quadratic=quadratic,
        quantize_head=quantize_head,
        exact=exact,
        weights=weights,  # type: ignore[arg-type]  # BuildOptions.check refuses any other
        workspace_mib=workspace,
        gpu_memory_gb=gpu_memory,
        timing_cache=timing_cache,
        num_jobs=jobs,
        cache=None if no_cache else usual_folder(),
        force=force,
    )
    run_build(checkpoint, output, chosen, as_json=as_json)


def run_build(checkpoint: Path, output: Path, chosen: BuildOptions, *, as_json: bool) -> None:
    """Build with progress on stderr; report there or as JSON."""
    from trimode.cli.console import RichProgress
    from trimode.cli.output import print_json
    from trimode.compiler.pipeline import build_bundle

    with flags_in_errors(BUILD_FLAGS), RichProgress() as progress:
        result = build_bundle(checkpoint, output, chosen, progress)
    if as_json:
        print_json(_as_data(output, result))
    for line in (*_plan_warnings(output, result), _in_words(output, result)):
        sys.stderr.write(line + "\n")


def _plan_warnings(output: Path, result: BuildResult) -> list[str]:
    """Return what the plans of newly built engines give reason to say."""
    from trimode.compiler.plans.report import read_plans, warnings_of

    targets = {
        name: record for name, record in result.record.targets.items() if name in result.built
    }
    built = result.record.model_copy(update={"targets": targets})
    return list(warnings_of(read_plans(output, {result.precision: built})))


def read_calibration(value: str | None) -> Path | Literal["rtn"] | None:
    """Parse ``rtn`` as the method, anything else as a folder.

    ``./rtn`` is a folder, too.
    """
    from trimode.graphs.numerics.quantization import RTN

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
    from trimode.cli.inspect import held_weights
    from trimode.compiler.plan import SAMPLER_FILE

    manifest = result.manifest
    size = sum(record.num_bytes for record in manifest.files.values()) / 1e6
    if not result.built and result.has_new_sampler:
        return (
            f"added a sampler to {output}: "
            f"{result.manifest.files[SAMPLER_FILE].num_bytes / 1e6:.1f} MB, {size:.1f} MB "
            "with all else"
        )
    if not result.built:
        return (
            f"{output} is up to date: {', '.join(result.record.targets)} in "
            f"{result.precision}, {size:.1f} MB"
        )
    others = [name for name in manifest.precisions if name != result.precision]
    beside = f" beside {', '.join(others)}" if others else ""
    cached = f" ({result.num_cached} engines from the cache)" if result.num_cached else ""
    built = {name: result.record.targets[name] for name in result.built}
    return "\n".join(
        [
            f"built {output}: {', '.join(built)} in {result.precision}{beside}, {size:.1f} "
            f"MB{cached}",
            *held_weights(built),
        ]
    )

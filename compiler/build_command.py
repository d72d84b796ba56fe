"""``trimode build``: options to a bundle, and what to say about it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimode.compiler.cli import parse_ints
from trimode.compiler.console import RichProgress
from trimode.compiler.options import BuildOptions
from trimode.compiler.output import print_json
from trimode.compiler.pipeline import BuildResult, build_bundle
from trimode.compiler.plans.report import read_plans, warnings_of
from trimode.compiler.quantize.scales import RTN
from trimode.compiler.sampler import SAMPLER_FILE
from trimode.runtime.cache_folder import usual_folder


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
    options = BuildOptions(
        targets=request.targets,
        precision=request.precision,
        calibration=_calibration(request.calibration),
        drafter=request.drafter,
        sampler=request.sampler,
        max_length=request.max_length,
        block_lengths=None if request.block_lengths is None else tuple(parse_ints(request.block_lengths)),
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
    targets = {name: record for name, record in result.record.targets.items() if name in result.built}
    built = result.record.model_copy(update={"targets": targets})
    return list(warnings_of(read_plans(output, {result.precision: built})))


def _calibration(value: str | None) -> Path | Literal["rtn"] | None:
    """``rtn`` is the method, anything else a folder (``./rtn`` too)."""
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

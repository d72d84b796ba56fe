"""Builds a bundle from a checkpoint, stage by stage. Start reading here.

A stage takes the state of the build and adds to it. A new bundle appears under its name only when
the last stage is done. A bundle that exists already gets the precision and the targets it lacks,
and is whole all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from trimode.compiler.additions import check_same, drop_targets, read_existing, without_built
from trimode.compiler.memory.room import check_room
from trimode.compiler.options import BuildOptions
from trimode.compiler.pack.layout import read_tensors
from trimode.compiler.pack.writer import PackWriter
from trimode.compiler.plan import BuildPlan, make_plan
from trimode.compiler.stages.engines import compile_targets
from trimode.compiler.stages.extras import copy_tokenizer, export_sampler
from trimode.compiler.stages.graphs import write_graphs
from trimode.compiler.stages.manifest import describe_additions, describe_bundle
from trimode.compiler.stages.pack import (
    check_weights,
    finish_weights,
    lay_out_beside,
    lay_out_pack,
    start_weights,
)
from trimode.compiler.stages.plans import record_plans
from trimode.compiler.stages.state import AddedPrecision, Addition, BuildState, NewBundle
from trimode.compiler.stages.trace import trace_graphs
from trimode.compiler.store.cache import ContentCache
from trimode.compiler.store.staging import (
    added_to_bundle,
    check_destination,
    check_space,
    staged_folder,
)
from trimode.compiler.toolchain import require_toolchain
from trimode.formats.manifest import MANIFEST, Manifest, PrecisionName, PrecisionRecord
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.identity import SourceDigest
from trimode.progress import Progress, Silent
from trimode.runtime.bundle.weights import PrecisionWeights

NEW_BUNDLE: tuple[Callable[[NewBundle], None], ...] = (
    start_weights,
    trace_graphs,
    check_weights,
    write_graphs,
    export_sampler,
    check_weights,
    compile_targets,
    record_plans,
    copy_tokenizer,
    finish_weights,
    check_weights,
    describe_bundle,
)
ADDED_PRECISION: tuple[Callable[[AddedPrecision], None], ...] = (
    start_weights,
    trace_graphs,
    check_weights,
    write_graphs,
    export_sampler,
    check_weights,
    compile_targets,
    record_plans,
    finish_weights,
    describe_additions,
)
ADDED_TARGETS: tuple[Callable[[Addition], None], ...] = (
    trace_graphs,
    export_sampler,
    compile_targets,
    record_plans,
    describe_additions,
)
ADDED_SAMPLER: tuple[Callable[[Addition], None], ...] = (export_sampler, describe_additions)
S = TypeVar("S", bound=BuildState)


@dataclass(frozen=True)
class BuildResult:
    """Says what a build did.

    Attributes:
        manifest: Manifest of the bundle as it is now.
        precision: Precision that was built, or added to.
        built: Targets that were added to it; none where the bundle had them all.
        num_cached: Number of engines that came from the cache.
        has_new_sampler: Whether a learned sampler was added.
    """

    manifest: Manifest
    precision: PrecisionName
    built: tuple[str, ...]
    num_cached: int
    has_new_sampler: bool = False

    @property
    def record(self) -> PrecisionRecord:
        """The manifest's record of the precision."""
        return self.manifest.precisions[self.precision]


def build_bundle(
    checkpoint: Path,
    output: Path,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Build a bundle, or add to one.

    A precision, targets or a learned sampler can be added.

    Args:
        checkpoint: Folder of a Hugging Face checkpoint.
        output: Folder to create, or a bundle of the same checkpoint.
        options: Choices of the build; None takes the usual ones.
        progress: Listener that is told about stages; None is silent.

    Raises:
        UsageError: an option is out of range, or ``output`` is something else than a bundle of this
            checkpoint.
        CheckpointError: the checkpoint is incomplete or not of this family, a weight is NaN or
            infinite, or the calibration or the sampler does not belong to it.
        DependencyError: the library that compiles for a target is not installed.
        BundleError: the tokenizer or the chat template cannot be used with the model.
        BuildError: a target cannot be compiled for here, a weight is too large for its type, or the
            bundle could not be written; what was there before still is.
    """
    options, progress = options or BuildOptions(), progress or Silent()
    options.check()
    scales = options.calibration if isinstance(options.calibration, Path) else None
    check_destination(output, checkpoint, scales, options.drafter, options.sampler)
    opened = open_checkpoint(checkpoint, options.drafter)
    base = None if options.force else read_existing(output)
    plan = make_plan(opened, options, base)
    cache = ContentCache(options.cache, options.cache_limit_bytes) if options.cache else None
    build = _Build(plan, output, progress, cache)
    result = _create(build) if base is None else _extend(build, base)
    if cache is not None and result.built:
        cache.prune()
    return result


@dataclass(frozen=True)
class _Build:
    """Holds what a build is given, whatever its kind."""

    plan: BuildPlan
    output: Path
    progress: Progress
    cache: ContentCache | None

    def check_toolchain(self) -> None:
        for target in self.plan.targets.values():
            require_toolchain(target)


def _create(build: _Build) -> BuildResult:
    plan, source = build.plan, SourceDigest(build.plan.checkpoint)
    build.check_toolchain()
    layout = lay_out_pack(plan, source.read)
    check_room(plan, layout.tensors)
    with staged_folder(build.output, force=plan.options.force) as folder:
        check_space(build.output, layout.num_bytes)
        pack = folder / plan.names.pack
        state = NewBundle(
            plan=plan,
            progress=build.progress,
            cache=build.cache,
            folder=folder,
            packs=[pack],
            tensors=layout.tensors,
            writer=PackWriter(layout, pack),
            source=source,
        )
        return _run(NEW_BUNDLE, state)


def _extend(build: _Build, base: Manifest) -> BuildResult:
    check_same(base, build.output, build.plan, build.progress)
    plan = without_built(build.plan, base)
    build = replace(build, plan=plan)
    if not plan.targets and plan.sampler is None:
        return BuildResult(base, plan.precision, (), 0)
    build.check_toolchain()
    rest = drop_targets(base, plan.precision, list(plan.targets))
    folders = [plan.names.target(name) for name in plan.targets]
    with added_to_bundle(build.output, base, rest, folders) as folder:
        if plan.precision in base.precisions:
            return _add_targets(build, base, folder)
        return _add_precision(build, base, folder)


def _add_targets(build: _Build, base: Manifest, folder: Path) -> BuildResult:
    packs = [build.output / name for name in base.precisions[build.plan.precision].packs]
    state = Addition(
        plan=build.plan,
        progress=build.progress,
        cache=build.cache,
        folder=folder,
        packs=packs,
        tensors=read_tensors(PrecisionWeights(packs)),
        base=base,
    )
    return _run(ADDED_TARGETS if build.plan.targets else ADDED_SAMPLER, state)


def _add_precision(build: _Build, base: Manifest, folder: Path) -> BuildResult:
    layout, packs = lay_out_beside(base, build.plan, build.output, folder)
    check_space(build.output, layout.num_bytes)
    state = AddedPrecision(
        plan=build.plan,
        progress=build.progress,
        cache=build.cache,
        folder=folder,
        packs=packs,
        tensors=layout.tensors,
        base=base,
        writer=PackWriter(layout, packs[0]),
    )
    return _run(ADDED_PRECISION, state)


def _run(stages: Iterable[Callable[[S], None]], state: S) -> BuildResult:
    try:
        for stage in stages:
            stage(state)
    finally:
        state.stop()
    (state.folder / MANIFEST).write_text(
        state.manifest.model_dump_json(indent=1) + "\n", encoding="utf-8"
    )
    return BuildResult(
        state.manifest,
        state.plan.precision,
        tuple(state.plan.targets),
        state.num_cached,
        state.plan.sampler is not None,
    )

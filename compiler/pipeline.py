"""Builds a bundle from a checkpoint, stage by stage. Start reading here.

A stage takes the state of the build and adds to it. A new bundle appears under its name only when
the last stage is done. A bundle that exists already gets the precision and the targets it lacks,
and is whole all the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trimode.compiler.additions import check_same, drop_targets, read_existing, without_built
from trimode.compiler.options import BuildOptions
from trimode.compiler.pack.layout import read_tensors
from trimode.compiler.plan import BuildPlan, make_plan
from trimode.compiler.stages.engines import compile_targets
from trimode.compiler.stages.extras import copy_tokenizer, export_sampler
from trimode.compiler.stages.graphs import write_graphs
from trimode.compiler.stages.manifest import describe_additions, describe_bundle
from trimode.compiler.stages.pack import finish_weights, lay_out_beside, lay_out_pack, start_weights
from trimode.compiler.stages.plans import record_plans
from trimode.compiler.stages.state import BuildState
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
from trimode.progress import Progress, Silent
from trimode.runtime.bundle.weights import PrecisionWeights

Stages = tuple[Callable[[BuildState], None], ...]
NEW_BUNDLE: Stages = (
    start_weights,
    trace_graphs,
    write_graphs,
    export_sampler,
    compile_targets,
    record_plans,
    copy_tokenizer,
    finish_weights,
    describe_bundle,
)
ADDED_PRECISION: Stages = (
    start_weights,
    trace_graphs,
    write_graphs,
    export_sampler,
    compile_targets,
    record_plans,
    finish_weights,
    describe_additions,
)
ADDED_TARGETS: Stages = (
    trace_graphs,
    export_sampler,
    compile_targets,
    record_plans,
    describe_additions,
)
ADDED_SAMPLER: Stages = (export_sampler, describe_additions)


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
    """Build a bundle, or add a precision, targets or a learned sampler to one.

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
    result = (
        _create(plan, output, progress, cache)
        if base is None
        else _extend(base, plan, output, progress, cache)
    )
    if cache is not None and result.built:
        cache.prune()
    return result


def _create(
    plan: BuildPlan, output: Path, progress: Progress, cache: ContentCache | None
) -> BuildResult:
    for target in plan.targets.values():
        require_toolchain(target)
    layout, source = lay_out_pack(plan)
    with staged_folder(output, force=plan.options.force) as folder:
        check_space(output, layout.num_bytes)
        packs, tensors = [folder / plan.names.pack], layout.tensors
        state = BuildState(plan, progress, cache, folder, packs, tensors, layout, source)
        return _run(NEW_BUNDLE, state)


def _extend(
    base: Manifest, plan: BuildPlan, output: Path, progress: Progress, cache: ContentCache | None
) -> BuildResult:
    check_same(base, output, plan, progress)
    plan = without_built(plan, base)
    if not plan.targets and plan.sampler is None:
        return BuildResult(base, plan.precision, (), 0)
    for target in plan.targets.values():
        require_toolchain(target)
    rest = drop_targets(base, plan.precision, list(plan.targets))
    folders = [plan.names.target(name) for name in plan.targets]
    with added_to_bundle(output, base, rest, folders) as folder:
        if plan.precision in base.precisions:
            packs = [output / name for name in base.precisions[plan.precision].packs]
            tensors = read_tensors(PrecisionWeights(packs))
            state = BuildState(plan, progress, cache, folder, packs, tensors, base=base)
            return _run(ADDED_TARGETS if plan.targets else ADDED_SAMPLER, state)
        layout, packs = lay_out_beside(base, plan, output, folder)
        check_space(output, layout.num_bytes)
        tensors = layout.tensors
        state = BuildState(plan, progress, cache, folder, packs, tensors, layout, base=base)
        return _run(ADDED_PRECISION, state)


def _run(stages: Stages, state: BuildState) -> BuildResult:
    try:
        for stage in stages:
            stage(state)
            state.check_weights()
    finally:
        if state.writer is not None:
            state.writer.stop()
    assert state.manifest is not None
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

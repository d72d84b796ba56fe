"""checkpoint -> bundle, as a flat list of stages. Start reading here.

A stage takes the state of the build and adds to it. A new bundle appears under its name only when the last stage is done; a bundle that
exists already gets the targets it lacks, and is whole before, between and after.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trimode
from trimode.compiler.backends import Graphs, compile_engines, lower_portable, write_lowered_graphs
from trimode.compiler.cache import ContentCache
from trimode.compiler.existing import check_same, drop_targets, read_existing, without_built
from trimode.compiler.graphfile import check_graph, save_graph
from trimode.compiler.options import BuildOptions
from trimode.compiler.plan import BuildPlan, make_plan
from trimode.compiler.progress import Progress, Silent
from trimode.compiler.staging import added_to_bundle, check_destination, check_space, staged_folder
from trimode.compiler.toolchain import require_toolchain
from trimode.compiler.traced import traced_graph
from trimode.compiler.weights import PackLayout, PackWriter, plan_pack, read_layout
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.contract import ROLES, graph_contract
from trimode.graphs.source import SourceDigest, stamp_of
from trimode.runtime.bundle import sha256_of
from trimode.runtime.manifest import MANIFEST, SCHEMA_VERSION, WEIGHTS, FileRecord, GraphRecord, Manifest, PackRecord, SourceRecord

LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
COPIED_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class BuildResult:
    """What a build did.

    Attributes:
        manifest: of the bundle as it is now.
        built: targets that were added; none where the bundle had them all.
        num_cached: engines that came from the cache.
    """

    manifest: Manifest
    built: tuple[str, ...]
    num_cached: int


@dataclass
class BuildState:
    """What the stages hand on.

    Attributes:
        folder: where files are written; it becomes the bundle, or part of it.
        pack: path of the weight pack; outside ``folder`` where the bundle exists already.
        source: digest of the checkpoint, complete when the pack is written; None where no pack is written.
        base: manifest of the bundle that exists already.
    """

    plan: BuildPlan
    progress: Progress
    cache: ContentCache | None
    folder: Path
    pack: Path
    layout: PackLayout
    source: SourceDigest | None = None
    base: Manifest | None = None
    graphs: Graphs = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    writer: PackWriter | None = None
    num_cached: int = 0
    manifest: Manifest | None = None

    def record(self, name: str, sha256: str | None = None) -> None:
        """Enter a written file into the manifest's list."""
        path = self.folder / name
        self.files[name] = FileRecord(sha256=sha256 or sha256_of(path), num_bytes=path.stat().st_size)

    def pack_sha256(self) -> str:
        """Digest of the weight pack, once it is written."""
        if self.writer is not None:
            return self.writer.result()
        assert self.base is not None
        return self.base.files[self.base.weights.file].sha256

    def check_weights(self) -> None:
        """Raise what writing the pack raised, or that the calibration is of another checkpoint, as soon as it is known."""
        if self.writer is not None and self.writer.check() and self.source is not None and self.plan.quantization is not None:
            self.plan.quantization.check_source(self.source.base_hexdigest())


def build_bundle(checkpoint: Path, output: Path, options: BuildOptions | None = None, progress: Progress | None = None) -> BuildResult:
    """Build a bundle, or add targets to one.

    Args:
        checkpoint: folder of a Hugging Face checkpoint.
        output: folder to create, or a bundle of the same checkpoint.
        options: see :class:`~trimode.compiler.options.BuildOptions`.
        progress: told about stages; None = silent.

    Raises:
        UsageError: an option is out of range, or ``output`` is something else than a bundle of this checkpoint.
        CheckpointError: the checkpoint is incomplete or not of this family, or the calibration does not belong to it.
        DependencyError: the library that compiles for a target is not installed.
        BuildError: a target cannot be compiled for here, or the bundle could not be written; what was there before still is.
    """
    options, progress = options or BuildOptions(), progress or Silent()
    options.check()
    check_destination(output)
    opened = open_checkpoint(checkpoint, options.drafter)
    base = None if options.force else read_existing(output)
    plan = make_plan(opened, options, base)
    cache = ContentCache(options.cache, options.cache_limit_bytes) if options.cache else None
    result = _create(plan, output, progress, cache) if base is None else _extend(base, plan, output, progress, cache)
    if cache is not None and result.built:
        cache.prune()
    return result


def _create(plan: BuildPlan, output: Path, progress: Progress, cache: ContentCache | None) -> BuildResult:
    for target in plan.targets.values():
        require_toolchain(target)
    layout, source = plan_pack(plan.checkpoint, plan.model.num_positions, plan.dtype, plan.quantization)
    with staged_folder(output, force=plan.options.force) as folder:
        check_space(output, layout.num_bytes)
        return _run(NEW_BUNDLE, BuildState(plan, progress, cache, folder, folder / WEIGHTS, layout, source))


def _extend(base: Manifest, plan: BuildPlan, output: Path, progress: Progress, cache: ContentCache | None) -> BuildResult:
    check_same(base, output, plan, progress)
    plan = without_built(plan, base)
    if not plan.targets:
        return BuildResult(base, (), 0)
    for target in plan.targets.values():
        require_toolchain(target)
    pack = output / base.weights.file
    layout = read_layout(pack)
    with added_to_bundle(output, base, drop_targets(base, list(plan.targets)), list(plan.targets)) as folder:
        return _run(ADDED_TARGETS, BuildState(plan, progress, cache, folder, pack, layout, base=base))


def _run(stages: tuple[Callable[[BuildState], None], ...], state: BuildState) -> BuildResult:
    try:
        for stage in stages:
            stage(state)
            state.check_weights()
    finally:
        if state.writer is not None:
            state.writer.stop()
    assert state.manifest is not None
    (state.folder / MANIFEST).write_text(state.manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return BuildResult(state.manifest, tuple(state.plan.targets), state.num_cached)


def trace_graphs(state: BuildState) -> None:
    """One graph per role, under fake tensors."""
    advance = state.progress.stage("trace graphs", len(ROLES))
    for role in ROLES:
        state.graphs[role] = traced_graph(role, state.plan.checkpoint, state.plan.model, state.cache)
        advance(1)


def start_weights(state: BuildState) -> None:
    """Begin to copy the checkpoint into one pack: it waits for the disk while the next stages keep the processor busy."""
    state.writer = PackWriter(state.layout, state.pack, state.progress.stage("write weights", state.layout.num_bytes))


def finish_weights(state: BuildState) -> None:
    """Wait for the pack."""
    state.record(WEIGHTS, state.pack_sha256())


def write_graphs(state: BuildState) -> None:
    """Save the portable graphs beside the pack they refer to, and check them."""
    advance = state.progress.stage("write graphs", len(ROLES))
    for role, graph in state.graphs.items():
        path = state.folder / f"{role}.onnx"
        save_graph(lower_portable(state.plan.dtype, graph, state.layout.tensors), state.layout, state.pack, path)
        check_graph(path)
        state.record(path.name)
        advance(1)


def compile_targets(state: BuildState) -> None:
    """Lower the graphs for each target and compile its engines; those that copy the weights wait for the pack."""
    write_lowered_graphs(state.plan, state.graphs, state.layout, state.folder)
    is_baked = any(record.placement == "baked" for record in state.plan.records.values())
    state.num_cached = compile_engines(
        state.plan, state.graphs, state.layout, state.pack, state.pack_sha256() if is_baked else None, state.folder, state.cache, state.progress
    )
    for record in state.plan.records.values():
        for engine in record.graphs.values():
            if engine.file not in state.files and (state.folder / engine.file).is_file():  # portable graphs are recorded already
                state.record(engine.file)


def copy_tokenizer(state: BuildState) -> None:
    """Copy the files that turn text into tokens; a checkpoint without them gives a bundle that takes token ids only."""
    advance = state.progress.stage("copy tokenizer", len(COPIED_FILES))
    for name in COPIED_FILES:
        if (state.plan.checkpoint.path / name).is_file():
            shutil.copyfile(state.plan.checkpoint.path / name, state.folder / name)
            state.record(name)
        advance(1)


def describe_bundle(state: BuildState) -> None:
    """The manifest of a new bundle."""
    plan, checkpoint = state.plan, state.plan.checkpoint
    assert plan.precision != "nvfp4"
    assert state.source is not None
    state.manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        trimode_version=trimode.__version__,
        precision=plan.precision,
        calibration=plan.quantization.record if plan.quantization else None,
        model=plan.model,
        source=SourceRecord(
            name=checkpoint.path.resolve().name,
            sha256=state.source.hexdigest(),
            stamp=stamp_of(checkpoint),
            num_parameters=sum(tensor.num_elements for name, tensor in state.layout.tensors.items() if name in checkpoint.tensors),
        ),
        graphs={role: GraphRecord(file=f"{role}.onnx", contract=graph_contract(role, plan.model)) for role in ROLES},
        weights=PackRecord(file=WEIGHTS, dtype=plan.dtype),
        targets=plan.records,
        files=state.files,
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
    )


def describe_additions(state: BuildState) -> None:
    """The manifest of the bundle with its new targets."""
    assert state.base is not None
    rest = drop_targets(state.base, list(state.plan.targets))
    state.manifest = rest.model_copy(update={"targets": {**rest.targets, **state.plan.records}, "files": {**rest.files, **state.files}})


NEW_BUNDLE = (start_weights, trace_graphs, write_graphs, compile_targets, copy_tokenizer, finish_weights, describe_bundle)
ADDED_TARGETS = (trace_graphs, compile_targets, describe_additions)

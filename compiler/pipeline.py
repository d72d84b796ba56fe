"""checkpoint -> bundle, as a flat list of stages. Start reading here.

A stage takes the state of the build and adds to it. A new bundle appears under its name only when the last stage is done; a bundle that
exists already gets the precision and the targets it lacks, and is whole before, between and after.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import trimode
from trimode.compiler.backends import Graphs, Packs, compile_engines, lower_portable, write_lowered_graphs
from trimode.compiler.cache import ContentCache
from trimode.compiler.existing import check_same, drop_targets, read_existing, without_built
from trimode.compiler.fingerprint import LIBRARIES
from trimode.compiler.graphfile import check_graph, save_graph
from trimode.compiler.options import BuildOptions
from trimode.compiler.plan import BuildPlan, make_plan
from trimode.compiler.progress import Progress, Silent
from trimode.compiler.quantize.constants import known_scales, read_scales
from trimode.compiler.sampler import SAMPLER_FILE, write_sampler
from trimode.compiler.staging import added_to_bundle, check_destination, check_space, staged_folder
from trimode.compiler.toolchain import require_toolchain
from trimode.compiler.traced import traced_graph
from trimode.compiler.weights import PackedTensor, PackLayout, PackWriter, held_in, plan_pack, read_tensors
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.contract import graph_contract
from trimode.graphs.quantization import Floats, scale_of
from trimode.graphs.source import SourceDigest, stamp_of
from trimode.runtime.bundle import sha256_of
from trimode.runtime.manifest import MANIFEST, SCHEMA_VERSION, FileRecord, Manifest, PrecisionName, PrecisionRecord, SourceRecord
from trimode.runtime.pack import PrecisionWeights
from trimode.runtime.text_files import text_files
from trimode.texts import name_of

CONFIG_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class BuildResult:
    """What a build did.

    Attributes:
        manifest: of the bundle as it is now.
        precision: that was built, or added to.
        built: targets that were added to it; none where the bundle had them all.
        num_cached: engines that came from the cache.
        has_new_sampler: whether a learned sampler was added to it.
    """

    manifest: Manifest
    precision: PrecisionName
    built: tuple[str, ...]
    num_cached: int
    has_new_sampler: bool = False

    @property
    def record(self) -> PrecisionRecord:
        """What the manifest says of the precision."""
        return self.manifest.precisions[self.precision]


@dataclass
class BuildState:
    """What the stages hand on.

    Attributes:
        folder: where files are written; it becomes the bundle, or part of it.
        packs: paths of the precision's weight packs, its own first; outside ``folder`` where the bundle has them already.
        tensors: what lies where in them.
        layout: of the pack that is written; None where the precision is there already.
        source: digest of the checkpoint, complete when the pack is written; None where the bundle exists already, which was compared with it.
        base: manifest of the bundle that exists already.
    """

    plan: BuildPlan
    progress: Progress
    cache: ContentCache | None
    folder: Path
    packs: list[Path]
    tensors: dict[str, PackedTensor]
    layout: PackLayout | None = None
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

    def pack_sha256(self, path: Path) -> str:
        """Digest of a weight pack, once it is written."""
        if self.base is not None and path.name in self.base.files:
            return self.base.files[path.name].sha256
        assert self.writer is not None
        return self.writer.result()

    def check_weights(self) -> None:
        """Raise what writing the pack raised, or that calibration or sampler are of another checkpoint, as soon as it is known."""
        if self.writer is None or not self.writer.check() or self.source is None:
            return
        if self.plan.quantization is not None:
            self.plan.quantization.check_source(self.source.base_hexdigest())
        if self.plan.sampler is not None:
            self.plan.sampler.check_source(self.source.base_hexdigest())


def build_bundle(checkpoint: Path, output: Path, options: BuildOptions | None = None, progress: Progress | None = None) -> BuildResult:
    """Build a bundle, or add a precision, targets or a learned sampler to one.

    Args:
        checkpoint: folder of a Hugging Face checkpoint.
        output: folder to create, or a bundle of the same checkpoint.
        options: see :class:`~trimode.compiler.options.BuildOptions`.
        progress: told about stages; None = silent.

    Raises:
        UsageError: an option is out of range, or ``output`` is something else than a bundle of this checkpoint.
        CheckpointError: the checkpoint is incomplete or not of this family, a weight is NaN or infinite, or the calibration or the sampler does
            not belong to it.
        DependencyError: the library that compiles for a target is not installed.
        BundleError: the tokenizer or the chat template cannot be used with the model.
        BuildError: a target cannot be compiled for here, a weight is too large for its type, or the bundle could not be written; what was there
            before still is.
    """
    options, progress = options or BuildOptions(), progress or Silent()
    options.check()
    scales = options.calibration if isinstance(options.calibration, Path) else None
    check_destination(output, checkpoint, scales, options.drafter, options.sampler)
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
    layout, source = plan_pack(plan.checkpoint, plan.model.num_positions, plan.dtype, plan.quantization, file=plan.names.pack)
    with staged_folder(output, force=plan.options.force) as folder:
        check_space(output, layout.num_bytes)
        return _run(NEW_BUNDLE, BuildState(plan, progress, cache, folder, [folder / plan.names.pack], layout.tensors, layout, source))


def _extend(base: Manifest, plan: BuildPlan, output: Path, progress: Progress, cache: ContentCache | None) -> BuildResult:
    check_same(base, output, plan, progress)
    plan = without_built(plan, base)
    if not plan.targets and plan.sampler is None:
        return BuildResult(base, plan.precision, (), 0)
    for target in plan.targets.values():
        require_toolchain(target)
    rest = drop_targets(base, plan.precision, list(plan.targets))
    with added_to_bundle(output, base, rest, [plan.names.target(name) for name in plan.targets]) as folder:
        if plan.precision in base.precisions:
            packs = [output / name for name in base.precisions[plan.precision].packs]
            return _run(
                ADDED_TARGETS if plan.targets else ADDED_SAMPLER,
                BuildState(plan, progress, cache, folder, packs, read_tensors(PrecisionWeights(packs)), base=base),
            )
        held = held_in(output / name for name in _all_packs(base))
        layout, _ = plan_pack(plan.checkpoint, plan.model.num_positions, plan.dtype, plan.quantization, file=plan.names.pack, held=held)
        check_space(output, layout.num_bytes)
        used = {tensor.file for tensor in layout.tensors.values()}
        packs = [folder / plan.names.pack, *(output / name for name in _all_packs(base) if name in used)]
        return _run(ADDED_PRECISION, BuildState(plan, progress, cache, folder, packs, layout.tensors, layout, base=base))


def _all_packs(base: Manifest) -> list[str]:
    return list(dict.fromkeys(name for record in base.precisions.values() for name in record.packs))


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
    return BuildResult(state.manifest, state.plan.precision, tuple(state.plan.targets), state.num_cached, state.plan.sampler is not None)


def trace_graphs(state: BuildState) -> None:
    """One graph per role, under fake tensors."""
    advance = state.progress.stage("trace graphs", len(state.plan.roles))
    for role in state.plan.roles:
        state.graphs[role] = traced_graph(role, state.plan.checkpoint, state.plan.model, state.cache)
        advance(1)


def start_weights(state: BuildState) -> None:
    """Begin to copy the checkpoint into one pack: it waits for the disk while the next stages keep the processor busy."""
    assert state.layout is not None
    state.writer = PackWriter(state.layout, state.packs[0], state.progress.stage("write weights", state.layout.num_bytes))


def finish_weights(state: BuildState) -> None:
    """Wait for the pack."""
    state.record(state.packs[0].name, state.pack_sha256(state.packs[0]))


def write_graphs(state: BuildState) -> None:
    """Save the portable graphs beside the packs they refer to, and check them."""
    advance = state.progress.stage("write graphs", len(state.plan.roles))
    with _stand_ins(state.packs, state.folder):
        for role, graph in state.graphs.items():
            path = state.folder / state.plan.names.graph(role)
            save_graph(lower_portable(state.plan.dtype, graph, state.tensors), state.tensors, path)
            check_graph(path)
            state.record(path.name)
            advance(1)


@contextlib.contextmanager
def _stand_ins(packs: list[Path], folder: Path) -> Iterator[None]:
    """For the time of a check, files of the size of those packs that lie elsewhere: ONNX refuses links and other folders."""
    away = [pack for pack in packs if pack.parent != folder]
    for pack in away:
        with (folder / pack.name).open("wb") as stream:
            stream.truncate(pack.stat().st_size)  # takes no room on the disk
    try:
        yield
    finally:
        for pack in away:
            (folder / pack.name).unlink()


def compile_targets(state: BuildState) -> None:
    """Lower the graphs for each target and compile its engines; those that copy the weights wait for the pack."""
    write_lowered_graphs(state.plan, state.graphs, state.tensors, state.folder)
    is_baked = any(record.placement == "baked" for record in state.plan.records.values())
    packs: Packs | None = {path: state.pack_sha256(path) for path in state.packs} if is_baked else None
    state.num_cached = compile_engines(
        state.plan, state.graphs, state.tensors, packs, state.folder, state.cache, state.progress, _constant_scales(state)
    )
    for record in state.plan.records.values():
        for engine in record.graphs.values():
            if engine.file not in state.files and (state.folder / engine.file).is_file():  # portable graphs are recorded already
                state.record(engine.file)


def _constant_scales(state: BuildState) -> Mapping[str, Floats]:
    """The scales that become part of engines, by name: from the calibration, or from the pack."""
    if state.plan.precision in ("fp8", "int8") and any(record.backend == "tensorrt_rtx" for record in state.plan.records.values()):
        return _scales_of_8_bits(state)
    if state.plan.precision != "nvfp4":
        return {}
    if state.plan.quantization is not None:
        given = {f"{layer}.input_scale": scales.input_amax for layer, scales in state.plan.quantization.layers.items()}
        return {name: scale_of(amax, "nvfp4", "float32") for name, amax in given.items() if amax is not None}
    weights = PrecisionWeights(state.packs)
    return {name: np.array(weights.widened(name)) for name in weights.entries if name.endswith(".input_scale")}


def _scales_of_8_bits(state: BuildState) -> Mapping[str, Floats]:
    known = known_scales(state.plan.quantization, state.plan.dtype) if state.plan.quantization else None
    if known is not None:
        return known
    if state.writer is not None:
        state.writer.result()  # scales that are taken from the weights are there when these are written
    return read_scales(state.packs)


def export_sampler(state: BuildState) -> None:
    """Write the learned sampler's graph, where there is one to write."""
    if state.plan.sampler is None:
        return
    advance = state.progress.stage("export sampler", 1)
    write_sampler(state.plan.sampler, state.folder / SAMPLER_FILE, state.cache)
    check_graph(state.folder / SAMPLER_FILE)
    state.record(SAMPLER_FILE)
    advance(1)


def copy_tokenizer(state: BuildState) -> None:
    """Copy the files that turn text into tokens; a checkpoint without them gives a bundle that takes token ids only."""
    source = state.plan.checkpoint.path
    names = [*(name for name in CONFIG_FILES if (source / name).is_file()), *text_files(source)]
    advance = state.progress.stage("copy tokenizer", len(names))
    for name in names:
        (state.folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, state.folder / name)
        state.record(name)
        advance(1)


def describe_bundle(state: BuildState) -> None:
    """The manifest of a new bundle."""
    plan, checkpoint = state.plan, state.plan.checkpoint
    assert state.source is not None
    state.manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        trimode_version=trimode.__version__,
        model=plan.model,
        source=SourceRecord(
            name=name_of(checkpoint.path),
            sha256=state.source.hexdigest(),
            stamp=stamp_of(checkpoint),
            num_parameters=sum(tensor.num_elements for name, tensor in state.tensors.items() if name in checkpoint.tensors),
        ),
        dtype=plan.dtype,
        contracts={role: graph_contract(role, plan.model) for role in plan.roles},
        precisions={plan.precision: _describe_precision(state)},
        files=state.files,
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        sampler=plan.sampler.describe() if plan.sampler else None,
    )


def describe_additions(state: BuildState) -> None:
    """The manifest of the bundle with its new precision, new targets of one, or its sampler."""
    assert state.base is not None
    precision = state.plan.precision
    rest = drop_targets(state.base, precision, list(state.plan.targets))
    there = rest.precisions.get(precision)
    record = there.model_copy(update={"targets": {**there.targets, **state.plan.records}}) if there else _describe_precision(state)
    sampler = state.plan.sampler.describe() if state.plan.sampler else rest.sampler
    update = {"precisions": {**rest.precisions, precision: record}, "files": {**rest.files, **state.files}, "sampler": sampler}
    state.manifest = rest.model_copy(update=update)


def _describe_precision(state: BuildState) -> PrecisionRecord:
    plan = state.plan
    return PrecisionRecord(
        calibration=plan.quantization.record if plan.quantization else None,
        packs=tuple(path.name for path in state.packs),
        weight_bytes=sum(tensor.num_bytes for tensor in state.tensors.values()),
        graphs={role: plan.names.graph(role) for role in plan.roles},
        targets=plan.records,
    )


NEW_BUNDLE = (start_weights, trace_graphs, write_graphs, export_sampler, compile_targets, copy_tokenizer, finish_weights, describe_bundle)
ADDED_PRECISION = (start_weights, trace_graphs, write_graphs, export_sampler, compile_targets, finish_weights, describe_additions)
ADDED_TARGETS = (trace_graphs, export_sampler, compile_targets, describe_additions)
ADDED_SAMPLER = (export_sampler, describe_additions)

"""Makes what each target runs: lowered ONNX files and engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trimode.compiler.pack.layout import PackedTensor
from trimode.compiler.passes.base import lower, to_bytes, weights
from trimode.compiler.passes.constant_weights import digest_of
from trimode.compiler.passes.join_graphs import JoinGraphs
from trimode.compiler.passes.recipes import constants_of, lower_for, lower_for_cpu
from trimode.compiler.passes.scales_to_constants import known_scales, read_scales
from trimode.compiler.plan import BuildPlan
from trimode.compiler.stages.graphs import point_into_packs, save_graph
from trimode.compiler.stages.state import BuildState, Graphs
from trimode.compiler.store.cache import key_of
from trimode.compiler.store.fingerprint import builder_revision
from trimode.compiler.tensorrt.builder import EngineJob
from trimode.compiler.tensorrt.pool import (
    PROGRESS_STEPS,
    EngineTask,
    build_engines,
    default_num_workers,
)
from trimode.formats.contract import GraphName
from trimode.formats.files import sha256_of
from trimode.formats.manifest import EngineRecord, TargetRecord
from trimode.graphs.numerics.integers import Floats
from trimode.runtime.bundle.weights import PrecisionWeights


@dataclass(frozen=True)
class Constants:
    """Names the packs that engines copy from, and a digest.

    The digest covers what they copy.
    """

    packs: tuple[Path, ...]
    sha256: str


def compile_targets(state: BuildState) -> None:
    """Lower the graphs for each target and compile its engines.

    Engines that hold weights wait for the pack.
    """
    write_lowered_graphs(state)
    state.num_cached = compile_engines(state, _constants(state), _constant_scales(state))
    _record_constants(state)
    for record in state.plan.records.values():
        for engine in record.engines:
            # portable graphs are recorded already
            if engine.file not in state.files and (state.folder / engine.file).is_file():
                state.record(engine.file)


def _constants(state: BuildState) -> Constants | None:
    """Find what engines hold; None where they hold nothing.

    Then nothing waits for a pack that is not written yet.
    """
    record = next((one for one in state.plan.records.values() if _is_compiled(one)), None)
    names = constants_of(record, state.tensors) if record else ()
    if record is None or not names:
        return None
    packs = tuple(state.packs)
    if record.placement == "baked":
        return Constants(packs, "+".join(state.pack_sha256(path) for path in packs))
    state.wait_for_weights()
    return Constants(packs, digest_of(packs, names))


def _record_constants(state: BuildState) -> None:
    """Enter into the records how much the engines hold."""
    records = {}
    for name, record in state.plan.records.items():
        sizes = [state.tensors[one].num_bytes for one in constants_of(record, state.tensors)]
        update = {"constant_bytes": sum(sizes)}
        records[name] = record.with_engines(partial(EngineRecord.model_copy, update=update))
    state.plan = replace(state.plan, records=records)


def _is_compiled(record: TargetRecord) -> bool:
    return record.backend != "onnxruntime"


def _constant_scales(state: BuildState) -> Mapping[str, Floats]:
    """Take engines' constant scales from the calibration or the pack."""
    if state.plan.precision in ("fp8", "int8") and any(
        record.backend == "tensorrt_rtx" for record in state.plan.records.values()
    ):
        return _scales_of_8_bits(state)
    if state.plan.precision != "nvfp4":
        return {}
    if state.plan.quantization is not None:
        given = {
            f"{layer}.input_scale": scales.rounded("nvfp4", "float32").input
            for layer, scales in state.plan.quantization.layers.items()
        }
        return {name: scale for name, scale in given.items() if scale is not None}
    weights = PrecisionWeights(state.packs)
    return {
        name: np.array(weights.widened(name))
        for name in weights.entries
        if name.endswith(".input_scale")
    }


def _scales_of_8_bits(state: BuildState) -> Mapping[str, Floats]:
    known = (
        known_scales(state.plan.quantization, state.plan.dtype) if state.plan.quantization else None
    )
    if known is not None:
        return known
    # scales that are taken from the weights are there when these are written
    state.wait_for_weights()
    return read_scales(state.packs)


def write_lowered_graphs(state: BuildState) -> None:
    """Write the graphs of ONNX Runtime's targets, named as in their records."""
    for record in state.plan.records.values():
        if record.backend != "onnxruntime":
            continue
        for graph_name, graph in state.graphs.items():
            path = state.folder / record.graphs[graph_name].file
            path.parent.mkdir(parents=True, exist_ok=True)
            if record.placement == "external":
                lowered = lower_for_cpu(record, state.plan.dtype, graph, state.tensors)
                save_graph(lowered, state.tensors, path)
            else:
                path.write_bytes(to_bytes(lower_for(record, graph, state.tensors)))


def compile_engines(
    state: BuildState, constants: Constants | None, scales: Mapping[str, Floats]
) -> int:
    """Compile the engines of TensorRT's targets.

    Each lies under the name that its record gives.

    Args:
        state: Plan, traced graphs, places of the weights, folder and cache.
        constants: Weights that the engines hold; None = none.
        scales: Scales by name that become part of the engines and of their keys in the cache: for
            nvfp4 the global scales of inputs, for 8 bits all scales.

    Returns:
        Number of engines that came from the cache.

    Raises:
        BuildError: a library refuses a graph.
    """
    plan = state.plan
    records = {name: record for name, record in plan.records.items() if _is_compiled(record)}
    if not records:
        return 0
    # Records of one plan differ in the GPU only, and passes do not depend on it. So each graph is
    # lowered once for each capacity, and lies beside the engines meanwhile.
    record = next(iter(records.values()))
    lowered = {
        (one.capacity, graph_name): _write_lowered(
            one, graph_name, graph, state.tensors, scales, state.folder
        )
        for one in record.by_capacity()
        for graph_name, graph in _compiled_graphs(one, state.graphs).items()
    }
    tasks = [
        _task(plan, name, one, graph_name, lowered[one.capacity, graph_name], constants)
        for name, record in records.items()
        for one in record.by_capacity()
        for capacity, graph_name in lowered
        if capacity == one.capacity
    ]
    advance = state.progress.stage("compile engines", len(tasks) * PROGRESS_STEPS)
    # compiling takes about three times the memory of what an engine holds
    num_workers = plan.options.num_jobs or (1 if constants else default_num_workers())
    try:
        return build_engines(tasks, state.cache, num_workers, advance)
    finally:
        for path in lowered.values():
            path.unlink()


def _compiled_graphs(record: TargetRecord, graphs: Graphs) -> Graphs:
    """Return the graphs to compile, one for each engine file.

    The joint graph takes the place of ``draft``.
    """
    alone = {
        graph_name: graph for graph_name, graph in graphs.items() if not record.is_joint(graph_name)
    }
    if len(alone) == len(graphs):
        return graphs
    return {"draft": lower(graphs["draft"], JoinGraphs()), **alone}


def _write_lowered(
    record: TargetRecord,
    graph_name: GraphName,
    graph: ir.Model,
    tensors: Mapping[str, PackedTensor],
    scales: Mapping[str, Floats],
    folder: Path,
) -> Path:
    lowered = lower_for(record, graph, tensors, scales)
    if weights(lowered):
        point_into_packs(lowered, tensors, folder)
        if record.placement != "baked":
            _forget_places(lowered)
    path = folder / f".{graph_name}-{record.capacity}.onnx"
    path.write_bytes(to_bytes(lowered))
    return path


def _forget_places(graph: ir.Model) -> None:
    """Remove the places of constants: engines depend on their bytes alone.

    A place is a pack and an offset in it. The builder hands them to the parser by name.
    """
    for value in graph.graph.initializers.values():
        found = value.const_value
        if isinstance(found, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                "constants", 0, found.length, found.dtype, shape=found.shape, name=found.name
            )


def _task(
    plan: BuildPlan,
    name: str,
    record: TargetRecord,
    graph_name: GraphName,
    graph: Path,
    constants: Constants | None,
) -> EngineTask:
    target = plan.targets[name]
    assert record.backend != "onnxruntime"
    assert record.compute_capability is not None
    output = graph.parent / record.graphs[graph_name].file
    output.parent.mkdir(parents=True, exist_ok=True)
    workspace = record.workspace_mib << 20 if record.workspace_mib is not None else None
    job = EngineJob(
        library=record.backend,
        graph=graph,
        packs=constants.packs if constants else (),
        output=output,
        compute_capability=record.compute_capability,
        profiles=record.profiles_in(record.graphs[graph_name].file),
        workspace_bytes=workspace,
        timing_cache=plan.options.timing_cache,
    )
    key = key_of(
        kind="engine",
        graph=sha256_of(graph),
        library=record.library,
        builder=builder_revision(),
        compute_capability=record.compute_capability,
        profiles=[profile.model_dump() for profile in job.profiles],
        workspace_bytes=workspace,
        constants=constants.sha256 if constants else None,
    )
    return EngineTask(target, plan.precision, key, job)

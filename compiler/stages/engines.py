"""Makes what each target runs: lowered ONNX files and engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trimode.compiler.pack.layout import PackedTensor
from trimode.compiler.passes.base import to_bytes
from trimode.compiler.passes.recipes import lower_for
from trimode.compiler.passes.scales_to_constants import known_scales, read_scales
from trimode.compiler.plan import BuildPlan
from trimode.compiler.stages.graphs import point_into_packs
from trimode.compiler.stages.state import BuildState, Graphs, Packs
from trimode.compiler.store.cache import key_of
from trimode.compiler.store.fingerprint import builder_revision
from trimode.compiler.tensorrt.builder import EngineJob
from trimode.compiler.tensorrt.pool import (
    PROGRESS_STEPS,
    EngineTask,
    build_engines,
    default_num_workers,
)
from trimode.formats.contract import Role
from trimode.formats.files import sha256_of
from trimode.formats.manifest import TargetRecord
from trimode.graphs.numerics.integers import Floats, scale_of
from trimode.runtime.bundle.weights import PrecisionWeights


def compile_targets(state: BuildState) -> None:
    """Lower the graphs for each target and compile its engines.

    Engines that copy the weights wait for the pack.
    """
    write_lowered_graphs(state.plan, state.graphs, state.tensors, state.folder)
    is_baked = any(record.placement == "baked" for record in state.plan.records.values())
    packs: Packs | None = (
        {path: state.pack_sha256(path) for path in state.packs} if is_baked else None
    )
    state.num_cached = compile_engines(state, packs, _constant_scales(state))
    for record in state.plan.records.values():
        for engine in record.graphs.values():
            # portable graphs are recorded already
            if engine.file not in state.files and (state.folder / engine.file).is_file():
                state.record(engine.file)


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
            f"{layer}.input_scale": scales.input_amax
            for layer, scales in state.plan.quantization.layers.items()
        }
        return {
            name: scale_of(amax, "nvfp4", "float32")
            for name, amax in given.items()
            if amax is not None
        }
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
    if state.writer is not None:
        # scales that are taken from the weights are there when these are written
        state.writer.result()
    return read_scales(state.packs)


def write_lowered_graphs(
    plan: BuildPlan, graphs: Graphs, tensors: Mapping[str, PackedTensor], folder: Path
) -> None:
    """Write the graphs of ONNX Runtime's targets, each under the name its record gives."""
    for record in plan.records.values():
        if record.backend == "onnxruntime" and record.placement == "shared":
            for role, graph in graphs.items():
                path = folder / record.graphs[role].file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(to_bytes(lower_for(record, graph, tensors)))


def compile_engines(state: BuildState, packs: Packs | None, scales: Mapping[str, Floats]) -> int:
    """Compile the engines of TensorRT's targets, each under the name its record gives.

    Args:
        state: Plan, traced graphs, places of the weights, folder and cache.
        packs: Packs that ``baked`` engines copy; None where no engine is baked, since a pack may
            not be written yet.
        scales: Scales by name that become part of the engines and of their keys in the cache: for
            nvfp4 the global scales of inputs, for 8 bits all scales.

    Returns:
        How many engines came from the cache.

    Raises:
        BuildError: a library refuses a graph.
    """
    plan = state.plan
    records = {
        name: record for name, record in plan.records.items() if record.backend != "onnxruntime"
    }
    if not records:
        return 0
    # Records of one plan differ in the GPU only, and passes do not depend on it. So each graph is
    # lowered once, and lies beside the engines meanwhile.
    record = next(iter(records.values()))
    lowered = {
        role: _write_lowered(record, role, graph, state.tensors, scales, state.folder)
        for role, graph in state.graphs.items()
    }
    tasks = [
        _task(plan, name, role, path, packs) for name in records for role, path in lowered.items()
    ]
    advance = state.progress.stage("compile engines", len(tasks) * PROGRESS_STEPS)
    num_workers = plan.options.num_jobs or default_num_workers()
    try:
        return build_engines(tasks, state.cache, num_workers, advance)
    finally:
        for path in lowered.values():
            path.unlink()


def _write_lowered(
    record: TargetRecord,
    role: Role,
    graph: ir.Model,
    tensors: Mapping[str, PackedTensor],
    scales: Mapping[str, Floats],
    folder: Path,
) -> Path:
    lowered = lower_for(record, graph, tensors, scales)
    if record.placement == "baked":
        point_into_packs(lowered, tensors, folder)
    path = folder / f".{role}.onnx"
    path.write_bytes(to_bytes(lowered))
    return path


def _task(plan: BuildPlan, name: str, role: Role, graph: Path, packs: Packs | None) -> EngineTask:
    record, target = plan.records[name], plan.targets[name]
    assert record.backend != "onnxruntime"
    assert record.compute_capability is not None
    assert (packs is not None) == (record.placement == "baked")
    output = graph.parent / record.graphs[role].file
    output.parent.mkdir(parents=True, exist_ok=True)
    workspace = record.workspace_mib << 20 if record.workspace_mib is not None else None
    job = EngineJob(
        library=record.backend,
        graph=graph,
        packs=tuple(packs) if packs else (),
        output=output,
        compute_capability=record.compute_capability,
        profiles=record.graphs[role].profiles,
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
        pack="+".join(packs.values()) if packs else None,
    )
    return EngineTask(target, plan.precision, key, job)

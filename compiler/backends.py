"""From traced graphs to what each target runs: lowered ONNX for ONNX Runtime, engines for TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from trimode.compiler.attention_lowering import QueriesToOutputs
from trimode.compiler.cache import ContentCache, key_of
from trimode.compiler.choices_lowering import ChooseBeforeWidening
from trimode.compiler.engine_builder import EngineJob
from trimode.compiler.engines import PROGRESS_STEPS, EngineTask, build_engines, default_num_workers
from trimode.compiler.graphfile import point_into_packs
from trimode.compiler.lowering import ComputeType, StaticCacheCapacity, StoredType, WeightsToInputs, lower, to_bytes
from trimode.compiler.plan import BuildPlan
from trimode.compiler.progress import Progress
from trimode.compiler.quantize.constants import ScalesToConstants
from trimode.compiler.quantize.lowering import QuantizeWeights, Stored
from trimode.compiler.quantize.nvfp4_lowering import Nvfp4ForTensorRT, Nvfp4InFloat32
from trimode.compiler.quantize.products import AccuracyLevel, MultiplyInt4
from trimode.compiler.weights import PackedTensor
from trimode.graphs.contract import DType, Role
from trimode.graphs.quantization import Floats
from trimode.runtime.bundle import sha256_of
from trimode.runtime.manifest import TargetRecord

Graphs = dict[Role, ir.Model]
Packs = dict[Path, str]
"""Weight packs of a precision, its own first, and the sha256 of each."""

INT4_ACCURACY_LEVEL: AccuracyLevel = 1
"""How the portable graphs multiply int4 weights: in float32, so that one row and many round alike; docs/reference/quantization.md has why."""


def lower_portable(dtype: DType, graph: ir.Model, pack: Mapping[str, Stored]) -> ir.Model:
    """The passes of the portable graphs: float32 arithmetic over what the pack holds, but for products with int4 weights."""
    passes: list[ir.passes.InPlacePass] = [QuantizeWeights(pack), Nvfp4InFloat32(pack)]
    if dtype != "float32":
        passes.append(StoredType(dtype, [name for name, stored in pack.items() if stored.dtype == "float32"]))
    return lower(graph, *passes, MultiplyInt4(INT4_ACCURACY_LEVEL))


def lower_for(
    record: TargetRecord,
    graph: ir.Model,
    pack: Mapping[str, Stored] = MappingProxyType({}),
    scales: Mapping[str, Floats] = MappingProxyType({}),
) -> ir.Model:
    """The passes a target asks for; ``pack`` tells which weights are quantized, ``scales`` which of their scales become part of a graph."""
    passes: list[ir.passes.InPlacePass] = []
    if record.capacity is not None:
        passes.append(StaticCacheCapacity(record.capacity))
    if record.compute_dtype != "float32":
        passes.append(ComputeType(record.compute_dtype))
    passes += [QuantizeWeights(pack), Nvfp4ForTensorRT(pack, scales)]
    if record.backend == "tensorrt_rtx":
        passes += [ChooseBeforeWidening(), QueriesToOutputs()]
    if record.backend == "tensorrt_rtx" and record.placement == "shared":
        passes.append(ScalesToConstants(scales))
    if record.placement == "shared":
        passes.append(WeightsToInputs())
    return lower(graph, *passes)


def write_lowered_graphs(plan: BuildPlan, graphs: Graphs, tensors: Mapping[str, PackedTensor], folder: Path) -> None:
    """Write the graphs of ONNX Runtime's targets into ``folder``, each under the name its record gives."""
    for record in plan.records.values():
        if record.backend == "onnxruntime" and record.placement == "shared":
            for role, graph in graphs.items():
                path = folder / record.graphs[role].file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(to_bytes(lower_for(record, graph, tensors)))


def compile_engines(
    plan: BuildPlan, graphs: Graphs, tensors: Mapping[str, PackedTensor], packs: Packs | None, folder: Path, cache: ContentCache | None,
    progress: Progress, scales: Mapping[str, Floats] = MappingProxyType({}),
) -> int:  # fmt: skip
    """Compile the engines of TensorRT's targets into ``folder``, each under the name its record gives; returns how many were cached.

    Args:
        plan: targets and options.
        graphs: as traced.
        tensors: what lies where in the packs.
        packs: which ``baked`` engines copy; None where no engine is baked, and one may not be written yet.
        folder: of the bundle, or where its new parts are staged.
        cache: of engines; None = compile all.
        progress: told about the stage.
        scales: by name, what becomes part of the engines, and with them of their keys in the cache: of nvfp4 the global scales of inputs, of 8 bits
            all scales.

    Raises:
        BuildError: a library refuses a graph.
    """
    records = {name: record for name, record in plan.records.items() if record.backend != "onnxruntime"}
    if not records:
        return 0
    # Records of one plan differ in the GPU, which passes know nothing of: each graph is lowered once, and lies beside the engines meanwhile.
    record = next(iter(records.values()))
    lowered = {role: _write_lowered(record, role, graph, tensors, scales, folder) for role, graph in graphs.items()}
    tasks = [_task(plan, name, role, path, packs) for name in records for role, path in lowered.items()]
    advance = progress.stage("compile engines", len(tasks) * PROGRESS_STEPS)
    try:
        return build_engines(tasks, cache, plan.options.num_jobs or default_num_workers(), advance)
    finally:
        for path in lowered.values():
            path.unlink()


def _write_lowered(
    record: TargetRecord, role: Role, graph: ir.Model, tensors: Mapping[str, PackedTensor], scales: Mapping[str, Floats], folder: Path
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
        library=record.backend, graph=graph, packs=tuple(packs) if packs else (), output=output, compute_capability=record.compute_capability,
        profiles=record.graphs[role].profiles, workspace_bytes=workspace, timing_cache=plan.options.timing_cache,
    )  # fmt: skip
    key = key_of(
        kind="engine", graph=sha256_of(graph), library=record.library, compute_capability=record.compute_capability,
        profiles=[profile.model_dump() for profile in job.profiles], workspace_bytes=workspace, pack="+".join(packs.values()) if packs else None,
    )  # fmt: skip
    return EngineTask(target, plan.precision, key, job)

"""What engines move on top of the layers' weights, for every GPU architecture, graph and capacity.

python -m benchmarks.plan_grid            as engines are lowered now
python -m benchmarks.plan_grid --before   as they were before 8-bit scales were constants, queries
                                          outputs, and tokens chosen before logits are widened

8B shapes, four layers, a checkpoint of zeros, TensorRT-RTX without a GPU. Writes
results/plan_grid.json after each engine, and in the end the table of
docs/results/engine-plans-2026-11.md. Engines that it has by the same code are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common import RESULTS, save
from benchmarks.large import sparse_checkpoint
from benchmarks.pages import fill, table
from trimode.compiler.options import BuildOptions
from trimode.compiler.pack.layout import PackedTensor, plan_pack
from trimode.compiler.passes.base import lower, to_bytes
from trimode.compiler.passes.compute_type import ComputeType
from trimode.compiler.passes.quantize_weights import QuantizeWeights
from trimode.compiler.passes.recipes import lower_for
from trimode.compiler.passes.scales_to_constants import known_scales
from trimode.compiler.passes.static_capacity import StaticCacheCapacity
from trimode.compiler.passes.weights_to_inputs import WeightsToInputs
from trimode.compiler.plan import make_plan
from trimode.compiler.plans.audit import audit_engine
from trimode.compiler.plans.report import causes_of
from trimode.compiler.store.cache import ContentCache
from trimode.compiler.store.fingerprint import lowering_revision
from trimode.compiler.store.traced import traced_graph
from trimode.compiler.tensorrt.builder import EngineJob, build_engine
from trimode.formats.contract import GRAPH_NAMES, GraphName
from trimode.formats.manifest import CalibrationRecord, TargetRecord
from trimode.formats.plans import UnreadPlan
from trimode.graphs.checkpoint import Checkpoint, describe_model, open_checkpoint
from trimode.graphs.numerics.scales import LayerScales, Quantization
from trimode.runtime.bundle.cache_folder import usual_folder

NAME, NUM_LAYERS, BLOCK = "plan_grid", 4, 32
PAGE = Path("docs/results/engine-plans-2026-11.md")
TARGETS, LENGTHS = ("sm89", "sm120", "sm121"), (8192, 32768)
PRECISIONS = (
    ("bf16", None),
    ("fp8", "tensor"),
    ("fp8", "row"),
    ("int8", "tensor"),
    ("int8", "row"),
)
BEFORE = (("bf16", None), ("fp8", "tensor"), ("int8", "tensor"))
Case = tuple[tuple[str, str | None], str, int, GraphName]


def cases(*, before: bool) -> Iterator[Case]:
    """The whole grid; of the older lowering SM89 alone."""
    if before:
        return itertools.product(BEFORE, TARGETS[:1], LENGTHS, GRAPH_NAMES)
    return itertools.product(PRECISIONS, TARGETS, LENGTHS, GRAPH_NAMES)


class Grid:
    """Compiles engines of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._model = describe_model(checkpoint, max(LENGTHS))
        folder = usual_folder()
        kept = ContentCache(folder) if folder else None
        self._graph = cache(
            lambda graph_name: traced_graph(graph_name, checkpoint, self._model, kept)
        )

    def measure(self, case: Case, *, before: bool) -> dict[str, Any]:
        """What each profile of an engine moves."""
        (precision, kind), target, length, graph_name = case
        options = BuildOptions(
            targets=(target,), precision="bf16", max_length=length, block_lengths=(BLOCK,)
        )
        record = make_plan(self._checkpoint, options).records[target]
        quantization = scales_for(self._checkpoint, precision, kind) if kind else None
        pack = plan_pack(self._checkpoint, self._model.num_positions, "bfloat16", quantization)
        model = (
            lower_as_before(record, self._graph(graph_name), pack.tensors)
            if before
            else lower_for(record, self._graph(graph_name), pack.tensors, scales_of(quantization))
        )
        layers = sum(t.num_bytes for name, t in pack.tensors.items() if ".layers." in name)
        facts = {"precision": precision, "scales": kind, "target": target, "length": length}
        profiles = [dict(one) for one in compiled(record, graph_name, model, layers)]
        return {**facts, "graph": graph_name, "layer_bytes": layers, "profiles": profiles}


def compiled(
    record: TargetRecord, graph_name: GraphName, model: ir.Model, layer_bytes: int
) -> Iterator[dict[str, Any]]:
    """Compile a lowered graph, and read the engine's plan."""
    assert record.compute_capability is not None
    with tempfile.TemporaryDirectory() as name:
        graph, engine = Path(name) / "m.onnx", Path(name) / "m.engine"
        graph.write_bytes(to_bytes(model))
        job = EngineJob(
            library="tensorrt_rtx",
            graph=graph,
            packs=(),
            output=engine,
            compute_capability=record.compute_capability,
            profiles=record.graphs[graph_name].profiles,
        )
        build_engine(job, lambda _: True)
        plans = audit_engine(engine, record.library, record.graphs[graph_name].profiles)
    if isinstance(plans, UnreadPlan):
        raise RuntimeError(plans.reason)
    for plan in plans:
        yield {
            "rows": plan.rows,
            "kernels": plan.kernels,
            "weights": plan.weights,
            "keys_values": plan.keys_values,
            "activations": plan.activations,
            "copies": causes_of(plan),
            "on_top_of_layers": (plan.copied + plan.activations) / layer_bytes,
        }


def lower_as_before(record: TargetRecord, graph: ir.Model, pack: dict[str, PackedTensor]) -> Any:
    """The passes that engines had before their plans were read."""
    assert record.capacity is not None
    passes = [
        StaticCacheCapacity(record.capacity),
        ComputeType(record.compute_dtype),
        QuantizeWeights(pack),
        WeightsToInputs(),
    ]
    return lower(graph, *passes)


def scales_for(checkpoint: Checkpoint, precision: Any, kind: str) -> Quantization:
    """Any scales: of a whole weight, or of each of its rows."""
    layers = {}
    for name, entry in checkpoint.tensors.items():
        if name.endswith("_proj.weight"):
            amax = np.full(() if kind == "tensor" else entry.shape[:1], 2, np.float32)
            layers[name.removesuffix(".weight")] = LayerScales(amax, None, np.array(3, np.float32))
    record = CalibrationRecord(name="x", algorithm="max", block_size=None, scales_sha256=None)
    return Quantization(precision, layers, record, None)


def scales_of(quantization: Quantization | None) -> Any:
    """The scales that become constants of an engine."""
    return known_scales(quantization, "bfloat16") if quantization else {}


def key(one: dict[str, Any]) -> tuple[Any, ...]:
    """What tells results apart."""
    return tuple(one[name] for name in ("precision", "scales", "target", "length", "graph"))


def worst(found: list[dict[str, Any]], **chosen: Any) -> str:
    """The largest fraction of all profiles of at most a block, and what is copied there."""
    profiles = [
        profile
        for one in found
        if all(one[name] == value for name, value in chosen.items())
        for profile in one["profiles"]
        if profile["rows"] <= BLOCK
    ]
    if not profiles:
        return "not measured"
    most = max(profiles, key=lambda profile: profile["on_top_of_layers"])
    causes = ", ".join(most["copies"])
    return f"{most['on_top_of_layers']:.2f}" + (f": {causes}" if causes else "")


def grid_rows(found: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, ...]]:
    """The worst of the capacities and scales of each precision, for each graph."""
    yield ("precision", "graph", "before, SM89", *(f"now, {target.upper()}" for target in TARGETS))
    for precision in ("bf16", "fp8", "int8"):
        for graph_name in GRAPH_NAMES:
            chosen = {"precision": precision, "graph": graph_name}
            now = [worst(found["now"], target=target, **chosen) for target in TARGETS]
            yield (precision, graph_name, worst(found["before"], **chosen), *now)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", action="store_true")
    before = parser.parse_args().before
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    found = {part: old.get(part, []) for part in ("now", "before")}
    if old.get("revision") != lowering_revision():
        found["now"] = []
    part = "before" if before else "now"
    done = {key(one) for one in found[part]}
    with sparse_checkpoint("8b", NUM_LAYERS) as folder:
        grid = Grid(open_checkpoint(folder))
        for case in cases(before=before):
            if (*case[0], *case[1:]) in done:
                continue
            found[part].append(grid.measure(case, before=before))
            facts = {"num_layers": NUM_LAYERS, "block_length": BLOCK}
            save(NAME, {**facts, "revision": lowering_revision(), **found})
    fill(PAGE, {"grid": table(grid_rows(found))})


if __name__ == "__main__":
    main()

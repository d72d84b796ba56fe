"""What engines of an 8B model's shapes move beside its weights, by their plans: four layers, from a
file of zeros that takes no disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import config_of

from trimode.compiler.options import BuildOptions
from trimode.compiler.pack.layout import PackLayout, plan_pack
from trimode.compiler.passes.base import lower, to_bytes
from trimode.compiler.passes.join_graphs import JoinGraphs
from trimode.compiler.passes.recipes import constants_of, lower_for
from trimode.compiler.passes.scales_to_constants import known_scales
from trimode.compiler.plan import make_plan, plan_target
from trimode.compiler.plans.audit import audit_engine
from trimode.compiler.plans.text import read_programs
from trimode.compiler.stages.graphs import point_into_packs
from trimode.compiler.store.traced import traced_graph
from trimode.compiler.tensorrt.builder import EngineJob, build_engine
from trimode.formats.contract import GRAPH_NAMES, GraphName
from trimode.formats.manifest import CalibrationRecord, TargetRecord
from trimode.formats.plans import PlanRecord
from trimode.graphs.checkpoint import Checkpoint, describe_model, expected_tensors, open_checkpoint
from trimode.graphs.config import parse_config
from trimode.graphs.numerics.quantization import Quantization
from trimode.graphs.numerics.scales import LayerScales

MOST_ON_TOP = 0.05
MOST_OF_4_BITS = 0.10
LONGEST = 32768
SHAPES: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": LONGEST,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder, config = tmp_path_factory.mktemp("large"), config_of(**SHAPES)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in expected_tensors(parse_config(config)).items():
        begin, end = end, end + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def graph_of(checkpoint: Checkpoint) -> Callable[[GraphName], ir.Model]:
    return cache(
        lambda graph_name: traced_graph(
            graph_name, checkpoint, describe_model(checkpoint, LONGEST), None
        )
    )


def scales_for(checkpoint: Checkpoint, precision: Any, kind: str) -> Quantization:
    """Any scales: of a whole weight, of each of its rows, or of blocks of these; of the input, too,
    but for ``rtn`` and blocks.
    """
    layers, block_size = {}, 128 if kind == "block" else None
    for name, entry in checkpoint.tensors.items():
        if name.endswith("_proj.weight"):
            rows, columns = entry.shape
            shape = {"tensor": (), "block": (rows, columns // 128)}.get(kind, (rows,))
            amax, given = np.full(shape, 2, np.float32), kind in ("tensor", "row")
            layers[name.removesuffix(".weight")] = LayerScales.from_amax(
                precision, amax, np.array(3, np.float32) if given else None, None, block_size
            )
    record = CalibrationRecord(
        name="x",
        algorithm="max",
        block_size=block_size,
        scales_sha256=None if kind == "rtn" else "0" * 64,
    )
    return Quantization(precision, layers, record, None)


def constant_scales(quantization: Quantization | None) -> dict[str, Any]:
    """Scales that a graph is lowered with."""
    if quantization is None:
        return {}
    if quantization.precision != "nvfp4":
        return known_scales(quantization, "bfloat16") or {}
    return {
        f"{layer}.input_scale": scales.rounded("nvfp4", "float32").input
        for layer, scales in quantization.layers.items()
    }


def write_zeros(layout: PackLayout, path: Path) -> None:
    """A pack of weights that are zero and scales that are one; it takes little of the disk."""
    ones = {"bfloat16": b"\x80\x3f", "float8e4m3fn": b"\x38", "float32": b"\x00\x00\x80\x3f"}
    with path.open("wb") as stream:
        stream.write(layout.header)
        stream.truncate(layout.num_bytes)
        for name, tensor in layout.tensors.items():
            if "_scale" in name:
                one = ones[tensor.dtype]
                stream.seek(tensor.offset)
                stream.write(one * (tensor.num_bytes // len(one)))


def fractions(
    checkpoint: Checkpoint,
    graph: ir.Model,
    graph_name: GraphName,
    target: str,
    length: int,
    folder: Path,
    quantization: Quantization | None,
    *,
    joint: bool = False,
) -> list[tuple[PlanRecord, float]]:
    """Of each profile, and the bytes on top of the layers' weights as a fraction of these."""
    options = BuildOptions(
        targets=(target,), precision="bf16", max_length=length, block_lengths=(32,)
    )
    plan = make_plan(checkpoint, options)
    is_rtn = quantization is not None and quantization.record.scales_sha256 is None
    record: TargetRecord = plan_target(
        plan.targets[target],
        options,
        plan.model,
        "bfloat16",
        plan.names,
        one_row=not is_rtn,
        joint=joint,
    )
    profiles = record.profiles_in(record.graphs[graph_name].file)
    layout = plan_pack(
        checkpoint, describe_model(checkpoint, LONGEST).num_positions, "bfloat16", quantization
    )
    lowered = lower_for(record, graph, layout.tensors, constant_scales(quantization))
    pack = folder / "weights.safetensors"
    write_zeros(layout, pack)
    point_into_packs(lowered, layout.tensors, folder)
    (folder / "m.onnx").write_bytes(to_bytes(lowered))
    assert record.compute_capability is not None
    job = EngineJob(
        library="tensorrt_rtx",
        graph=folder / "m.onnx",
        packs=(pack,),
        output=folder / "m.engine",
        compute_capability=record.compute_capability,
        profiles=profiles,
    )
    build_engine(job, lambda _: True)
    plans = audit_engine(folder / "m.engine", record.library, profiles)
    assert isinstance(plans, tuple), plans.reason
    assert record.capacity is not None
    check_attention(folder / "m.engine", record.capacity)
    held = [layout.tensors[name].num_bytes for name in constants_of(record, layout.tensors)]
    size = (folder / "m.engine").stat().st_size
    (folder / "m.engine").unlink()
    assert size < sum(held) * 1.02 + (25 << 20)  # one copy for all profiles, and code
    of_layers = sum(
        tensor.num_bytes for name, tensor in layout.tensors.items() if ".layers." in name
    )
    return [(plan, (plan.copied + plan.activations) / of_layers) for plan in plans]


def check_attention(engine: Path, capacity: int) -> None:
    """Every attention reads a mask: without one it would see slots that hold nothing."""
    for program in read_programs(engine):
        attentions = [kernel for kernel in program.kernels if "mha" in kernel.name]
        assert len(attentions) == 4
        for kernel in attentions:
            inputs = [program.tensors[name] for name in kernel.inputs if name in program.tensors]
            assert [one for one in inputs if one.dims[-1] == capacity], kernel.inputs


def check(found: list[tuple[PlanRecord, float]], length: int, most: float = MOST_ON_TOP) -> None:
    cache_bytes = 4 * 2 * 8 * (length + 64) * 128 * 2
    for plan, fraction in found:
        assert plan.copies == ()
        assert plan.keys_values == cache_bytes
        if plan.rows <= 32:  # a chunk of a prompt has large activations
            assert fraction <= most


@pytest.mark.parametrize("graph_name", GRAPH_NAMES)
@pytest.mark.parametrize("length", [8192, LONGEST])
@pytest.mark.parametrize("target", ["sm89", "sm120", "sm121"])
def test_bf16(
    checkpoint: Checkpoint,
    graph_of: Callable[[GraphName], ir.Model],
    graph_name: GraphName,
    length: int,
    target: str,
    tmp_path: Path,
) -> None:
    check(
        fractions(checkpoint, graph_of(graph_name), graph_name, target, length, tmp_path, None),
        length,
    )


@pytest.mark.parametrize("graph_name", GRAPH_NAMES)
@pytest.mark.parametrize(
    ("precision", "kind", "target", "length"),
    [
        ("fp8", "tensor", "sm89", LONGEST),
        ("fp8", "tensor", "sm120", 8192),
        ("fp8", "tensor", "sm121", 8192),
        ("fp8", "row", "sm89", 8192),
        ("int8", "tensor", "sm89", 8192),
        ("int8", "row", "sm120", 8192),
        ("int8", "row", "sm121", LONGEST),
    ],
)
def test_8_bits(
    checkpoint: Checkpoint,
    graph_of: Callable[[GraphName], ir.Model],
    graph_name: GraphName,
    precision: str,
    kind: str,
    target: str,
    length: int,
    tmp_path: Path,
) -> None:
    found = fractions(
        checkpoint,
        graph_of(graph_name),
        graph_name,
        target,
        length,
        tmp_path,
        scales_for(checkpoint, precision, kind),
    )
    check(found, length)


@pytest.mark.parametrize(
    ("graph_name", "target", "length"),
    [("ar", "sm120", 8192), ("draft", "sm121", 8192), ("verify", "sm120", LONGEST)],
)
def test_nvfp4(
    checkpoint: Checkpoint,
    graph_of: Callable[[GraphName], ir.Model],
    graph_name: GraphName,
    target: str,
    length: int,
    tmp_path: Path,
) -> None:
    """Numbers of four bits on both sides; the scales of blocks lie inside."""
    scales = scales_for(checkpoint, "nvfp4", "tensor")
    found = fractions(
        checkpoint, graph_of(graph_name), graph_name, target, length, tmp_path, scales
    )
    check(found, length, MOST_OF_4_BITS)


@pytest.mark.parametrize(
    ("precision", "kind", "target", "length", "most"),
    [
        ("int4", "block", "sm89", 8192, MOST_OF_4_BITS),
        ("int4", "block", "sm121", LONGEST, MOST_OF_4_BITS),
        ("int8", "rtn", "sm120", 8192, MOST_ON_TOP),
    ],
)
def test_one_engine_of_three_graphs_holds_the_weights_once(
    checkpoint: Checkpoint,
    graph_of: Callable[[GraphName], ir.Model],
    precision: str,
    kind: str,
    target: str,
    length: int,
    most: float,
    tmp_path: Path,
) -> None:
    scales = scales_for(checkpoint, precision, kind)
    graph = lower(graph_of("draft"), JoinGraphs())
    found = fractions(checkpoint, graph, "draft", target, length, tmp_path, scales, joint=True)
    assert [plan.rows for plan, _ in found] == [1, 512, 32]
    check(found, length, most)

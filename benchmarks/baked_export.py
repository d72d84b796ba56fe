"""The usual way beside ours: export the loaded model with its weights, and let TensorRT bake them
into the engine.

python -m benchmarks.baked_export --size 3b

Needs TensorRT-RTX, 24 GB of memory and three times the checkpoint's size of free disk.

One graph (`ar`, a decode and a prefill profile) for one GPU (SM120), bf16, both ways, each in a
process of its own, stopped when its process tree reaches --limit-gb. The usual way is
torch.onnx.export with its defaults, then parse and build. Ours is trimode.compiler on the same
shapes: trace under fake tensors, weights to inputs, build; its pack is not part of it (engine_scale
has that).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.build_scale import write_sparse_checkpoint
from benchmarks.common import save
from benchmarks.engine_scale import TreeMemory

MAX_LENGTH = 8128


def usual_way(folder: Path) -> None:
    """Load, export, parse, build; a line of JSON after each step."""
    import torch
    from torch.export import Dim

    from trimode.formats.contract import cache_specs
    from trimode.graphs.checkpoint import describe_model, open_checkpoint
    from trimode.graphs.decoder.modules import build_module
    from trimode.graphs.decoder.trunk import TriModeTrunk

    checkpoint = open_checkpoint(folder / "checkpoint")
    model = describe_model(checkpoint, MAX_LENGTH)
    torch.set_default_dtype(torch.bfloat16)
    with torch.no_grad():
        with torch.device("meta"):
            trunk = TriModeTrunk(checkpoint.config, 2)
        trunk = trunk.to_empty(device="cpu")
        trunk.rope = type(trunk.rope)(checkpoint.config, model.num_positions)
        for parameter in trunk.parameters():
            parameter.uniform_(-0.02, 0.02)
        _tell("load")
        past = [
            torch.zeros(2, model.num_key_value_heads, model.num_positions, model.head_dim)
            for _ in cache_specs(model, "past_key_values")
        ]
        ids, lengths = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
        batch, rows = Dim("batch", min=1), Dim("rows", min=3)
        shapes = ({0: batch, 1: rows}, {0: batch}, {0: batch}, [{0: batch} for _ in past])
        exported = torch.export.export(
            build_module("ar", trunk.eval()),
            (ids, lengths, lengths, past),
            strict=False,
            dynamic_shapes=shapes,
        )
        program = torch.onnx.export(exported, dynamo=True, verbose=False, opset_version=24)
        assert program is not None
        _tell("export")
        program.save(folder / "ar.onnx", external_data=True)
    del trunk, past, exported, program, parameter
    _tell("save")
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    if not trt.OnnxParser(network, logger).parse_from_file(str(folder / "ar.onnx")):
        sys.exit("the parser refuses the graph")
    _tell("parse")
    config = builder.create_builder_config()
    for rows_of in (1, 512):
        profile = builder.create_optimization_profile()
        for tensor in (network.get_input(i) for i in range(network.num_inputs)):
            shape = tuple(tensor.shape)
            if -1 in shape:
                sizes = [
                    tuple(
                        (1 if axis == 0 else n) if size == -1 else size
                        for axis, size in enumerate(shape)
                    )
                    for n in (1, rows_of, rows_of)
                ]
                profile.set_shape(tensor.name, *sizes)
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    engine = builder.build_serialized_network(network, config)
    _tell("build", engine_bytes=engine.nbytes if engine is not None else None)


def our_way(folder: Path) -> None:
    """Trace, lower, build; a line of JSON after each step."""
    from trimode.compiler.passes.base import lower, to_bytes
    from trimode.compiler.passes.compute_type import ComputeType
    from trimode.compiler.passes.static_capacity import StaticCacheCapacity
    from trimode.compiler.passes.weights_to_inputs import WeightsToInputs
    from trimode.compiler.tensorrt.builder import EngineJob, build_engine
    from trimode.compiler.tensorrt.profiles import plan_profiles
    from trimode.graphs.checkpoint import describe_model, open_checkpoint
    from trimode.graphs.decoder.trace import trace_graph

    checkpoint = open_checkpoint(folder / "checkpoint")
    model = describe_model(checkpoint, MAX_LENGTH)
    graph = trace_graph("ar", checkpoint.config, model, None)
    _tell("trace")
    lowered = lower(
        graph, StaticCacheCapacity(model.num_positions), ComputeType("bfloat16"), WeightsToInputs()
    )
    (folder / "lowered.onnx").write_bytes(to_bytes(lowered))
    _tell("lower")
    job = EngineJob(
        library="tensorrt_rtx",
        graph=folder / "lowered.onnx",
        packs=(),
        output=folder / "ar.engine",
        compute_capability="12.0",
        profiles=plan_profiles("ar", model, (32,), 1),
    )
    build_engine(job, lambda _: True)
    _tell("build", engine_bytes=job.output.stat().st_size)


def _tell(step: str, **facts: Any) -> None:
    print(
        json.dumps({"step": step, "rss_bytes": psutil.Process().memory_info().rss, **facts}),
        flush=True,
    )


def measured(way: str, folder: Path, limit_bytes: int) -> dict[str, Any]:
    """Run one way in a process of its own; seconds by step, peak memory, and how it ended."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.baked_export", "--way", way, "--folder", str(folder)],
        stdout=-1,
        text=True,
    )
    memory = TreeMemory(process.pid, limit_bytes)
    memory.start()
    assert process.stdout is not None
    steps = [
        {**json.loads(line), "at_s": time.perf_counter() - start}
        for line in process.stdout
        if line.startswith("{")
    ]
    code = process.wait()
    memory.join(1)
    outcome = (
        "done"
        if code == 0
        else f"stopped at {limit_bytes / 1e9:.0f} GB"
        if memory.stopped
        else f"ended with {code}"
    )
    return {
        "outcome": outcome,
        "seconds": time.perf_counter() - start,
        "peak_pss_bytes": memory.peak_pss,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="3b")
    parser.add_argument("--limit-gb", type=float, default=21)
    parser.add_argument("--way", choices=("usual", "ours"))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.way:
        {"usual": usual_way, "ours": our_way}[options.way](options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source_bytes = write_sparse_checkpoint(folder / "checkpoint", options.size)
        result: dict[str, Any] = {"size": options.size, "checkpoint_bytes": source_bytes}
        for way in ("ours", "usual"):
            result[way] = measured(way, folder, int(options.limit_gb * 1e9))
    print(json.dumps(result, indent=1))
    save(f"baked_export_{options.size}", result)


if __name__ == "__main__":
    main()

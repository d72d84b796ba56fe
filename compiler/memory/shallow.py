"""Compiles the engines of a checkpoint's first layers.

They tell what all layers would take. Layers are alike, so engines grow by the same amount with
each. The weights are not read. Their pack is a sparse file of zeros, with scales of one. What
engines hold themselves is drawn at random, since TensorRT-RTX keeps equal weights once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from trimode.compiler.pack.layout import PackLayout
from trimode.compiler.passes.recipes import constants_of
from trimode.compiler.plan import BuildPlan
from trimode.compiler.stages.engines import compile_targets
from trimode.compiler.stages.pack import lay_out_pack
from trimode.compiler.stages.plans import record_plans
from trimode.compiler.stages.state import BuildState
from trimode.compiler.stages.trace import trace_graphs
from trimode.compiler.store.cache import ContentCache
from trimode.formats.manifest import TargetRecord
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.numerics.integers import bytes_of
from trimode.progress import Progress

_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


@dataclass(frozen=True)
class ShallowEngines:
    """Holds what the engines of a shallow model take.

    Attributes:
        records: Targets with the plans of their engines, by name.
        sizes: Bytes of each engine file.
    """

    records: Mapping[str, TargetRecord]
    sizes: Mapping[str, int]


def keep_layers(plan: BuildPlan, num_layers: int) -> BuildPlan:
    """The plan of a model that has the first layers only."""
    checkpoint = shallow_checkpoint(plan.checkpoint, num_layers)
    quantization = plan.quantization
    if quantization is not None:
        kept = {
            name: scales
            for name, scales in quantization.layers.items()
            if f"{name}.weight" in checkpoint.tensors
        }
        quantization = replace(quantization, layers=kept)
    model = plan.model.model_copy(update={"num_hidden_layers": num_layers})
    return replace(plan, checkpoint=checkpoint, model=model, quantization=quantization)


def shallow_checkpoint(checkpoint: Checkpoint, num_layers: int) -> Checkpoint:
    """The checkpoint with its first layers only."""
    tensors = {
        name: entry
        for name, entry in checkpoint.tensors.items()
        if not name.startswith("encoder.layers.") or int(name.split(".")[2]) < num_layers
    }
    config = replace(checkpoint.config, num_hidden_layers=num_layers)
    return replace(checkpoint, config=config, tensors=tensors)


def compile_shallow(
    plan: BuildPlan, cache: ContentCache | None, progress: Progress
) -> ShallowEngines:
    """Compile the engines of a shallow plan; nothing of it is kept.

    Raises:
        BuildError: the library refuses a graph.
    """
    with tempfile.TemporaryDirectory(prefix="trimode-plan-") as name:
        folder = Path(name)
        layout = lay_out_pack(plan, plan.checkpoint.read)
        pack = folder / plan.names.pack
        held = (constants_of(record, layout.tensors) for record in plan.records.values())
        write_empty_pack(layout, pack, set(chain.from_iterable(held)))
        state = _Shallow(
            plan=plan,
            progress=progress,
            cache=cache,
            folder=folder,
            packs=[pack],
            tensors=layout.tensors,
        )
        for stage in (trace_graphs, compile_targets, record_plans):
            stage(state)
        records = state.plan.records
        files = {engine.file for record in records.values() for engine in record.engines}
        return ShallowEngines(records, {file: (folder / file).stat().st_size for file in files})


def write_empty_pack(layout: PackLayout, path: Path, drawn: Container[str] = ()) -> None:
    """Write a sparse pack: weights are zeros, and scales are ones.

    Args:
        layout: Layout of the pack.
        path: File to write.
        drawn: Names of weights whose bytes are drawn at random, always the same.
    """
    random = np.random.default_rng(0)
    with path.open("wb") as stream:
        stream.truncate(layout.num_bytes)
        stream.write(layout.header)
        for source in layout.sources:
            begin = stream.tell()
            if source.name.endswith(_SCALES):
                stream.write(bytes_of(np.ones(source.shape, np.float32), source.dtype))
            elif source.name in drawn:
                stream.write(random.bytes(source.num_bytes))
            stream.seek(begin + source.num_bytes)


class _Shallow(BuildState):
    """Builds engines over an empty pack, which needs no digest."""

    def pack_sha256(self, path: Path) -> str:
        return path.name

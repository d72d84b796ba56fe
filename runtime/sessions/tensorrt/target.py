"""Reads a TensorRT target and checks what needs no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.errors import BundleError, DeviceError, UsageError
from trimode.formats.contract import (
    GRAPH_NAMES,
    GraphContract,
    GraphName,
    ModelInfo,
    TensorSpec,
    cache_specs,
    joint_contract,
)
from trimode.formats.hints import ADD_TARGET, BUILD, REBUILD_TARGET
from trimode.formats.manifest import EngineRecord, TargetRecord
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.bundle.weights import PrecisionWeights
from trimode.runtime.sessions.gpu import Gpu, NoGpu
from trimode.runtime.sessions.prefix import SlotFormat
from trimode.runtime.sessions.tensorrt.library import import_library
from trimode.runtime.sessions.tensorrt.plan import (
    CacheLayout,
    IoLayout,
    MemoryPlan,
    describe_rows,
    engine_contract,
    lay_out_cache,
    lay_out_io,
    max_rows,
    query_bytes,
)

_MAGIC = (b"vtrt", b"ftrt")
"""First bytes of the engine files of TensorRT-RTX and of TensorRT."""


@dataclass(frozen=True)
class PreparedEngines:
    """Holds the engines of one capacity, read and checked without a GPU.

    Attributes:
        max_length: Tokens of the longest text that they are for.
        capacity: Slots of a sequence.
        graphs: Profiles of each graph.
        files: Engine file of each graph.
        io: Inputs and outputs of each graph, for one sequence.
        cache: Type and shape of every cache tensor.
        lay_out: Function that says where the keys and values of a number of sequences lie, and the
            inputs and outputs of each graph.
    """

    max_length: int
    capacity: int
    graphs: dict[GraphName, EngineRecord]
    files: dict[GraphName, Path]
    io: dict[GraphName, IoLayout]
    cache: TensorSpec
    lay_out: Callable[[int], tuple[CacheLayout, dict[GraphName, IoLayout]]]


@dataclass(frozen=True)
class Prepared:
    """Holds a target as read and checked without a GPU.

    Attributes:
        trt: Library, of the version that compiled the engines.
        slots: Format of one slot of a sequence.
        capacities: Engines of each capacity, ascending.
        memory: Memory that one sequence of the smallest takes on the GPU, with all else.
    """

    trt: Any
    weights: PrecisionWeights
    slots: SlotFormat
    capacities: tuple[PreparedEngines, ...]
    memory: MemoryPlan


def prepare(bundle: Bundle, target: TargetRecord) -> Prepared:
    """Check what can be checked without a GPU.

    That is the library's version, the engine files, the weight packs, and the memory they need.

    Raises:
        DependencyError: the library is not installed.
        BundleError: it has another version, or a file is damaged.
    """
    trt = import_library(target.backend)
    check_library(trt, target)
    weights, model = bundle.weights(), bundle.manifest.model
    lengths = (*(one.max_length for one in target.smaller), model.max_length)
    records = zip(target.by_capacity(), lengths, strict=True)
    capacities = tuple(_prepare_engines(bundle, record, length) for record, length in records)
    bound = [
        entry
        for name, entry in weights.entries.items()
        if target.placement == "shared" or name.startswith("rope.")
    ]
    smallest = capacities[0]
    files = {path for one in capacities for path in one.files.values()}
    # a joint engine has one place for the inputs and outputs of its graphs
    places = {
        smallest.files[graph_name]: one.layout.num_bytes for graph_name, one in smallest.io.items()
    }
    memory = MemoryPlan(
        sum(check_engine_file(path) for path in sorted(files)),
        sum(entry.num_bytes for entry in bound) - _constant_bytes(target),
        smallest.lay_out(1)[0].layout.num_bytes,
        sum(places.values()),
    )
    slots = SlotFormat.of(model, target.compute_dtype)
    return Prepared(trt, weights, slots, capacities, memory)


def _prepare_engines(bundle: Bundle, target: TargetRecord, max_length: int) -> PreparedEngines:
    """Prepare the engines of a target of one capacity."""
    manifest = bundle.manifest
    capacity = target.capacity or manifest.model.num_positions
    files = {
        graph_name: bundle.path / target.graphs[graph_name].file
        for graph_name in manifest.contracts
    }

    def lay_out(batch: int) -> tuple[CacheLayout, dict[GraphName, IoLayout]]:
        io = {
            graph_name: lay_out_graph(
                manifest.model, manifest.contracts[graph_name], target, graph_name, batch
            )
            for graph_name in files
        }
        return lay_out_cache(manifest.model, target.compute_dtype, capacity, batch), io

    return PreparedEngines(
        max_length,
        capacity,
        target.graphs,
        files,
        io=lay_out(1)[1],
        cache=cache_specs(manifest.model, "past_key_values", target.compute_dtype, capacity)[0],
        lay_out=lay_out,
    )


def _constant_bytes(target: TargetRecord) -> int:
    """Bytes of the pack that no engine takes as inputs."""
    if target.placement == "baked":
        return 0
    return min(engine.constant_bytes for engine in target.engines)


def lay_out_graph(
    model: ModelInfo,
    contract: GraphContract,
    target: TargetRecord,
    graph_name: GraphName,
    batch: int,
) -> IoLayout:
    """Lay out the inputs and outputs of a graph.

    They are for forwards of up to ``batch`` sequences. Those of a joint engine are laid out
    once, for all of its graphs alike.
    """
    joint = target.is_joint(graph_name)
    record = target.graphs["ar" if joint else graph_name]  # which has the most rows
    rows = max_rows(record)
    scratch = (
        query_bytes(model, target.compute_dtype, graph_name, rows, batch)
        if target.backend == "tensorrt_rtx"
        else 0
    )
    contract = joint_contract(model) if joint else contract
    return lay_out_io(engine_contract(contract, target.compute_dtype), rows, batch, scratch)


def check_library(trt: Any, target: TargetRecord) -> None:
    """Raise :class:`BundleError` unless this library compiled the engines.

    It must be the same to the version.
    """
    found = f"{target.backend} {trt.__version__}"
    if found != target.library:
        name, _, version = target.library.partition(" ")
        raise BundleError(
            f"expected {target.library}, which compiled the engines, found {found}",
            f"{ADD_TARGET}, or pip install {name.replace('_', '-')}=={version}",
        )


def check_gpu(target: TargetRecord, gpu: Gpu | NoGpu) -> Gpu:
    """The GPU, if it is one that the engines were compiled for.

    Raises:
        DeviceError: it is another, or there is none.
    """
    wanted = (
        f"a GPU of compute capability {target.compute_capability}"
        if target.compute_capability
        else "a GPU"
    )
    if isinstance(gpu, NoGpu):
        raise DeviceError(
            f"expected {wanted}, found no GPU ({gpu.reason})",
            "the rest of the target is in order; run it where there is such a GPU",
        )
    if target.compute_capability not in (None, gpu.compute_capability):
        command = f"{BUILD[:-1]} --target sm{gpu.compute_capability.replace('.', '')}`"
        raise DeviceError(
            f"expected {wanted}, found {gpu.name} of {gpu.compute_capability}",
            f"add a target for this GPU: {command}",
        )
    return gpu


def check_engine_file(path: Path) -> int:
    """Size of an engine file in bytes; :class:`BundleError` where it is none."""
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise BundleError(f"{path}: expected an engine, found none", REBUILD_TARGET) from error
    if magic not in _MAGIC:
        raise BundleError(
            f"{path}: expected an engine, found a file that begins with {magic!r}", REBUILD_TARGET
        )
    return size


def check_block_length(
    target: TargetRecord, block_length: int, graph_names: tuple[GraphName, ...] = GRAPH_NAMES
) -> None:
    """Raise :class:`UsageError` unless these engines take blocks of this length."""
    for graph_name in graph_names:
        record = target.graphs[graph_name]
        if not any(profile.holds(1, block_length) for profile in record.profiles):
            raise UsageError(
                "expected a block length that the target was built for "
                f"({describe_rows(record)}), found {block_length}",
                "choose one of these lengths, or build the target with `block_lengths`",
            )

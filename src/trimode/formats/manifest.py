"""Declares ``manifest.json``, which says what a bundle holds.

The compiler writes it, and the runtime reads it.

A bundle is a folder::

    manifest.json                      this schema
    ar.onnx draft.onnx verify.onnx     portable graphs: float32 arithmetic, no weights inside
    quadratic.onnx                     one more, where it was asked for
    sampler.onnx                       learned sampler of block diffusion, if any; shared
    weights.safetensors                every tensor once, and scales; read by portable graphs
    engines/<target>/<graph>.engine    TensorRT engines for one GPU architecture; weights are inputs
    engines/<target>/<graph>.onnx      graphs for ONNX Runtime that take the weights as inputs
    ar.cpu.onnx ...                    graphs for a CPU that map the pack
    tokenizer.json ...                 copied from the checkpoint
    verification.json                  written by ``trimode verify``; not part of the manifest

These are the files of the precision that was built first. One that was added has its own beside
them, with its name in theirs::

    ar-fp8.onnx ...                    its portable graphs
    weights-fp8.safetensors            weights that earlier packs lack: quantized ones and scales
    engines/<target>-fp8/...           its targets

Refused on opening: another schema, a file that is missing or whose size or sha256 differs, a file
name that leaves the folder, and what :mod:`trimode.formats.manifest_checks` finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from trimode.formats.contract import DType, GraphContract, GraphName, ModelInfo
from trimode.formats.plans import PlanRecord
from trimode.formats.record import Record

SCHEMA_VERSION = 5
MANIFEST = "manifest.json"
PrecisionName = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4", "nvfp4"]
"""Type of the weights of linear layers."""


def _plain(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name:
        raise ValueError(f"expected a relative file name inside the bundle, found {name!r}")
    return name


FileName = Annotated[str, AfterValidator(_plain)]


class _Part(Record):
    """Holds a part of the manifest.

    A field of ``_left_out`` is not written where nothing is in it.
    """

    _left_out: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return {
            name: value
            for name, value in fields.items()
            if name not in self._left_out or getattr(self, name)
        }


class FileRecord(_Part):
    """Holds digest (lower-case hex) and size of one file of the bundle."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


class SourceRecord(_Part):
    """Names the checkpoint that a bundle was built from.

    Attributes:
        name: Name of the checkpoint's folder.
        sha256: Digest over name, type, shape and bytes of every tensor, over ``config.json`` and
            the drafter's alpha.
        stamp: Digest over name, size and modification time of the checkpoint's files; equal stamps
            spare comparing the bytes.
        num_parameters: Number of the checkpoint's parameters.
    """

    name: str
    sha256: str
    stamp: str
    num_parameters: int


class CalibrationRecord(_Part):
    """Says where the scales of a quantized precision come from.

    Attributes:
        name: Name of the calibration's folder; ``rtn`` where each scale is its weights' own largest
            magnitude.
        algorithm: Algorithm that found the scales.
        block_size: Number of inputs that share a scale; None where a whole row or tensor does.
        scales_sha256: Digest of the calibration's scales; None for ``rtn``.
        quantizes_head: Whether ``rtn`` quantized the output head too; absent where not, and where
            scales say it.
    """

    _left_out = frozenset({"quantizes_head"})

    name: str
    algorithm: str
    block_size: int | None
    scales_sha256: str | None
    quantizes_head: bool = False


class ProfileRecord(_Part):
    """Holds least, usual and most of each dynamic dimension of a profile."""

    batch: tuple[int, int, int]
    rows: tuple[int, int, int]

    def holds(self, batch: int, rows: int) -> bool:
        """Whether a forward of this size runs under the profile."""
        return self.batch[0] <= batch <= self.batch[2] and self.rows[0] <= rows <= self.rows[2]


class EngineRecord(_Part):
    """Holds one compiled graph of a target.

    Several graphs of a target may be one engine, each with profiles of its own in it.

    Attributes:
        file: File of the engine or graph.
        profiles: Profiles in the engine's order; none where shapes are free (ONNX Runtime).
        plans: Bytes that a forward under each profile moves, by the engine's plan; absent where no
            plan is understood, and in bundles of before.
        first_profile: Index of the first of ``profiles`` in the engine; absent where it is 0.
        constant_bytes: Size of the weights and scales that the engine holds itself, which every
            engine has on the GPU once more; absent where all are inputs.
    """

    _left_out = frozenset({"plans", "first_profile", "constant_bytes"})

    file: FileName
    profiles: tuple[ProfileRecord, ...] = ()
    plans: tuple[PlanRecord, ...] = ()
    first_profile: int = 0
    constant_bytes: int = 0


class CapacityRecord(_Part):
    """Engines over a smaller cache than the target's largest.

    Attributes:
        max_length: Most tokens of prompt and answer together.
        capacity: Slots of the K/V cache: the text's, and those that are written behind it.
        graphs: Engines, one for each graph of the bundle.
    """

    max_length: int = Field(ge=1)
    capacity: int = Field(ge=1)
    graphs: dict[GraphName, EngineRecord]


class TargetRecord(_Part):
    """Holds what was built for one target.

    Attributes:
        backend: Library that runs it.
        device: Device that it runs on.
        compute_capability: GPU architecture of the engines, as ``8.9``; None where any will do.
        compute_dtype: Type of activations and of the K/V cache.
        placement: Place of the weights. ``shared``: they are inputs, bound from the pack.
            ``baked``: TensorRT engines hold their own copy. ``external``: graphs map the pack; in
            bundles of before they are the portable ones.
        capacity: Number of K/V cache slots where the engines fix it; the largest, where there are
            several.
        workspace_mib: Limit on an engine's scratch memory that was asked for.
        library: Name and version of the compiling library, as ``tensorrt_rtx 1.7.1.116``; an engine
            runs only under that version.
        graphs: Compiled graphs, one for each graph of the bundle, of the largest capacity.
        smaller: Engines of smaller capacities, ascending; absent where there are none.
        revision: Digest of the code that lowered and compiled the graphs; absent for the portable
            ones, and in bundles of before. Another revision is built again.
        int4_inputs: Type of what ONNX Runtime multiplies with int4 weights; absent where there are
            none, and in bundles of before (float32).
    """

    _left_out = frozenset({"revision", "smaller", "int4_inputs"})

    backend: Literal["onnxruntime", "tensorrt_rtx", "tensorrt"]
    device: Literal["cpu", "cuda"]
    compute_capability: str | None
    compute_dtype: DType
    placement: Literal["shared", "baked", "external"]
    capacity: int | None
    workspace_mib: int | None
    library: str
    graphs: dict[GraphName, EngineRecord]
    smaller: tuple[CapacityRecord, ...] = ()
    revision: str | None = None
    int4_inputs: Literal["float32", "int8"] | None = None

    @property
    def engines(self) -> Iterator[EngineRecord]:
        """Compiled graphs of all capacities."""
        for record in self.by_capacity():
            yield from record.graphs.values()

    def by_capacity(self) -> Iterator[TargetRecord]:
        """Each capacity as a target of its own, ascending."""
        for one in self.smaller:
            update = {"capacity": one.capacity, "graphs": one.graphs, "smaller": ()}
            yield self.model_copy(update=update)
        yield self.model_copy(update={"smaller": ()})

    def with_engines(self, change: Callable[[EngineRecord], EngineRecord]) -> TargetRecord:
        """The record with each engine changed, of all capacities."""

        def changed(graphs: dict[GraphName, EngineRecord]) -> dict[GraphName, EngineRecord]:
            return {graph_name: change(engine) for graph_name, engine in graphs.items()}

        smaller = tuple(
            one.model_copy(update={"graphs": changed(one.graphs)}) for one in self.smaller
        )
        return self.model_copy(update={"graphs": changed(self.graphs), "smaller": smaller})

    def profiles_in(self, file: FileName) -> tuple[ProfileRecord, ...]:
        """All profiles of an engine file, in the engine's order."""
        parts = {one.first_profile: one.profiles for one in self.engines if one.file == file}
        return tuple(profile for _, part in sorted(parts.items()) for profile in part)

    def is_joint(self, graph_name: GraphName) -> bool:
        """Whether the engine of a graph is that of others, too."""
        file = self.graphs[graph_name].file
        return sum(engine.file == file for engine in self.graphs.values()) > 1

    def without_plans(self) -> TargetRecord:
        """The record as it is planned, before there are engines to read."""
        absent: dict[str, Any] = {"plans": (), "constant_bytes": 0}
        return self.with_engines(lambda engine: engine.model_copy(update=absent))


class PrecisionRecord(_Part):
    """Holds one precision of the model: weights, portable graphs and targets.

    Attributes:
        calibration: Origin of the scales, where the precision is quantized, and only there.
        packs: Files of its tensors. The first is its own, all of it. The others belong to other
            precisions, and it reads what they have in common: tensors that are neither quantized
            nor scales.
        weight_bytes: Size of its tensors.
        graphs: Portable graph of each graph name.
        targets: Built targets, by name.
    """

    calibration: CalibrationRecord | None = None
    packs: tuple[FileName, ...] = Field(min_length=1)
    weight_bytes: int = Field(ge=0)
    graphs: dict[GraphName, FileName]
    targets: dict[str, TargetRecord]


class SamplerRecord(_Part):
    """Names the learned sampler of block diffusion.

    Attributes:
        file: Graph with its weights; float32, for ONNX Runtime on the CPU.
        name: Name of the folder that it was built from.
        sha256: Digest of the trained weights, ``sampler_sha256`` in that folder's record.
        num_parameters: Number of the network's parameters without its token table.
        block_lengths: Block lengths of the training; it takes any.
        threshold: Score from which a slot is filled by default.
    """

    file: FileName
    name: str
    sha256: str
    num_parameters: int
    block_lengths: tuple[int, ...]
    threshold: float = Field(ge=0, le=1)


class Manifest(_Part):
    """Holds the contents of ``manifest.json``.

    Attributes:
        schema_version: Version of this schema.
        trimode_version: Version of the library that wrote the file.
        model: Facts that decoding needs.
        source: Checkpoint that the bundle was built from.
        dtype: Type of all tensors but the position tables, which are float32, and quantized
            weights; GPUs compute in it.
        contracts: Inputs and outputs of each graph, whatever the precision: one for each of
            :data:`trimode.formats.contract.GRAPH_NAMES`, and ``quadratic`` where it was asked for.
        precisions: Precisions in the order they were built; the first is the default.
        files: Digests and sizes of all files, by name.
        libraries: Versions of the libraries that took part.
        sampler: Learned sampler; None = block diffusion goes by rules alone. The file then has no
            such field, and readers of the schema that know none take it.
    """

    _left_out = frozenset({"sampler"})

    schema_version: int
    trimode_version: str
    model: ModelInfo
    source: SourceRecord
    dtype: DType
    contracts: dict[GraphName, GraphContract]
    precisions: dict[PrecisionName, PrecisionRecord] = Field(min_length=1)
    files: dict[FileName, FileRecord]
    libraries: dict[str, str]
    sampler: SamplerRecord | None = None

    @property
    def first_precision(self) -> PrecisionName:
        """The precision that was built first."""
        return next(iter(self.precisions))

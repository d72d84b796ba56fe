"""``manifest.json``: what a bundle holds. Written by the compiler, read by the runtime.

A bundle is a folder::

    manifest.json                      this schema
    ar.onnx draft.onnx verify.onnx     portable graphs: float32 arithmetic, no weights inside
    quadratic.onnx                     one more, where it was asked for
    sampler.onnx                       learned sampler of block diffusion, if any; shared
    weights.safetensors                every tensor once, and scales; read by portable graphs
    engines/<target>/<graph>.engine    TensorRT engines for one GPU architecture; weights are inputs
    engines/<target>/<graph>.onnx      graphs for ONNX Runtime that take the weights as inputs
    tokenizer.json ...                 copied from the checkpoint
    verification.json                  written by ``trimode verify``; not part of the manifest

These are the files of the precision that was built first. One that was added has its own beside
them, with its name in theirs::

    ar-fp8.onnx ...                    its portable graphs
    weights-fp8.safetensors            weights that earlier packs lack: quantized ones and scales
    engines/<target>-fp8/...           its targets

Refused on opening: another schema, a file that is missing or whose size or sha256 differs, a file
name that leaves the folder.
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

from trimode.formats.contract import DType, GraphContract, ModelInfo, Role
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
    """A part of the manifest; a field of ``_left_out`` is not written where nothing is in it."""

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
    """Digest (lower-case hex) and size of one file of the bundle."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


class SourceRecord(_Part):
    """The checkpoint a bundle was built from.

    Attributes:
        name: the checkpoint folder's name.
        sha256: digest over name, type, shape and bytes of every tensor, over ``config.json`` and
        the drafter's alpha.
        stamp: digest over name, size and modification time of the checkpoint's files; equal stamps
            spare comparing the bytes.
    """

    name: str
    sha256: str
    stamp: str
    num_parameters: int


class CalibrationRecord(_Part):
    """Where the scales of a quantized precision come from.

    Attributes:
        name: the calibration folder's name, or ``rtn``: each scale is its weights' own largest
        magnitude.
        algorithm: that found them.
        block_size: inputs that share a scale; None where a whole row or tensor does.
        scales_sha256: of the calibration's scales; None for ``rtn``.
    """

    name: str
    algorithm: str
    block_size: int | None
    scales_sha256: str | None


class ProfileRecord(_Part):
    """An optimization profile: fewest, usual and most of each dynamic dimension."""

    batch: tuple[int, int, int]
    rows: tuple[int, int, int]

    def holds(self, batch: int, rows: int) -> bool:
        """Whether a forward of this size runs under the profile."""
        return self.batch[0] <= batch <= self.batch[2] and self.rows[0] <= rows <= self.rows[2]


class EngineRecord(_Part):
    """Holds one compiled graph of a target.

    Attributes:
        profiles: in the engine's order; none if shapes are free (ONNX Runtime).
        plans: what a forward under each profile moves, by the engine's plan; absent where it holds
        none that is understood, and in bundles of before.
        constant_bytes: size of the weights and scales that the engine holds itself, which every
        engine has on the GPU once more; absent where all are inputs.
    """

    _left_out = frozenset({"plans", "constant_bytes"})

    file: FileName
    profiles: tuple[ProfileRecord, ...] = ()
    plans: tuple[PlanRecord, ...] = ()
    constant_bytes: int = 0


class CapacityRecord(_Part):
    """Engines over a smaller cache than the target's largest.

    Attributes:
        max_length: most tokens of prompt and answer together.
        capacity: slots of the K/V cache: the text's, and those that are written behind it.
        graphs: one for each graph of the bundle.
    """

    max_length: int = Field(ge=1)
    capacity: int = Field(ge=1)
    graphs: dict[Role, EngineRecord]


class TargetRecord(_Part):
    """What was built for one target.

    Attributes:
        backend: the library that runs it.
        device: where it runs.
        compute_capability: the GPU architecture the engines are for, as ``8.9``; None where any
        will do.
        compute_dtype: type of activations and of the K/V cache.
        placement: ``shared``: the weights are inputs, bound from the pack; ``baked``: TensorRT
            engines hold their own copy; ``external``: the portable graphs, which map the pack.
        capacity: slots of the K/V cache where the engines fix it; the largest, where there are
        several.
        workspace_mib: limit on an engine's scratch memory that was asked for.
        library: name and version of what compiled it, as ``tensorrt_rtx 1.7.1.116``; an engine runs
        only under that version.
        graphs: one for each graph of the bundle; of the largest capacity.
        smaller: engines of smaller capacities, ascending; absent where there are none.
        revision: digest of the code that lowered and compiled the graphs; absent where these are
        the portable ones, and in bundles of before. Another revision is built again.
    """

    _left_out = frozenset({"revision", "smaller"})

    backend: Literal["onnxruntime", "tensorrt_rtx", "tensorrt"]
    device: Literal["cpu", "cuda"]
    compute_capability: str | None
    compute_dtype: DType
    placement: Literal["shared", "baked", "external"]
    capacity: int | None
    workspace_mib: int | None
    library: str
    graphs: dict[Role, EngineRecord]
    smaller: tuple[CapacityRecord, ...] = ()
    revision: str | None = None

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

        def changed(graphs: dict[Role, EngineRecord]) -> dict[Role, EngineRecord]:
            return {role: change(engine) for role, engine in graphs.items()}

        smaller = tuple(
            one.model_copy(update={"graphs": changed(one.graphs)}) for one in self.smaller
        )
        return self.model_copy(update={"graphs": changed(self.graphs), "smaller": smaller})

    def without_plans(self) -> TargetRecord:
        """The record as it is planned, before there are engines to read."""
        absent: dict[str, Any] = {"plans": (), "constant_bytes": 0}
        return self.with_engines(lambda engine: engine.model_copy(update=absent))


class PrecisionRecord(_Part):
    """One precision of the model: its weights, its portable graphs, its targets.

    Attributes:
        calibration: of quantized precisions, and only of these.
        packs: where its tensors lie. The first is its own, all of it. Of the others, which belong
            to other precisions, it reads what these have in common: tensors that are neither
            quantized nor scales.
        weight_bytes: size of its tensors.
        graphs: the portable graph of each role of the bundle.
        targets: what was built, by name.
    """

    calibration: CalibrationRecord | None = None
    packs: tuple[FileName, ...] = Field(min_length=1)
    weight_bytes: int = Field(ge=0)
    graphs: dict[Role, FileName]
    targets: dict[str, TargetRecord]


class SamplerRecord(_Part):
    """The learned sampler of block diffusion.

    Attributes:
        file: its graph, weights inside; float32, for ONNX Runtime on the CPU.
        name: the folder's that it was built from.
        sha256: of the trained weights, ``sampler_sha256`` in that folder's record.
        num_parameters: of the network, without its token table.
        block_lengths: that it was trained on; it takes any.
        threshold: score from which a slot is filled, where nobody says otherwise.
    """

    file: FileName
    name: str
    sha256: str
    num_parameters: int
    block_lengths: tuple[int, ...]
    threshold: float = Field(ge=0, le=1)


class Manifest(_Part):
    """The contents of ``manifest.json``.

    Attributes:
        dtype: of every tensor in every pack but the position tables, which are float32, and weights
        that are quantized; GPUs compute in it.
        contracts: what each graph takes and returns, whatever the precision: one for each of
            :data:`trimode.formats.contract.ROLES`, and for ``quadratic`` where it was asked for.
        precisions: in the order they were built; the first is the one that runs where none is asked
        for.
        sampler: None = block diffusion goes by rules alone. The file then has no such field, and
            readers of the schema that know none take it.
    """

    _left_out = frozenset({"sampler"})

    schema_version: int
    trimode_version: str
    model: ModelInfo
    source: SourceRecord
    dtype: DType
    contracts: dict[Role, GraphContract]
    precisions: dict[PrecisionName, PrecisionRecord] = Field(min_length=1)
    files: dict[FileName, FileRecord]
    libraries: dict[str, str]
    sampler: SamplerRecord | None = None

    @property
    def first_precision(self) -> PrecisionName:
        """The precision that was built first."""
        return next(iter(self.precisions))

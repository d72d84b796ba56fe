"""Decides what a TensorRT session can decide without a GPU.

That is where tensors lie, which profile a forward runs under, and what is bound to what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trimode.errors import BundleError, DeviceError, UsageError
from trimode.formats.contract import (
    MAX_BLOCK_LENGTH,
    SCRATCH,
    DType,
    GraphContract,
    GraphName,
    ModelInfo,
    TensorSpec,
    cache_specs,
    slots_written,
)
from trimode.formats.hints import REBUILD_TARGET
from trimode.formats.manifest import EngineRecord, ProfileRecord
from trimode.formats.safetensors import NUMBER_BYTES, PackEntry
from trimode.runtime.sessions.gpu import Gpu

ALIGNMENT = 256
"""Every tensor begins at a multiple of this many bytes, as TensorRT asks."""

DEVICE_OUTPUTS = ("logits",)
"""Large outputs that stay on the GPU until sampling or log-probabilities need them."""


@dataclass(frozen=True)
class Layout:
    """Says where tensors lie in one piece of memory, and its size."""

    offsets: dict[str, int]
    num_bytes: int


def lay_out(sizes: Mapping[str, int]) -> Layout:
    """Place tensors of these sizes in bytes one after the other.

    Each begins at a multiple of :data:`ALIGNMENT`.
    """
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return Layout(offsets, end)


@dataclass(frozen=True)
class CacheLayout:
    """Says where keys and values of ``batch`` sequences lie.

    Each tensor has the sequences one after the other, ``sequence_bytes`` each.

    Names are those of the cache tensors without ``past_key_values`` or ``present``.
    """

    layout: Layout
    sequence_bytes: int
    batch: int


def lay_out_cache(model: ModelInfo, dtype: DType, capacity: int, batch: int = 1) -> CacheLayout:
    """The cache of ``batch`` sequences.

    Raises:
        UsageError: one of several would not begin where TensorRT lets a tensor begin.
    """
    size = model.num_key_value_heads * capacity * model.head_dim * NUMBER_BYTES[dtype]
    if batch > 1 and size % ALIGNMENT:
        raise UsageError(
            f"expected, for a batch, {ALIGNMENT} to divide the bytes of a sequence in "
            f"the cache, found {size} (capacity {capacity})",
            REBUILD_TARGET,
        )
    names = (
        spec.name.removeprefix("past_key_values") for spec in cache_specs(model, "past_key_values")
    )
    return CacheLayout(lay_out(dict.fromkeys(names, size * batch)), size, batch)


@dataclass(frozen=True)
class IoLayout:
    """Says where inputs and outputs of one graph lie.

    One piece of memory has the inputs, then what is copied back, then what stays.

    Attributes:
        layout: Place of each.
        inputs_end: Bytes ``0 .. inputs_end`` are copied to the GPU before a forward.
        copied_end: Bytes ``inputs_end .. copied_end`` are copied back after it.
    """

    contract: GraphContract
    layout: Layout
    inputs_end: int
    copied_end: int


def engine_contract(contract: GraphContract, dtype: DType) -> GraphContract:
    """Return the contract as an engine keeps it.

    Outputs that stay on the GPU are in the type ``dtype`` that it computes in. They are widened
    when they are fetched.
    """
    outputs = tuple(
        spec.model_copy(update={"dtype": dtype}) if spec.name in DEVICE_OUTPUTS else spec
        for spec in contract.outputs
    )
    return contract.model_copy(update={"outputs": outputs})


def lay_out_io(
    contract: GraphContract, rows: int, batch: int = 1, scratch_bytes: int = 0
) -> IoLayout:
    """Room for forwards of up to ``batch`` sequences and ``rows`` rows.

    A shorter tensor begins where the longest would.

    ``scratch_bytes`` are for outputs that nobody reads (:func:`query_bytes`). All of them share one
    place: a layer's query is computed from what the layers before it gave, and so is written only
    after theirs have been read.
    """
    inputs = {spec.name: tensor_bytes(spec, rows, batch) for spec in contract.inputs}
    copied = {
        spec.name: tensor_bytes(spec, rows, batch)
        for spec in contract.outputs
        if spec.name not in DEVICE_OUTPUTS
    }
    kept = {
        spec.name: tensor_bytes(spec, rows, batch)
        for spec in contract.outputs
        if spec.name in DEVICE_OUTPUTS
    }
    return IoLayout(
        contract,
        lay_out(inputs | copied | kept | {SCRATCH: scratch_bytes}),
        lay_out(inputs).num_bytes,
        lay_out(inputs | copied).num_bytes,
    )


def tensor_shape(spec: TensorSpec, rows: int, batch: int = 1) -> tuple[int, ...]:
    """Return an input's or output's shape for ``batch`` sequences of ``rows`` rows."""
    sizes = {"batch": batch, "rows": rows, "window": min(rows, MAX_BLOCK_LENGTH)}
    return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)


def tensor_bytes(spec: TensorSpec, rows: int, batch: int = 1) -> int:
    """Size of an input or output for ``batch`` sequences of ``rows`` rows."""
    return math.prod(tensor_shape(spec, rows, batch)) * NUMBER_BYTES[spec.dtype]


def query_bytes(
    model: ModelInfo, dtype: DType, graph_name: GraphName, rows: int, batch: int = 1
) -> int:
    """Return the bytes of one layer's queries in a forward.

    Their shape is ``(batch, heads, rows, head size)``.
    """
    return (
        batch
        * model.num_attention_heads
        * slots_written(graph_name, rows)
        * model.head_dim
        * NUMBER_BYTES[dtype]
    )


def max_rows(record: EngineRecord) -> int:
    """Most rows of one sequence that any profile holds."""
    return max((profile.rows[2] for profile in record.profiles if profile.batch[0] <= 1), default=0)


def max_batch(records: Iterable[EngineRecord]) -> int:
    """Most sequences that every profile of these engines holds."""
    return min(profile.batch[2] for record in records for profile in record.profiles)


def choose_profile(record: EngineRecord, rows: int, batch: int = 1) -> int:
    """Return the index of the narrowest profile that holds a forward.

    The forward is of ``batch`` sequences of ``rows`` rows.

    Raises:
        UsageError: none holds it.
    """
    fitting = [i for i, profile in enumerate(record.profiles) if profile.holds(batch, rows)]
    if not fitting:
        raise UsageError(
            "expected a block of a length that the engine was built for "
            f"({describe_rows(record)}), found {rows}",
            "choose one of these lengths, or build the target with `block_lengths`",
        )
    return min(fitting, key=lambda i: _width(record.profiles[i]))


def describe_rows(record: EngineRecord) -> str:
    """Describe the numbers of rows that an engine takes.

    For messages: ``8, 32`` or ``1, 1 to 512``.
    """
    ranges = sorted(
        {(profile.rows[0], profile.rows[2]) for profile in record.profiles if profile.batch[0] <= 1}
    )
    return ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in ranges)


def recurs(profile: ProfileRecord, rows: int, model: ModelInfo) -> bool:
    """Tell whether forwards of this size come again and again.

    Recording one is then worth while: decoding and blocks, not prompt chunks.
    """
    return rows == profile.rows[1] and rows <= model.max_block_length


def _width(profile: ProfileRecord) -> int:
    return profile.rows[2] - profile.rows[0]


@dataclass(frozen=True)
class EngineTensor:
    """One input or output of an engine.

    ``dtype`` in the contract's words, or the library's where the contract has none.
    """

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BindingPlan:
    """Says what an engine's tensors are.

    Attributes:
        inputs: Inputs of the contract; an engine may lack one that its graph does not use.
        outputs: Outputs of the contract.
        caches: Engine tensor -> cache tensor, past and present alike.
        weights: Tensors to be bound from the pack.
        scratch: Outputs that nobody reads.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    caches: dict[str, str]
    weights: tuple[str, ...]
    scratch: tuple[str, ...] = ()


def plan_bindings(
    graph_name: GraphName,
    tensors: Iterable[EngineTensor],
    contract: GraphContract,
    model: ModelInfo,
    cache: TensorSpec,
    pack: Mapping[str, PackEntry],
) -> BindingPlan:
    """Sort the tensors of an engine, and check each.

    It is checked against the contract or the weight pack.

    Args:
        graph_name: Name of the graph, for messages.
        tensors: Tensors as the engine has them.
        contract: Inputs and outputs of the graph.
        model: Facts of the model, for the number of layers and the shape of a query.
        cache: Type and shape of every cache tensor.
        pack: Tensors of the precision.

    Raises:
        BundleError: the engine lacks an output or a cache tensor, or has a tensor that is not as
            expected or that nothing can be bound to.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    caches = {
        spec.name: spec.name.removeprefix(prefix)
        for prefix in ("past_key_values", "present")
        for spec in cache_specs(model, prefix)
    }
    inputs = {spec.name: spec for spec in contract.inputs}
    outputs = {spec.name: spec for spec in contract.outputs}
    for name in (*outputs, *caches):
        if name not in by_name:
            raise BundleError(
                f"{graph_name} engine: expected a tensor {name}, found none", REBUILD_TARGET
            )
    weights, scratch = [], []
    for name, tensor in by_name.items():
        if name in caches:
            _check_tensor(graph_name, tensor, cache.dtype, cache.shape)
        elif name in inputs or name in outputs:
            spec = inputs.get(name) or outputs[name]
            _check_tensor(graph_name, tensor, spec.dtype, spec.shape)
        elif not tensor.is_input and name.startswith(f"{SCRATCH}."):
            _check_tensor(
                graph_name,
                tensor,
                cache.dtype,
                ("batch", model.num_attention_heads, "query_rows", model.head_dim),
            )
            scratch.append(name)
        elif tensor.is_input and name in pack:
            _check_tensor(graph_name, tensor, pack[name].dtype, pack[name].shape)
            weights.append(name)
        else:
            raise BundleError(
                f"{graph_name} engine: "
                f"expected only tensors of the contract and of the weight pack, found {name}",
                REBUILD_TARGET,
            )
    return BindingPlan(
        tuple(n for n in inputs if n in by_name),
        tuple(outputs),
        caches,
        tuple(weights),
        tuple(scratch),
    )


def _check_tensor(
    graph_name: GraphName, tensor: EngineTensor, dtype: DType, shape: tuple[int | str, ...]
) -> None:
    same = len(tensor.shape) == len(shape) and all(
        isinstance(w, str) or g in (-1, w) for g, w in zip(tensor.shape, shape, strict=True)
    )
    if not same or tensor.dtype != dtype:
        wanted = tuple(-1 if isinstance(d, str) else d for d in shape)
        raise BundleError(
            f"{graph_name} engine: expected {tensor.name} to be {dtype} {wanted}, "
            f"found {tensor.dtype} {tensor.shape}",
            REBUILD_TARGET,
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the GPU for one sequence.

    Scratch memory of the engines is known only once they are loaded.
    """

    engines: int
    weights: int
    cache: int
    io: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.engines + self.weights + self.cache + self.io


def check_memory(plan: MemoryPlan, gpu: Gpu) -> None:
    """Raise :class:`DeviceError` where the GPU is too small.

    Nothing else that runs on it is counted.
    """
    if plan.total > gpu.memory_bytes:
        parts = (
            f"weights {_gib(plan.weights)}, engines {_gib(plan.engines)}, "
            f"cache {_gib(plan.cache)}, inputs and outputs {_gib(plan.io)}"
        )
        raise DeviceError(
            f"expected at least {_gib(plan.total)} GiB of GPU memory ({parts}), "
            f"found {_gib(gpu.memory_bytes)} on {gpu.name}",
            "build with a smaller `max_length`, or choose the target cpu",
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"

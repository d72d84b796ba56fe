"""ONNX Runtime behind :class:`trimode.runtime.sessions.base.Session`: IO binding, the cache updated
in place, weights held once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from trimode.errors import BundleError, UsageError
from trimode.formats.contract import (
    ROLES,
    DType,
    GraphContract,
    ModelInfo,
    Role,
    TensorSpec,
    cache_specs,
    slots_written,
)
from trimode.formats.hints import REBUILD
from trimode.formats.manifest import TargetRecord
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.sessions.base import Array, Closable, DeviceArray, Ids, KVCache, bucket
from trimode.runtime.sessions.ort.library import (
    PRIVATE_WEIGHTS_BYTES,
    Device,
    choose_providers,
    load_graph,
    session_options,
)
from trimode.runtime.sessions.ort.memory import Buffer, place, place_weights, zeros
from trimode.runtime.sessions.ort.onnx_file import operators
from trimode.runtime.sessions.ort.prepacked import prepacked_graphs

_ONE_ROW = range(1)
_FREE_TOKENS: dict[Device, int] = {"cpu": 8, "cuda": 64}
"""On a CPU a forward over a few tokens waits for the weights, and further ones soon cost time of
their own; on a GPU much later.
"""

logger = logging.getLogger("trimode.runtime")


class OrtSession(Closable):
    """Inference sessions, one for each graph, over one copy of the weights.

    Args:
        bundle: an opened bundle, whose chosen precision runs.
        target: what was built for ONNX Runtime; None = the portable graphs, in float32 on the CPU.
        num_threads: threads inside one operator; None = one per physical core.
        runtime_cache: folder for int4 weights that ONNX Runtime has prepacked for this processor;
            None = the user's cache folder. Where it cannot be written, each graph arranges a copy
            of its own, and a warning says so.

    Raises:
        UsageError: ``num_threads`` is below 1.
        BundleError: ONNX Runtime refuses a graph, or the weight pack lacks what a graph reads.
        DependencyError: this ONNX Runtime has no CUDA provider, and the target needs it.
        DeviceError: the CUDA provider does not start.
    """

    max_prefill_rows = None
    max_batch = None

    def __init__(
        self,
        bundle: Bundle,
        target: TargetRecord | None = None,
        num_threads: int | None = None,
        *,
        runtime_cache: Path | None = None,
    ) -> None:
        if num_threads is not None and num_threads < 1:
            raise UsageError(
                f"expected at least 1 thread, found {num_threads}",
                "leave --threads out to use every core",
            )
        manifest = bundle.manifest
        self.model = manifest.model
        self.contracts: dict[Role, GraphContract] = dict(manifest.contracts)
        self._device: Device = target.device if target else "cpu"
        self.free_tokens = _FREE_TOKENS[self._device]
        self._dtype: DType = target.compute_dtype if target else "float32"
        self._capacity = target.capacity if target else None
        providers = choose_providers(self._device)
        portable = target is None or target.placement == "external"
        mapped_bytes = bundle.chosen.weight_bytes if portable else 0
        files = {
            role: bundle.chosen.graphs[role]
            if portable or target is None
            else target.graphs[role].file
            for role in self.contracts
        }
        found = _operators(bundle.path / file for file in files.values())
        self.sessions: dict[Role, Any]
        if "MatMulNBits" in found:
            self.sessions = _load_int4(bundle, files, mapped_bytes, num_threads, runtime_cache)
        else:
            options = session_options(
                mapped_bytes, num_threads, dequantizes="DequantizeLinear" in found
            )
            self.sessions = {
                role: load_graph(bundle.path / file, options, providers)
                for role, file in files.items()
            }
        wanted = {
            role: _weight_inputs(self.sessions[role], self.contracts[role], self.model)
            for role in files
        }
        self._weights = place_weights(bundle.weights(), wanted.values(), self._device)
        self._read_by: dict[Role, dict[str, Buffer]] = {
            role: {name: self._weights[name] for name in wanted[role]} for role in files
        }

    def check_block_length(self, block_length: int, roles: tuple[Role, ...] = ROLES) -> None:
        """Any will do."""

    def close(self) -> None:
        """See :class:`trimode.runtime.sessions.base.Session`."""
        self.is_closed = True
        self.sessions.clear()
        self._read_by.clear()
        self._weights.clear()

    def new_cache(self) -> OrtCache:
        """See :class:`trimode.runtime.sessions.base.Session`."""
        return self.new_batch_cache(1)

    def new_batch_cache(self, num_rows: int) -> OrtCache:
        """See :class:`trimode.runtime.sessions.base.BatchSession`."""
        self.check_open()
        return OrtCache(self.model, self._dtype, self._device, self._capacity, num_rows)

    def run(
        self,
        role: Role,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        """See :class:`trimode.runtime.sessions.base.Session`."""
        end = past_length + slots_written(role, input_ids.shape[1])
        if end > cache.capacity:
            cache.reserve(end)
        return self._run(
            role,
            cast("OrtCache", cache),
            _ONE_ROW,
            input_ids,
            past_length,
            input_ids.shape[1],
            drafter_scale,
        )

    def run_rows(
        self,
        role: Role,
        cache: KVCache,
        rows: range,
        input_ids: Ids,
        past_length: Ids,
        input_length: Ids,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        """See :class:`trimode.runtime.sessions.base.BatchSession`."""
        return self._run(
            role, cast("OrtCache", cache), rows, input_ids, past_length, input_length, drafter_scale
        )

    def _run(
        self,
        role: Role,
        cache: OrtCache,
        rows: range,
        input_ids: Ids,
        past_length: Ids | int,
        input_length: Ids | int,
        drafter_scale: float,
    ) -> tuple[Array, ...]:
        self.check_open()
        bound = cache.bound.get((role, rows, input_ids.shape[1])) or self._bind(
            role, cache, rows, input_ids.shape[1]
        )
        bound.input_ids[:] = input_ids
        bound.past_length[:] = past_length
        if bound.input_length is not None:
            bound.input_length[:] = input_length
        if bound.drafter_scale is not None:
            bound.drafter_scale[...] = drafter_scale
        bound.bind_inputs()
        self.sessions[role].run_with_iobinding(bound.binding)
        return bound.outputs

    def _bind(self, role: Role, cache: OrtCache, rows: range, num_tokens: int) -> BoundGraph:
        contract, is_kept = self.contracts[role], num_tokens <= self.model.max_block_length
        num_rows = cache.num_rows if is_kept else len(rows)
        io = cache.io.get((role, num_tokens)) or GraphBuffers(
            contract, num_rows, num_tokens, cache.device
        )
        bound = BoundGraph(self.sessions[role], cache, rows, io, self._read_by[role])
        if is_kept:  # prompt chunks come in any size and once: not worth keeping
            cache.io[role, num_tokens] = io
            cache.bound[role, rows, num_tokens] = bound
        return bound


class OrtCache:
    """Keys and values as one buffer each per layer.

    Grows by copying into buffers of the next bucket.

    Args:
        model: sizes.
        dtype: type of keys and values.
        device: where they are.
        fixed_capacity: the only capacity that the graphs accept; None = any.
        num_rows: texts. On the CPU, rows that nobody has written yet take no memory until the
            buffers grow.

    Attributes:
        bound: graphs over neighbouring rows and a number of tokens.
        io: their inputs and outputs, for all rows; graphs over some of them share it.
    """

    def __init__(
        self,
        model: ModelInfo,
        dtype: DType = "float32",
        device: Device = "cpu",
        fixed_capacity: int | None = None,
        num_rows: int = 1,
    ) -> None:
        self._model, self._dtype, self._fixed = model, dtype, fixed_capacity
        self.device: Device = device
        self.num_rows = num_rows
        self._names = [
            spec.name.removeprefix("past_key_values")
            for spec in cache_specs(model, "past_key_values")
        ]
        self.values: dict[str, Buffer] = {}
        self.bound: dict[tuple[Role, range, int], BoundGraph] = {}
        self.io: dict[tuple[Role, int], GraphBuffers] = {}
        self.capacity = 0

    def reserve(self, length: int) -> None:
        """See :class:`trimode.runtime.sessions.base.KVCache`."""
        if length <= self.capacity:
            return
        if self._fixed is not None and length > self._fixed:
            raise UsageError(
                f"expected at most {self._fixed} tokens, "
                f"which the cache of this target holds, found {length}",
                "shorten the text, or build with a larger --max-length",
            )
        self.bound.clear()
        self.capacity = self._fixed or bucket(length)
        # One after the other, so that never more than one buffer exists twice.
        for name in self._names:
            self.values[name] = self._grown(self.values.get(name))

    def move(self, source: int, destination: int) -> None:
        if self.device != "cpu":
            self.bound.clear()
        for name, buffer in self.values.items():
            values = buffer.numpy()  # on a GPU a copy, as where it grows
            values[destination] = values[source]
            if self.device != "cpu":
                self.values[name] = place(values, self._dtype, self.device)

    def _grown(self, old: Buffer | None) -> Buffer:
        new = zeros(
            (self.num_rows, self._model.num_key_value_heads, self.capacity, self._model.head_dim),
            self._dtype,
            self.device,
        )
        if old is None:
            return new
        # on a GPU the copy goes through the host: rare, and ONNX Runtime copies whole tensors only
        grown = new.numpy()
        grown[:, :, : old.shape[2]] = old.numpy()
        return place(grown, self._dtype, self.device)


class GraphBuffers:
    """Inputs and outputs of a graph for a number of rows and of tokens a row."""

    def __init__(
        self, contract: GraphContract, num_rows: int, num_tokens: int, device: Device
    ) -> None:
        sizes = {"batch": num_rows, "rows": num_tokens}
        self.inputs = {spec.name: _array(spec, sizes) for spec in contract.inputs}
        self.outputs = {
            spec.name: zeros(_shape(spec, sizes), spec.dtype, _output_device(spec, device))
            for spec in contract.outputs
        }


class BoundGraph:
    """One graph bound to neighbouring rows of one cache.

    A step writes the inputs in place, binds them and runs.

    Args:
        session: the graph.
        cache: of one text, or of a batch.
        rows: which texts of it.
        io: for at least as many rows; the first of them are used.
        weights: what the graph takes as further inputs.
    """

    def __init__(
        self,
        session: Any,
        cache: OrtCache,
        rows: range,
        io: GraphBuffers,
        weights: Mapping[str, Buffer],
    ) -> None:
        self.binding = session.io_binding()
        first = range(len(rows))
        self._weights = dict(weights)  # kept alive, as all of it: the binding knows addresses only
        self._cache = {name: buffer.part(rows) for name, buffer in cache.values.items()}
        self._inputs = {
            name: array[: len(rows)] if array.ndim else array for name, array in io.inputs.items()
        }
        self._buffers = tuple(buffer.part(first) for buffer in io.outputs.values())
        for name, buffer in zip(io.outputs, self._buffers, strict=True):
            buffer.bind_output(self.binding, name)
        for name, buffer in self._weights.items():
            buffer.bind_input(self.binding, name)
        for name, buffer in self._cache.items():
            # The same memory as past and present: TensorScatter then writes the new rows and copies
            # nothing.
            buffer.bind_input(self.binding, f"past_key_values{name}")
            buffer.bind_output(self.binding, f"present{name}")
        self.bind_inputs()
        self.input_ids, self.past_length = self._inputs["input_ids"], self._inputs["past_length"]
        self.input_length, self.drafter_scale = (
            self._inputs.get("input_length"),
            self._inputs.get("drafter_scale"),
        )
        self.outputs = tuple(_as_array(buffer) for buffer in self._buffers)

    def bind_inputs(self) -> None:
        """Tell the graph the inputs' values: where it runs on a GPU, binding an array copies it
        there.
        """
        for name, array in self._inputs.items():
            self.binding.bind_cpu_input(name, array)


def _operators(graphs: Iterable[Path]) -> set[str]:
    """The operators of all graphs together."""
    found: set[str] = set()
    for path in graphs:
        try:
            found |= operators(path.read_bytes())
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{path}: expected an ONNX graph, found one that cannot be read ({error})", REBUILD
            ) from error
    return found


def _load_int4(
    bundle: Bundle,
    files: Mapping[Role, str],
    mapped_bytes: int,
    num_threads: int | None,
    cache: Path | None,
) -> dict[Role, Any]:
    """The portable graphs of int4 products: over one file of prepacked weights, or where they are
    few each over a copy of its own.
    """
    providers = choose_providers("cpu")
    if mapped_bytes > PRIVATE_WEIGHTS_BYTES:
        try:
            graphs = prepacked_graphs(bundle, files, lambda: session_options(0, num_threads), cache)
            options = session_options(0, num_threads, is_optimized=True)
            return {role: load_graph(path, options, providers) for role, path in graphs.items()}
        except (OSError, ValueError, BundleError) as error:
            reason = error.message if isinstance(error, BundleError) else error
            logger.warning(
                "the graphs cannot share their int4 weights, each keeps a copy of its own: %s",
                reason,
            )
    options = session_options(0, num_threads)
    return {
        role: load_graph(bundle.path / file, options, providers) for role, file in files.items()
    }


def _shape(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)


def _array(spec: TensorSpec, sizes: dict[str, int]) -> Array:
    return np.zeros(_shape(spec, sizes), np.dtype(spec.dtype))


def _output_device(spec: TensorSpec, device: Device) -> Device:
    """Logits are large and seldom read: they stay where they are computed. All else is small."""
    return device if spec.name == "logits" else "cpu"


def _as_array(buffer: Buffer) -> Any:
    if buffer.device == "cpu":
        return buffer.numpy()
    return DeviceArray(buffer.shape, np.dtype(buffer.dtype), buffer.numpy)


def _weight_inputs(session: Any, contract: GraphContract, model: ModelInfo) -> dict[str, Any]:
    """The inputs that are neither the contract's nor the cache: weights, by name."""
    known = {spec.name for spec in (*contract.inputs, *cache_specs(model, "past_key_values"))}
    return {
        declared.name: declared for declared in session.get_inputs() if declared.name not in known
    }

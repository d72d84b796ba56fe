"""Puts ONNX Runtime behind :class:`trimode.runtime.sessions.base.Session`.

It uses IO binding, updates the cache in place, and holds the weights once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from trimode.errors import BundleError, UsageError
from trimode.formats.contract import (
    GRAPH_NAMES,
    DType,
    GraphContract,
    GraphName,
    ModelInfo,
    cache_specs,
    slots_written,
)
from trimode.formats.hints import REBUILD
from trimode.formats.manifest import TargetRecord
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.sessions.base import Array, Closable, Ids, KVCache
from trimode.runtime.sessions.ort.cache import BoundGraph, GraphBuffers, OrtCache, capacity_for
from trimode.runtime.sessions.ort.library import (
    PRIVATE_WEIGHTS_BYTES,
    Device,
    choose_providers,
    load_graph,
    session_options,
)
from trimode.runtime.sessions.ort.memory import Buffer, place_weights
from trimode.runtime.sessions.ort.onnx_file import operators
from trimode.runtime.sessions.ort.prepacked import prepacked_graphs

_ONE_ROW = range(1)
_MOST_DENSE_BYTES = 8 << 30
"""Largest pack in float32 that is arranged: it takes twice its size in the cache."""
_FREE_TOKENS: dict[Device, int] = {"cpu": 8, "cuda": 64}
"""On a CPU a forward over a few tokens waits for the weights, and further ones soon cost time of
their own; on a GPU much later.
"""

logger = logging.getLogger("trimode.runtime")


class OrtSession(Closable):
    """Runs one inference session per graph over one copy of the weights.

    Args:
        bundle: Opened bundle, whose chosen precision runs.
        target: Target built for ONNX Runtime; None = the portable graphs, in float32 on the CPU.
        num_threads: Threads inside one operator; None = one per physical core.
        runtime_cache: Folder for int4 weights that ONNX Runtime has prepacked for this processor;
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
                "leave `num_threads` out to use every core",
            )
        manifest = bundle.manifest
        self.model = manifest.model
        self.contracts: dict[GraphName, GraphContract] = dict(manifest.contracts)
        self._device: Device = target.device if target else "cpu"
        self.free_tokens = _FREE_TOKENS[self._device]
        self._dtype: DType = target.compute_dtype if target else "float32"
        self._capacity = target.capacity if target else None
        providers = choose_providers(self._device)
        is_mapped = target is None or target.placement == "external"
        mapped_bytes = bundle.chosen.weight_bytes if is_mapped else 0
        files = {
            graph_name: target.graphs[graph_name].file
            if target
            else bundle.chosen.graphs[graph_name]
            for graph_name in self.contracts
        }
        found = _operators(bundle.path / file for file in files.values())
        self.sessions: dict[GraphName, Any]
        if "MatMulNBits" in found or _gains_by_arranging(target, found, mapped_bytes):
            # without int4, a graph that keeps no copy of its own still maps the pack
            alone = 0 if "MatMulNBits" in found else mapped_bytes
            self.sessions = _load_arranged(
                bundle, files, mapped_bytes, alone, num_threads, runtime_cache
            )
        else:
            options = session_options(
                mapped_bytes, num_threads, dequantizes="DequantizeLinear" in found
            )
            self.sessions = {
                graph_name: load_graph(bundle.path / file, options, providers)
                for graph_name, file in files.items()
            }
        wanted = {
            graph_name: _weight_inputs(
                self.sessions[graph_name], self.contracts[graph_name], self.model
            )
            for graph_name in files
        }
        self._weights = place_weights(bundle.weights(), wanted.values(), self._device)
        self._read_by: dict[GraphName, dict[str, Buffer]] = {
            graph_name: {name: self._weights[name] for name in wanted[graph_name]}
            for graph_name in files
        }

    def check_block_length(
        self, block_length: int, graph_names: tuple[GraphName, ...] = GRAPH_NAMES
    ) -> None:
        """Any will do."""

    def close(self) -> None:
        self.is_closed = True
        self.sessions.clear()
        self._read_by.clear()
        self._weights.clear()

    def new_cache(self) -> OrtCache:
        return self.new_batch_cache(1)

    def new_batch_cache(self, num_rows: int) -> OrtCache:
        self.check_open()
        return OrtCache(self.model, self._dtype, self._device, self._capacity, num_rows)

    def capacity_for(self, length: int) -> int:
        return capacity_for(length, self._capacity)

    def run(
        self,
        graph_name: GraphName,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        end = past_length + slots_written(graph_name, input_ids.shape[1])
        if end > cache.capacity:
            cache.reserve(end)
        return self._run(
            graph_name,
            cast("OrtCache", cache),
            _ONE_ROW,
            input_ids,
            past_length,
            input_ids.shape[1],
            drafter_scale,
        )

    def run_rows(
        self,
        graph_name: GraphName,
        cache: KVCache,
        rows: range,
        input_ids: Ids,
        past_length: Ids,
        input_length: Ids,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        return self._run(
            graph_name,
            cast("OrtCache", cache),
            rows,
            input_ids,
            past_length,
            input_length,
            drafter_scale,
        )

    def _run(
        self,
        graph_name: GraphName,
        cache: OrtCache,
        rows: range,
        input_ids: Ids,
        past_length: Ids | int,
        input_length: Ids | int,
        drafter_scale: float,
    ) -> tuple[Array, ...]:
        self.check_open()
        bound = cache.bound.get((graph_name, rows, input_ids.shape[1])) or self._bind(
            graph_name, cache, rows, input_ids.shape[1]
        )
        bound.input_ids[:] = input_ids
        bound.past_length[:] = past_length
        if bound.input_length is not None:
            bound.input_length[:] = input_length
        if bound.drafter_scale is not None:
            bound.drafter_scale[...] = drafter_scale
        bound.bind_inputs()
        self.sessions[graph_name].run_with_iobinding(bound.binding)
        return bound.outputs

    def _bind(
        self, graph_name: GraphName, cache: OrtCache, rows: range, num_tokens: int
    ) -> BoundGraph:
        contract, is_kept = self.contracts[graph_name], num_tokens <= self.model.max_block_length
        num_rows = cache.num_rows if is_kept else len(rows)
        io = cache.io.get((graph_name, num_tokens)) or GraphBuffers(
            contract, num_rows, num_tokens, cache.device
        )
        bound = BoundGraph(self.sessions[graph_name], cache, rows, io, self._read_by[graph_name])
        if is_kept:  # prompt chunks come in any size and once: not worth keeping
            cache.io[graph_name, num_tokens] = io
            cache.bound[graph_name, rows, num_tokens] = bound
        return bound


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


def _gains_by_arranging(target: TargetRecord | None, found: set[str], mapped_bytes: int) -> bool:
    """Whether float32 products get weights in ONNX Runtime's own arrangement, held once.

    Portable graphs, which bundles of before run too, keep mapping the pack.
    """
    is_own = target is not None and target.placement == "external" and target.revision is not None
    is_dense = "DequantizeLinear" not in found
    return is_own and is_dense and PRIVATE_WEIGHTS_BYTES < mapped_bytes <= _MOST_DENSE_BYTES


def _load_arranged(
    bundle: Bundle,
    files: Mapping[GraphName, str],
    mapped_bytes: int,
    alone: int,
    num_threads: int | None,
    cache: Path | None,
) -> dict[GraphName, Any]:
    """The graphs over one file of prepacked weights.

    Where these are few, or the file cannot be had, each as if it was alone: over a copy of its own,
    or mapping ``alone`` bytes of the pack.
    """
    providers = choose_providers("cpu")
    if mapped_bytes > PRIVATE_WEIGHTS_BYTES:
        try:
            graphs = prepacked_graphs(bundle, files, lambda: session_options(0, num_threads), cache)
            options = session_options(0, num_threads, is_optimized=True)
            return {
                graph_name: load_graph(path, options, providers)
                for graph_name, path in graphs.items()
            }
        except (OSError, ValueError, BundleError) as error:
            reason = error.message if isinstance(error, BundleError) else error
            logger.warning(
                "the graphs cannot share their %s: %s",
                "arranged weights, all map the pack"
                if alone
                else "int4 weights, each keeps a copy of its own",
                reason,
            )
    options = session_options(alone, num_threads)
    return {
        graph_name: load_graph(bundle.path / file, options, providers)
        for graph_name, file in files.items()
    }


def _weight_inputs(session: Any, contract: GraphContract, model: ModelInfo) -> dict[str, Any]:
    """Return the inputs that are weights, by name.

    They are neither the contract's nor the cache.
    """
    known = {spec.name for spec in (*contract.inputs, *cache_specs(model, "past_key_values"))}
    return {
        declared.name: declared for declared in session.get_inputs() if declared.name not in known
    }

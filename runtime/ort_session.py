"""ONNX Runtime behind :class:`trimode.runtime.session.Session`: IO binding, the cache updated in place, weights mapped once."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from trimode.errors import BundleError, DependencyError, UsageError
from trimode.graphs.contract import ROLES, GraphContract, ModelInfo, Role, TensorSpec, cache_specs
from trimode.runtime.bundle import Bundle
from trimode.runtime.session import Array, Ids, KVCache, bucket

try:
    import onnxruntime as ort
except ModuleNotFoundError as error:
    raise DependencyError("expected ONNX Runtime, found it not installed", "pip install 'trimode[ort]'") from error

# Below this size every session may keep its own packed copy of the weights, which multiplies blocks up to twice as fast. Above it the
# graphs map one copy of the pack between them.
PRIVATE_WEIGHTS_BYTES = 64 << 20


class OrtSession:
    """Three inference sessions over one weight pack.

    Args:
        bundle: an opened bundle.
        num_threads: threads inside one operator; None = one per physical core.

    Raises:
        UsageError: ``num_threads`` is below 1.
        BundleError: ONNX Runtime refuses a graph.
    """

    def __init__(self, bundle: Bundle, num_threads: int | None = None) -> None:
        if num_threads is not None and num_threads < 1:
            raise UsageError(f"expected at least 1 thread, found {num_threads}", "leave --threads out to use every core")
        manifest = bundle.manifest
        self.model = manifest.model
        self.contracts: dict[Role, GraphContract] = {role: manifest.graphs[role].contract for role in ROLES}
        options = _session_options(manifest.files[manifest.weights].num_bytes, num_threads)
        self.sessions: dict[Role, Any] = {role: _load(bundle, manifest.graphs[role].file, options) for role in ROLES}

    def new_cache(self) -> OrtCache:
        """See :class:`trimode.runtime.session.Session`."""
        return OrtCache(self.model)

    def run(self, role: Role, cache: KVCache, input_ids: Ids, past_length: int, drafter_scale: float = 0.0) -> tuple[Array, ...]:
        """See :class:`trimode.runtime.session.Session`."""
        cache = cast("OrtCache", cache)
        rows = input_ids.shape[1]
        if past_length + rows > cache.capacity:
            cache.reserve(past_length + rows)
        bound = cache.bound.get((role, rows)) or self._bind(role, cache, rows)
        bound.input_ids[:] = input_ids
        bound.past_length[0] = past_length
        if bound.drafter_scale is not None:
            bound.drafter_scale[...] = drafter_scale
        self.sessions[role].run_with_iobinding(bound.binding)
        return bound.outputs

    def _bind(self, role: Role, cache: OrtCache, rows: int) -> BoundGraph:
        bound = BoundGraph(self.sessions[role], self.contracts[role], cache, rows)
        if rows <= self.model.max_block_length:  # prompt chunks come in any size and once: not worth keeping
            cache.bound[role, rows] = bound
        return bound


class OrtCache:
    """Keys and values as one numpy buffer each per layer; grows by copying into buffers of the next bucket."""

    def __init__(self, model: ModelInfo) -> None:
        self._model = model
        self._specs = [spec.name.removeprefix("past_key_values") for spec in cache_specs(model, "past_key_values")]
        self._buffers: list[NDArray[np.float32]] = []
        self.values: dict[str, Any] = {}
        self.bound: dict[tuple[Role, int], BoundGraph] = {}
        self.capacity = 0

    def reserve(self, length: int) -> None:
        """See :class:`trimode.runtime.session.KVCache`."""
        if length <= self.capacity:
            return
        old, self.capacity = self._buffers, bucket(length)
        shape = (1, self._model.num_key_value_heads, self.capacity, self._model.head_dim)
        self._buffers = [np.zeros(shape, np.float32) for _ in self._specs]
        for before, after in zip(old, self._buffers, strict=False):
            after[:, :, : before.shape[2]] = before
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(buffer) for name, buffer in zip(self._specs, self._buffers, strict=True)}
        self.bound.clear()


class BoundGraph:
    """One graph bound to one cache for one number of rows; a step writes the inputs in place and runs."""

    def __init__(self, session: Any, contract: GraphContract, cache: OrtCache, rows: int) -> None:
        sizes = {"batch": 1, "rows": rows}
        self.binding = session.io_binding()
        inputs = {spec.name: _array(spec, sizes) for spec in contract.inputs}
        outputs = {spec.name: _array(spec, sizes) for spec in contract.outputs}
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in {**inputs, **outputs}.items()}
        for name in inputs:
            self.binding.bind_ortvalue_input(name, self._values[name])
        for name in outputs:
            self.binding.bind_ortvalue_output(name, self._values[name])
        for name, value in cache.values.items():
            # The same memory as past and present: TensorScatter then writes the new rows and copies nothing.
            self.binding.bind_ortvalue_input(f"past_key_values{name}", value)
            self.binding.bind_ortvalue_output(f"present{name}", value)
        self.input_ids, self.past_length = inputs["input_ids"], inputs["past_length"]
        self.drafter_scale = inputs.get("drafter_scale")
        if "input_length" in inputs:
            inputs["input_length"][:] = rows
        self.outputs = tuple(outputs.values())


def _array(spec: TensorSpec, sizes: dict[str, int]) -> Array:
    return np.zeros([sizes[d] if isinstance(d, str) else d for d in spec.shape], np.dtype(spec.dtype))


def _session_options(weight_bytes: int, num_threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings speak of graph internals that a user cannot change
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Three sessions take turns on the same cores. A pool that spins after its turn is in the way of the next one: with two threads on two
    # cores a draft-and-verify cycle then takes three times as long.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weight_bytes > PRIVATE_WEIGHTS_BYTES:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _load(bundle: Bundle, file: str, options: Any) -> Any:
    try:
        return ort.InferenceSession(bundle.path / file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own exception types, which share no base class
        raise BundleError(f"{bundle.path / file}: ONNX Runtime {ort.__version__} refuses the graph: {str(error).splitlines()[0]}",
                          "update onnxruntime to 1.31 or newer, or build the bundle again") from error  # fmt: skip

"""Imports the onnxruntime package, and loads graphs into it.

It says whether the package is here, and what that runs on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from trimode.errors import BundleError, DependencyError, DeviceError

try:
    import onnxruntime as ort
except ModuleNotFoundError as error:
    raise DependencyError(
        "expected ONNX Runtime, found it not installed", "pip install 'trimode[ort]'"
    ) from error

__all__ = ["CUDA_PROVIDER", "Device", "choose_providers", "load_graph", "ort", "session_options"]

Device = Literal["cpu", "cuda"]

CUDA_PROVIDER = "CUDAExecutionProvider"

# Below this size every session may keep its own packed copy of the weights, which multiplies blocks
# up to twice as fast. Above it the graphs map one copy of the pack between them.
PRIVATE_WEIGHTS_BYTES = 64 << 20


def choose_providers(device: Device) -> list[Any]:
    """What ``InferenceSession`` takes as providers.

    Raises:
        DependencyError: this ONNX Runtime was built without the one for the device.
    """
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise DependencyError(
            f"expected an ONNX Runtime with the CUDA provider, found {ort.__version__} without it",
            "pip install onnxruntime-gpu in place of onnxruntime, or choose the target cpu",
        )
    return [(CUDA_PROVIDER, {"device_id": "0"}), "CPUExecutionProvider"]


def session_options(
    mapped_bytes: int,
    num_threads: int | None,
    *,
    dequantizes: bool = False,
    is_optimized: bool = False,
) -> Any:
    """Return options for sessions that take turns.

    Args:
        mapped_bytes: Size of the weights that the graphs map from a file.
        num_threads: Threads inside one operator; None = one per physical core.
        dequantizes: Whether the graphs dequantize weights.
        is_optimized: Whether ONNX Runtime wrote the graphs itself, optimized for this machine.
    """
    options = ort.SessionOptions()
    # errors only: warnings speak of graph internals that a user cannot change
    options.log_severity_level = 3
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Three sessions take turns on the same cores. A pool that spins after its turn is in the way of
    # the next one: with two threads on two cores a draft-and-verify cycle then takes three times as
    # long.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if mapped_bytes > PRIVATE_WEIGHTS_BYTES:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if is_optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if dequantizes:
        # Dequantize each weight just before its product, into the memory of the one before. By
        # default ONNX Runtime dequantizes all of them first, and keeps room for that once for every
        # number of rows: several times the model in float32. Order by priority is the graph's own,
        # but for nodes that fusions of the extended level make: those would wait until every weight
        # is dequantized.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False
    return options


def load_graph(path: Path, options: Any, providers: list[Any]) -> Any:
    """An ``InferenceSession``.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        DeviceError: the provider for the GPU does not start.
    """
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except (
        Exception
    ) as error:  # ONNX Runtime raises its own exception types, which share no base class
        raise BundleError(
            f"{path}: ONNX Runtime {ort.__version__} refuses the graph: "
            f"{str(error).splitlines()[0]}",
            "update onnxruntime to 1.31 or newer, or build the bundle again",
        ) from error
    if len(providers) > 1 and CUDA_PROVIDER not in session.get_providers():
        raise DeviceError(
            "expected ONNX Runtime's CUDA provider to start, found that it did not",
            "check the driver with nvidia-smi, "
            "and that CUDA and cuDNN are of the versions onnxruntime-gpu asks for",
        )
    return session

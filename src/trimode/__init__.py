"""trimode: a deployment compiler for tri-mode language models.

One checkpoint decodes in three ways with the same weights: autoregressive, block diffusion and
self-speculation.

- ``trimode.graphs``: what the model computes
- ``trimode.calib``: jobs that need data
- ``trimode.compiler``: checkpoint -> bundle
- ``trimode.runtime``: bundle -> tokens
- ``trimode.formats``: the files that outlive a process
- ``trimode.report``: from records to pages
- ``trimode.cli``: the command line

The names below are imported when they are asked for: ``import trimode`` alone loads no library.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trimode.errors import (
    BuildError,
    BundleError,
    CheckpointError,
    DependencyError,
    DeviceError,
    EngineError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
    TrimodeError,
    UsageError,
)

if TYPE_CHECKING:
    from trimode.runtime.decode.stream import Chunk, Generation
    from trimode.runtime.engine.handle import Handle
    from trimode.runtime.grammar.spec import StructuredOutputs
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.service import Engine

__version__ = "0.1.0"
__all__ = [
    "BuildError",
    "BundleError",
    "CheckpointError",
    "Chunk",
    "DependencyError",
    "DeviceError",
    "Engine",
    "EngineError",
    "Generation",
    "Handle",
    "QueueFullError",
    "RequestCancelledError",
    "RequestTimeoutError",
    "StructuredOutputs",
    "TriModeModel",
    "TrimodeError",
    "UsageError",
    "__version__",
]
_HOMES = {
    "Chunk": "trimode.runtime.decode.stream",
    "Engine": "trimode.runtime.service",
    "Generation": "trimode.runtime.decode.stream",
    "Handle": "trimode.runtime.engine.handle",
    "StructuredOutputs": "trimode.runtime.grammar.spec",
    "TriModeModel": "trimode.runtime.model",
}
"""Where the names are that bring numpy with them."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

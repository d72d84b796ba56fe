"""Digests the code and libraries behind traced graphs and engines."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import trimode
from trimode.formats.versions import versions

LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
MODULES = (
    "trimode.errors",
    "trimode.formats",
    "trimode.graphs",
    "trimode.compiler.passes.base",
    "trimode.compiler.passes.weights_to_inputs",
    "trimode.compiler.store.traced",
    "trimode.compiler.stages.extras",
)
"""What traces, all that it imports, and what writes a traced graph and reads it."""
LOWERING_MODULES = (
    "trimode.formats.contract",
    "trimode.graphs",
    "trimode.compiler.passes",
    "trimode.compiler.stages.engines",
    "trimode.compiler.tensorrt.builder",
)
"""What decides a lowered graph, and what compiles it. Records of targets have all else."""
BUILDER_MODULES = ("trimode.compiler.tensorrt.builder",)
"""What turns a lowered graph into an engine."""


@cache
def tracing_fingerprint() -> str:
    """Digest of the tracing code and of the libraries' versions.

    Computed once a process.
    """
    return digest_of(
        (root for name in MODULES for root in roots_of(name)),
        versions(LIBRARIES) | {"trimode": trimode.__version__},
    )


@cache
def lowering_revision() -> str:
    """Digest of the code that makes engines and lowered graphs.

    A target of another revision is built again.
    """
    return _digest_of_modules(LOWERING_MODULES)


@cache
def builder_revision() -> str:
    """Digest of the code that compiles a lowered graph."""
    return _digest_of_modules(BUILDER_MODULES)


def _digest_of_modules(names: Iterable[str]) -> str:
    return digest_of((root for name in names for root in roots_of(name)), {})


def digest_of(roots: Iterable[Path], versions: dict[str, str]) -> str:
    """Digest of names and contents of files, and of versions.

    Files in folders count at any depth.

    Args:
        roots: Files, or folders; what Python itself compiles into them does not count.
        versions: Versions by library.
    """
    digest = hashlib.sha256(repr(sorted(versions.items())).encode())
    for root in roots:
        for name, path in sorted(_files_in(root)):
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _files_in(root: Path) -> Iterator[tuple[str, Path]]:
    if root.is_file():
        yield root.name, root
        return
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            yield path.relative_to(root).as_posix(), path


def roots_of(name: str) -> list[Path]:
    """The folders of a package, or the file of a module."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        return [Path(folder) for folder in module.__path__]
    assert module.__file__ is not None
    return [Path(module.__file__)]

"""What is made once a run, whichever worker asks first: folders, and traced graphs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir
import pytest
from filelock import FileLock

from trimode.compiler.stages import trace
from trimode.compiler.store import traced
from trimode.compiler.store.cache import ContentCache
from trimode.formats.contract import GraphName, ModelInfo
from trimode.graphs.checkpoint import Checkpoint

_RECORD = ".digests.json"
"""Name's end of the file beside a folder that says what the folder held when it was made."""


def folder_of_run(own: Path) -> Path:
    """The folder that the workers of a run share; ``own`` is a worker's base of temporary
    folders.
    """
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """``folder``, which ``make`` fills for the first who asks; the others wait for it. Nobody may
    change it later.
    """
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            make(partial)
            Path(f"{folder}{_RECORD}").write_text(json.dumps(_digests(partial)))
            partial.rename(folder)
    return folder


def changed_since_made(run_folder: Path) -> list[str]:
    """Files in folders of :func:`made_once` that a test changed, added or deleted."""
    changed: list[str] = []
    for record in run_folder.glob(f"*{_RECORD}"):
        folder = Path(str(record).removesuffix(_RECORD))
        with FileLock(f"{folder}.lock"):
            then, now = json.loads(record.read_text()), _digests(folder)
        names = sorted(then.keys() | now.keys())
        changed += [f"{folder.name}/{name}" for name in names if then.get(name) != now.get(name)]
    return changed


def _digests(folder: Path) -> dict[str, str]:
    """Locks are left out: builds leave them beside a bundle."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class TracedOnce:
    """Takes the place of the compiler's tracing: a graph is traced once a run, by way of the
    compiler's own cache.

    Commands in processes of their own use the same cache, where they are given none of their own.
    Passes work on copies of a graph, so builds in one process share it.
    """

    def __init__(self, kept: ContentCache) -> None:
        self._kept = kept
        self._graphs: dict[str, ir.Model] = {}
        self._traced_graph, self._trace = traced.traced_graph, traced._trace

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(trace, "traced_graph", self.traced_graph)
        patch.setattr(traced, "_trace", self.trace)

    def graph(self, graph_name: GraphName, checkpoint: Checkpoint, model: ModelInfo) -> ir.Model:
        """A graph of the caller's own, with or without a build."""
        return self._shared(graph_name, checkpoint, model).clone()

    def fill(
        self,
        kept: ContentCache,
        checkpoint: Checkpoint,
        model: ModelInfo,
        graph_names: Iterable[GraphName],
    ) -> None:
        """Put graphs into a cache of the test's own."""
        for graph_name in graph_names:
            self.traced_graph(graph_name, checkpoint, model, kept)

    def anew(self, graph_name: GraphName, checkpoint: Checkpoint, model: ModelInfo) -> ir.Model:
        """As without any cache."""
        return self._trace(graph_name, checkpoint, model)

    def _shared(self, graph_name: GraphName, checkpoint: Checkpoint, model: ModelInfo) -> ir.Model:
        key = traced.key_of_trace(graph_name, checkpoint, model)
        if key not in self._graphs:
            self._graphs[key] = self._traced_graph(graph_name, checkpoint, model, self._kept)
        return self._graphs[key]

    def traced_graph(
        self,
        graph_name: GraphName,
        checkpoint: Checkpoint,
        model: ModelInfo,
        kept: ContentCache | None,
    ) -> ir.Model:
        """What the pipeline calls. A build with a cache reads from it and writes to it, as ever."""
        graph = self._shared(graph_name, checkpoint, model)
        return graph if kept is None else self._traced_graph(graph_name, checkpoint, model, kept)

    def trace(self, graph_name: GraphName, checkpoint: Checkpoint, model: ModelInfo) -> ir.Model:
        """What is called for a graph that a cache lacks."""
        graph = self._graphs.get(traced.key_of_trace(graph_name, checkpoint, model))
        return self._trace(graph_name, checkpoint, model) if graph is None else graph

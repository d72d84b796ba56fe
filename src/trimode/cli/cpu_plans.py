"""Prints what ONNX Runtime makes of a CPU's graphs.

This is ``trimode inspect --plans --target cpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from trimode.cli.output import print_json
from trimode.cli.parse import need
from trimode.cli.tables import table_console
from trimode.compiler.plans.cpu import CpuGraph
from trimode.formats.manifest import Manifest, PrecisionName, TargetRecord
from trimode.runtime.bundle.open import open_bundle

_NOTE = (
    "From the graphs as ONNX Runtime optimizes them here; nothing was run.\n"
    "MB of stored weights, of packed copies, and written in a forward of one sequence."
)


def is_cpu(record: TargetRecord) -> bool:
    """Whether ONNX Runtime runs the target on a CPU."""
    return record.backend == "onnxruntime" and record.device == "cpu"


def inspect_cpu_graphs(path: Path, manifest: Manifest, target: str, *, as_json: bool) -> None:
    """Print products and what only arranges, for each precision and graph.

    Raises:
        BundleError: it is no whole bundle, or ONNX Runtime refuses a graph.
        DependencyError: ONNX Runtime is not installed.
    """
    need("reading a CPU's graphs", "compile", "onnx")
    from trimode.compiler.plans.cpu import read_cpu_graphs

    found = [
        (name, graph)
        for name, record in manifest.precisions.items()
        if target in record.targets
        for graph in read_cpu_graphs(open_bundle(path, name, verify=False), record.targets[target])
    ]
    if as_json:
        print_json([{"precision": name, "target": target} | _plain(one) for name, one in found])
        return
    console = table_console(140)
    console.print(_table(found))
    console.print(_NOTE, markup=False)


def _plain(graph: CpuGraph) -> dict[str, Any]:
    facts = asdict(graph)
    return {"role": facts.pop("graph_name"), **facts}


def _table(found: list[tuple[PrecisionName, CpuGraph]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("graph", "rows", "operator", "weights are", "count", "MB", "packed", "written"):
        is_text = title in ("graph", "operator", "weights are")
        table.add_column(title, no_wrap=True, justify="left" if is_text else "right")
    for precision, graph in found:
        for cells in _rows(graph):
            table.add_row(f"{precision} {graph.graph_name}", str(graph.rows), *cells)
    return table


def _rows(graph: CpuGraph) -> Iterator[tuple[str, ...]]:
    for one in graph.products:
        sizes = (_mb(one.weights), _mb(one.packed) if one.packed else "")
        yield (one.operator, one.reading, str(one.count), *sizes, "")
    for other in graph.remaining:
        unknown = f" + {other.unknown} of unknown size" if other.unknown else ""
        yield (other.operator, "", str(other.count), "", "", _mb(other.written) + unknown)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"

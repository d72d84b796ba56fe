"""Reads the graphs of a CPU as ONNX Runtime optimizes them.

A session writes its optimized graph, with what it prepacked beside the weights. So the file says
which products read a packed copy, which read weights as they lie, and which operators remain that
only arrange or convert. Sizes come from the shapes in the graph.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from trimode.formats.contract import GraphName
from trimode.formats.disk import disk_errors
from trimode.formats.manifest import TargetRecord
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.sessions.ort.library import load_graph, session_options

PRODUCTS = frozenset(
    {
        "Gemm",
        "MatMul",
        "FusedGemm",
        "FusedMatMul",
        "MatMulNBits",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QLinearMatMul",
        "QGemm",
    }
)
ARRANGING = ("Transpose", "Cast", "Expand", "DequantizeLinear")
"""Operators that write what they read in another order, type or size."""
_PREPACKED = "prepacked"
"""Beginning of an entry that ONNX Runtime writes as ``key|offset;length;checksum|...``."""
Reading = Literal["packed", "as it lies", "given", "dequantized"]


@dataclass(frozen=True)
class Products:
    """Counts products of one operator that read their weights in one way.

    Attributes:
        reading: ``packed``: a copy that ONNX Runtime arranged on loading; ``as it lies``: the
            weight pack; ``given``: an input, from the session's memory; ``dequantized``: written in
            float32 before, in every forward.
        count: Number of them.
        weights: Bytes of their weights as they are stored.
        packed: Bytes of the packed copies.
    """

    operator: str
    reading: Reading
    count: int
    weights: int
    packed: int


@dataclass(frozen=True)
class Remaining:
    """Counts operators that only arrange or convert.

    Attributes:
        count: Number of them.
        written: Bytes that those with known shapes write in a forward.
        unknown: Number of those without known shapes.
    """

    operator: str
    count: int
    written: int
    unknown: int


@dataclass(frozen=True)
class CpuGraph:
    """Describes an optimized graph; ``rows`` is what sizes are counted for."""

    graph_name: GraphName
    rows: int
    products: tuple[Products, ...]
    remaining: tuple[Remaining, ...]


def read_cpu_graphs(bundle: Bundle, record: TargetRecord) -> list[CpuGraph]:
    """Read the graphs that a CPU target runs.

    Each is loaded as a session loads it, but that int4 graphs of any size keep their own copies.

    Raises:
        BundleError: ONNX Runtime refuses a graph.
        BuildError: the folder for temporary files has no room for a copy of the weights.
    """
    is_mapped = record.placement == "external"
    mapped_bytes = bundle.chosen.weight_bytes if is_mapped else 0
    block = bundle.manifest.model.block_size
    return [
        _read(
            bundle.path / engine.file, graph_name, 1 if graph_name == "ar" else block, mapped_bytes
        )
        for graph_name, engine in record.graphs.items()
    ]


def _read(path: Path, graph_name: GraphName, rows: int, mapped_bytes: int) -> CpuGraph:
    source = onnx.load(path, load_external_data=False).graph
    operators = {node.op_type for node in source.node}
    optimized = _optimize(path, 0 if "MatMulNBits" in operators else mapped_bytes, operators)
    graph = _Graph(optimized, _symbols(optimized, rows))
    return CpuGraph(graph_name, rows, tuple(graph.products()), tuple(graph.remaining()))


def _optimize(path: Path, mapped_bytes: int, operators: set[str]) -> Any:
    options = session_options(mapped_bytes, 1, dequantizes="DequantizeLinear" in operators)
    with tempfile.TemporaryDirectory() as name, disk_errors(Path(name)):
        output = Path(name) / "optimized.onnx"
        options.optimized_model_filepath = str(output)
        for key, value in {
            "session.optimized_model_external_initializers_file_name": "weights.bin",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            "session.save_external_prepacked_constant_initializers": "1",
        }.items():
            options.add_session_config_entry(key, value)
        load_graph(path, options, ["CPUExecutionProvider"])
        return onnx.load(output, load_external_data=False).graph


def _symbols(graph: Any, rows: int) -> dict[str, int]:
    """Sizes that the graph has names for: one sequence, so many rows.

    Inside the names are the tracer's; the embedding, which is looked up first, shows them.
    """
    values = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input)}
    looked_up = [
        node.output[0]
        for node in graph.node
        if node.op_type == "Gather" and "input_ids" in node.input and node.output[0] in values
    ]
    return {
        dim.dim_param: size
        for name in ("input_ids", *looked_up)
        for dim, size in zip(values[name].shape.dim, (1, rows), strict=False)
        if dim.dim_param
    }


class _Graph:
    """Answers questions about one optimized graph."""

    def __init__(self, graph: Any, symbols: Mapping[str, int]) -> None:
        self._nodes: Sequence[Any] = graph.node
        self._symbols = symbols
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        values = (*graph.value_info, *graph.output, *graph.input)
        self._values = {value.name: value.type.tensor_type for value in values}
        self._inputs = {value.name for value in graph.input} - self._weights.keys()
        self._makers = {name: node for node in graph.node for name in node.output}

    def products(self) -> Iterator[Products]:
        """By operator and by how weights are read."""
        counts: Counter[tuple[str, Reading]] = Counter()
        sizes: Counter[tuple[str, Reading]] = Counter()
        copies: Counter[tuple[str, Reading]] = Counter()
        for node in self._nodes:
            found = self._weight_of(node) if node.op_type in PRODUCTS else None
            if found is not None:
                reading, stored, packed = found
                key = node.op_type, reading
                counts[key] += 1
                sizes[key] += stored
                copies[key] += packed
        for key, count in counts.most_common():
            yield Products(*key, count, sizes[key], copies[key])

    def _weight_of(self, node: Any) -> tuple[Reading, int, int] | None:
        """Find the largest weight: its reading, its bytes, its packed bytes.

        The packed bytes are those of the copy that ONNX Runtime makes.
        """
        found = [one for name in node.input if (one := self._weight(name)) is not None]
        return max(found, key=lambda one: one[1], default=None)

    def _weight(self, name: str) -> tuple[Reading, int, int] | None:
        if name in self._weights:
            tensor = self._weights[name]
            packed = _packed_bytes(tensor)
            return "packed" if packed else "as it lies", _stored_bytes(tensor), packed
        maker = self._makers.get(name)
        if maker is not None and maker.op_type == "DequantizeLinear":
            inner = self._weight(maker.input[0])
            return None if inner is None else ("dequantized", inner[1], 0)
        size = self._bytes(name)
        is_given = name in self._inputs and size is not None and len(self._dims(name)) == 2
        return ("given", size or 0, 0) if is_given else None

    def remaining(self) -> Iterator[Remaining]:
        """By operator; those of weights and of activations alike."""
        for operator in ARRANGING:
            sizes = [
                self._bytes(node.output[0]) for node in self._nodes if node.op_type == operator
            ]
            known = [size for size in sizes if size is not None]
            if sizes:
                yield Remaining(operator, len(sizes), sum(known), len(sizes) - len(known))

    def _dims(self, name: str) -> list[int | None]:
        kind = self._values.get(name)
        if kind is None or not kind.HasField("shape"):
            return [None]
        return [
            dim.dim_value if dim.HasField("dim_value") else self._symbols.get(dim.dim_param)
            for dim in kind.shape.dim
        ]

    def _bytes(self, name: str) -> int | None:
        dims = self._dims(name)
        known = [size for size in dims if size is not None]
        if len(known) < len(dims):
            return None
        return _bytes_of(math.prod(known), self._values[name].elem_type)


def _stored_bytes(tensor: Any) -> int:
    return _bytes_of(math.prod(tensor.dims), tensor.data_type)


def _bytes_of(count: int, kind: int) -> int:
    half = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1)
    size = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    return -(-count * (4 if kind in half else 8 * size) // 8)


def _packed_bytes(tensor: Any) -> int:
    return sum(
        int(piece.split(";")[1])
        for entry in tensor.external_data
        if entry.key.startswith(_PREPACKED)
        for piece in entry.value.split("|")[1:]
    )

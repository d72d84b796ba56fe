"""Gives products on a CPU an even number of rows.

ONNX Runtime multiplies two rows at a time with int4 weights in long blocks, and a single row by
another routine, which rounds otherwise. With an even number what a row gets does not depend on how
many there are. So where the number is odd, the first row stands once more behind the last::

    embedding -- Reshape to rows -- one more -- layers ... -- without it -- Reshape to texts
                                      attention: without it, and one more behind it again

For a text that is decoded token by token a product has two rows. It waits for the weights anyway.
"""

from __future__ import annotations

import onnx_ir as ir

from trimode.compiler.passes.base import HEAD
from trimode.compiler.passes.matmul_nbits import ALIKE_BLOCK
from trimode.compiler.passes.nodes import Nodes

_INT64 = ir.DataType.INT64


class EvenRows(ir.passes.InPlacePass):
    """Adds a row to matrices that have an odd number of rows.

    These are the matrices that layers compute with.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lengthen what becomes a matrix, and shorten what ceases to be one."""
        graph = model.graph
        if not any(_depends_on_rows(node) for node in graph):
            return ir.passes.PassResult(model, modified=False)
        into = [node for node in graph if node.op_type == "Reshape" and _becomes_rows(node)]
        out_of = [node for node in graph if node.op_type == "Reshape" and _becomes_texts(node)]
        heads = [node for node in graph if _is_head(node)]
        counts = _Counts(graph, into[0])
        for number, node in enumerate(out_of):
            _replace_input(node, counts.cut(graph, node, number))
        for number, node in enumerate(into):
            _lengthen(graph, node, counts, number)
        for number, node in enumerate(heads):
            _lengthen_alone(graph, node, number)
        _forget_rows(graph)
        return ir.passes.PassResult(model, modified=True)


class _Counts:
    """Holds the number of rows, and how many to add."""

    def __init__(self, graph: ir.Graph, first: ir.Node) -> None:
        self.rows, self.odd = _count(Nodes(graph, _next(graph, first)), first.outputs[0], "even")

    def cut(self, graph: ir.Graph, before: ir.Node, number: int) -> ir.Value:
        """The input of ``before`` without the row that was added."""
        nodes, matrix = Nodes(graph, before, f".{number}"), before.inputs[0]
        assert matrix is not None
        return _rows_of(nodes, matrix, self.rows, "even_cut")


def _count(nodes: Nodes, matrix: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """Return a matrix's number of rows, and that number modulo two.

    Both are int64 ``(1,)``.
    """
    ends = {"start": 0, "end": 1}
    rows = nodes.add("Shape", [matrix], f"{name}_rows", _INT64, ir.Shape([1]), ends)
    return rows, nodes.add("Mod", [rows, nodes.shape(2)], f"{name}_odd", _INT64, ir.Shape([1]))


def _rows_of(nodes: Nodes, matrix: ir.Value, end: ir.Value, name: str) -> ir.Value:
    assert matrix.dtype is not None
    return nodes.add("Slice", [matrix, nodes.shape(0), end, nodes.shape(0)], name, matrix.dtype)


def _longer(nodes: Nodes, matrix: ir.Value, odd: ir.Value, name: str) -> ir.Value:
    """Return the matrix, plus its first row where ``odd`` is 1."""
    assert matrix.dtype is not None
    more = _rows_of(nodes, matrix, odd, f"{name}_row")
    return nodes.add("Concat", [matrix, more], name, matrix.dtype, attributes={"axis": 0})


def _lengthen(graph: ir.Graph, node: ir.Node, counts: _Counts, number: int) -> None:
    """Give a matrix's readers one with an even number of rows."""
    matrix = node.outputs[0]
    known = {counts.rows.producer()}
    readers = [use for use in matrix.uses() if use.node not in known]
    following = counts.odd.producer() if number == 0 else node
    assert following is not None
    longer = _longer(
        Nodes(graph, _next(graph, following), f".{number}"), matrix, counts.odd, "even"
    )
    for use in readers:
        use.node.replace_input_with(use.idx, longer)


def _lengthen_alone(graph: ir.Graph, node: ir.Node, number: int) -> None:
    """Lengthen the input of one product, and shorten what it gives."""
    nodes, matrix, result = Nodes(graph, node, f".head{number}"), node.inputs[0], node.outputs[0]
    assert matrix is not None
    rows, odd = _count(nodes, matrix, "even")
    _replace_input(node, _longer(nodes, matrix, odd, "even"))
    behind = Nodes(graph, _next(graph, node), f".head{number}")
    uses = list(result.uses())
    cut = _rows_of(behind, result, rows, "even_cut")
    cut.shape, result.shape = result.shape, None
    for use in uses:
        use.node.replace_input_with(use.idx, cut)
    for index, output in enumerate(graph.outputs):
        if output is result:
            graph.outputs[index] = cut
            result.name, cut.name = f"{result.name}.even", result.name


def _next(graph: ir.Graph, node: ir.Node) -> ir.Node:
    nodes = iter(graph)
    next(one for one in nodes if one is node)
    return next(nodes)


def _rank(value: ir.Value | None) -> int:
    return len(value.shape) if value is not None and value.shape is not None else 0


def _becomes_rows(node: ir.Node) -> bool:
    return _rank(node.inputs[0]) > _rank(node.outputs[0]) == 2 and _is_float(node)


def _becomes_texts(node: ir.Node) -> bool:
    """Also where it stays a matrix, in front of the head."""
    value = node.inputs[0]
    assert value is not None
    producer = value.producer()
    is_logits = producer is not None and HEAD in _weight_of(producer)
    return _rank(value) == 2 <= _rank(node.outputs[0]) and _is_float(node) and not is_logits


def _is_float(node: ir.Node) -> bool:
    return node.outputs[0].dtype == ir.DataType.FLOAT


def _weight_of(node: ir.Node) -> tuple[str | None, ...]:
    """Return the names of a product's weight and of its source.

    The weight is the second factor. Its source is what it is widened from.
    """
    weight = node.inputs[1] if node.op_type == "Gemm" else None
    producer = weight.producer() if weight is not None else None
    source = producer.inputs[0] if producer is not None else None
    return tuple(value.name for value in (weight, source) if value is not None)


def _is_head(node: ir.Node) -> bool:
    """Whether it is the product with a quantized head."""
    return HEAD in _weight_of(node)[1:]


def _depends_on_rows(node: ir.Node) -> bool:
    is_widened = node.op_type == "DequantizeLinear"
    return is_widened and node.attributes.get_int("block_size", 0) > ALIKE_BLOCK


def _forget_rows(graph: ir.Graph) -> None:
    """Forget the number of rows wherever a row may be added.

    ONNX Runtime puts tensors of one shape in one place.
    """
    longer: set[ir.Value] = set()
    for node in graph:
        inputs = [value for value in node.inputs if value in longer]
        is_lengthened = node.op_type == "Concat" and (node.name or "").startswith("even.")
        if (node.op_type == "Slice" and inputs) or not (inputs or is_lengthened):
            continue
        for output in node.outputs:
            longer.add(output)
            if output.shape is not None:
                output.shape = ir.Shape([None, *list(output.shape)[1:]])


def _replace_input(node: ir.Node, value: ir.Value) -> None:
    node.replace_input_with(0, value)

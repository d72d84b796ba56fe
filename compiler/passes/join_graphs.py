"""Makes one graph that does what ``ar``, ``draft`` and ``verify`` do.

Engines that hold weights share none of them on the GPU, but the profiles of one engine do. The
graph is that of ``draft`` with two inputs more: ``is_causal`` says how rows attend to each other
(``passes.mask_slots``), ``input_length`` how many are real. The head sees a window of rows that
ends at the last real one, and the graph returns its logits besides the candidates: greedy ids are
the first of these. :func:`trimode.formats.contract.joint_contract` lists inputs and outputs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trimode.compiler.passes.base import HEAD
from trimode.compiler.passes.mask_slots import JOINT
from trimode.compiler.passes.nodes import Nodes
from trimode.formats.contract import MAX_BLOCK_LENGTH

_INT64 = ir.DataType.INT64
_BY_ROWS = ("top_ids", "top_probabilities")


class JoinGraphs(ir.passes.InPlacePass):
    """Turns a traced ``draft`` into the joint graph."""

    def requires(self, model: ir.Model) -> None:
        """The head is one product, and candidates are shaped last."""
        if len(model.graph.initializers[HEAD].uses()) != 1:
            raise ir.passes.PreconditionError("the head is read by more than one product")
        for value in model.graph.outputs:
            if value.name in _BY_ROWS and _producer(value).op_type != "Reshape":
                raise ir.passes.PreconditionError(f"{value.name} is not shaped last")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the inputs, the window and the logits."""
        graph = model.graph
        (head, _), *_ = graph.initializers[HEAD].uses()
        _add_input(graph, "input_length", ir.Shape(["batch"]))
        _add_input(graph, JOINT, ir.Shape([]))
        nodes = Nodes(graph, head)
        sizes = _sizes(graph, nodes)
        rest = [sizes[0], sizes[2], nodes.shape(-1)]
        shape = nodes.add("Concat", rest, "window.shape", _INT64, None, {"axis": 0})
        indices = _indices(nodes, _input(graph, "input_length"), sizes)
        hidden = head.inputs[0]
        assert hidden is not None
        assert hidden.dtype is not None
        head.replace_input_with(
            0, nodes.add("Gather", [hidden, indices], "window.hidden", hidden.dtype)
        )
        for value in graph.outputs:
            if value.name in _BY_ROWS:
                _producer(value).replace_input_with(1, shape)
                assert value.shape is not None
                value.shape = ir.Shape(["batch", "window", value.shape[2]])
        _return_logits(graph, head, shape)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Logits are returned."""
        if not any(value.name == "logits" for value in model.graph.outputs):
            raise ir.passes.PostconditionError("the graph returns no logits")


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _add_input(graph: ir.Graph, name: str, shape: ir.Shape) -> None:
    graph.inputs.append(ir.Value(name=name, type=ir.TensorType(_INT64), shape=shape))


def _input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def _sizes(graph: ir.Graph, nodes: Nodes) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Sequences, rows of each, and rows of the window, ``(1,)`` each."""
    ids = _input(graph, "input_ids")
    batch, rows = (
        nodes.add("Shape", [ids], f"window.{name}", _INT64, None, {"start": axis, "end": axis + 1})
        for axis, name in enumerate(("batch", "rows"))
    )
    return batch, rows, nodes.add("Min", [rows, nodes.shape(MAX_BLOCK_LENGTH)], "window", _INT64)


def _indices(
    nodes: Nodes, length: ir.Value, sizes: tuple[ir.Value, ir.Value, ir.Value]
) -> ir.Value:
    """Return the rows of the hidden states that the head sees.

    They are ``(batch * m,)``, of the flat hidden states ``(batch * rows, n)``. Those of a sequence
    begin at ``max(input_length - m, 0)``.
    """
    zero, one = (nodes.constant(f"window.{n}", np.array(n)) for n in (0, 1))

    def up_to(size: ir.Value, name: str) -> ir.Value:
        count = nodes.add("Squeeze", [size, nodes.shape(0)], f"{name}.count", _INT64)
        return nodes.add("Range", [zero, count, one], name, _INT64)

    batch, rows, window = sizes
    first = nodes.add("Mul", [up_to(batch, "window.sequence"), rows], "window.first", _INT64)
    begin = nodes.add("Sub", [length, window], "window.before", _INT64)
    begin = nodes.add("Max", [begin, zero], "window.begin", _INT64)
    begin = nodes.add("Add", [first, begin], "window.flat", _INT64)
    column = nodes.add("Unsqueeze", [begin, nodes.shape(1)], "window.column", _INT64)
    index = nodes.add("Add", [column, up_to(window, "window.row")], "window.index", _INT64)
    return nodes.add("Reshape", [index, nodes.shape(-1)], "window.indices", _INT64)


def _return_logits(graph: ir.Graph, head: ir.Node, shape: ir.Value) -> None:
    flat = head.outputs[0]
    node = ir.node("Reshape", [flat, shape], name="window.logits")
    logits = node.outputs[0]
    assert flat.dtype is not None
    logits.name, logits.type = "logits", ir.TensorType(flat.dtype)
    size = graph.initializers[HEAD].shape
    assert size is not None
    logits.shape = ir.Shape(["batch", "window", size[0]])
    graph.insert_after(head, node)
    graph.outputs.insert(2, logits)

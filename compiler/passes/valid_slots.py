"""Lets attention on a CPU read only slots that hold something.

ONNX Runtime's ``Attention`` multiplies with every slot of keys and values, and masks what is not
valid then: its time follows the capacity. Here it gets the first slots alone, as many as the
longest text of the batch has with the new tokens::

    before:  present (B, G, C, D) ------------------ Attention(nonpad_kv_seqlen)
    after:   present (B, G, C, D) -- Slice [:, :, :n] -- Attention(nonpad_kv_seqlen)

The slice is a copy, and takes a fraction of the time of the products.
"""

from __future__ import annotations

import onnx_ir as ir

from trimode.compiler.passes.nodes import Nodes

_KEY, _VALUE, _MASK, _LENGTH = 1, 2, 3, 6
"""Inputs of the operator Attention."""
_NAME = "valid"


class ReadValidSlots(ir.passes.InPlacePass):
    """Cuts keys, values and masks of attentions to the longest valid length."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut the inputs of each attention that knows its valid length."""
        found = [node for node in model.graph if _knows_length(node)]
        ends: dict[ir.Value, ir.Value] = {}
        for number, node in enumerate(found):
            nodes = Nodes(model.graph, node, f".{number}")
            length = node.inputs[_LENGTH]
            assert length is not None
            if length not in ends:
                ends[length] = nodes.add(
                    "ReduceMax",
                    [length, nodes.shape(0)],
                    f"{_NAME}_length",
                    ir.DataType.INT64,
                    ir.Shape([1]),
                    {"keepdims": 1},
                )
            for index, axis in ((_KEY, 2), (_VALUE, 2), (_MASK, 3)):
                _cut(nodes, node, index, axis, ends[length])
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Attentions that know their valid length read nothing of the cache's capacity."""
        for node in model.graph:
            if _knows_length(node) and any(
                value is not None and (producer := value.producer()) and producer.op_type != "Slice"
                for value in node.inputs[_KEY : _MASK + 1]
            ):
                raise ir.passes.PostconditionError(f"{node.name} reads the whole capacity")


def _knows_length(node: ir.Node) -> bool:
    return (
        node.op_type == "Attention"
        and len(node.inputs) > _LENGTH
        and node.inputs[_LENGTH] is not None
    )


def _cut(nodes: Nodes, node: ir.Node, index: int, axis: int, end: ir.Value) -> None:
    value = node.inputs[index]
    if value is None:
        return
    assert value.dtype is not None
    inputs = [value, nodes.shape(0), end, nodes.shape(axis)]
    cut = nodes.add("Slice", inputs, f"{_NAME}_slots_{index}", value.dtype)
    node.replace_input_with(index, cut)

"""Lets one row of causal attention round like many rows.

This is for a CPU. ONNX Runtime multiplies one row by another routine than several, which sums in
another order. From two rows on, what a row gets does not depend on how many there are. So each
text's queries get one more in front, a copy of the first, and its result is dropped. A causal
attention with a valid length ends at the last row: the others see what they saw.
"""

from __future__ import annotations

import sys

import onnx_ir as ir

from trimode.compiler.passes.nodes import Nodes

_MASK = 3
_ROWS = 2
"""Axis of the rows in queries and results, ``(B, H, T, D)``."""


class RoundRowsAlike(ir.passes.InPlacePass):
    """Gives every causal attention without a mask one query more, in front."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lengthen the queries and shorten the results."""
        found = [node for node in model.graph if _is_causal(node)]
        for number, node in enumerate(found):
            _lengthen(model.graph, node, f".{number}")
        return ir.passes.PassResult(model, modified=bool(found))


def _is_causal(node: ir.Node) -> bool:
    return (
        node.op_type == "Attention"
        and node.attributes.get_int("is_causal", 0) == 1
        and (len(node.inputs) <= _MASK or node.inputs[_MASK] is None)
    )


def _lengthen(graph: ir.Graph, node: ir.Node, suffix: str) -> None:
    query, result, nodes = node.inputs[0], node.outputs[0], Nodes(graph, node, suffix)
    assert query is not None
    assert query.dtype is not None
    axis = nodes.shape(_ROWS)
    first = nodes.add("Slice", [query, nodes.shape(0), nodes.shape(1), axis], "row", query.dtype)
    rows = nodes.add("Concat", [first, query], "rows", query.dtype, attributes={"axis": _ROWS})
    node.replace_input_with(0, rows)
    (following,) = {use.node for use in result.uses()}
    behind = Nodes(graph, following, suffix)
    ends = [behind.shape(1), behind.shape(sys.maxsize), axis]
    cut = behind.add("Slice", [result, *ends], "rows_alike", query.dtype, result.shape)
    result.shape = None
    following.replace_input_with(following.inputs.index(result), cut)

"""Says by a mask which slots of the cache attention sees.

TensorRT-RTX 1.7 parses ``Attention`` without its input ``nonpad_kv_seqlen``, and says nothing: the
engine would attend to every slot of the cache, also to those that hold nothing. It does read a
mask. Keys and values of the whole capacity are read all the same: docs/results has what the plans
say.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trimode.compiler.passes.nodes import Nodes

_MASK, _LENGTH = 3, 6
"""Inputs of the operator Attention."""
JOINT = "is_causal"
"""Input of a graph that attends in either way, 0 or 1; it decides where there is one."""


class MaskSlots(ir.passes.InPlacePass):
    """Replaces the valid length of attentions, and causality, by one mask.

    The mask ``(batch, 1, rows, capacity)`` is True where a row sees a slot. It is computed once for
    all layers, from ``past_length`` and the number of rows. An attention that has a mask already
    keeps it; that mask has to hide what is not valid.
    """

    def requires(self, model: ir.Model) -> None:
        """The capacity is fixed, and all attentions are alike."""
        found = _by_length(model)
        if len({_is_causal(node) for node in found}) > 1:
            raise ir.passes.PreconditionError("some attentions are causal and some are not")
        for node in found:
            key = node.inputs[1]
            if key is None or key.shape is None or not isinstance(key.shape[2], int):
                raise ir.passes.PreconditionError(f"{node.name} reads a cache of no fixed capacity")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put the mask in front of the first attention; all take it."""
        found, masked = _by_length(model), _attentions(model)
        if found:
            key = found[0].inputs[1]
            assert key is not None
            assert key.shape is not None
            capacity = key.shape[2]
            assert isinstance(capacity, int)
            mask = _mask(model.graph, found[0], capacity, is_causal=_is_causal(found[0]))
            for node in found:
                node.replace_input_with(_MASK, mask)
        for node in masked:
            node.resize_inputs(_MASK + 1)
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
        return ir.passes.PassResult(model, modified=bool(masked))

    def ensures(self, model: ir.Model) -> None:
        """Each has a mask, and nothing else that limits what it sees."""
        for node in _attentions(model):
            if len(node.inputs) != _MASK + 1 or node.inputs[_MASK] is None or _is_causal(node):
                raise ir.passes.PostconditionError(f"{node.name} is not limited by a mask alone")


def _choose(nodes: Nodes, is_causal: ir.Value, own: ir.Value, last: ir.Value) -> ir.Value:
    """``own`` where ``is_causal`` is 1, ``last`` where it is 0."""
    less = nodes.add("Sub", [own, last], "mask.less", ir.DataType.INT64)
    less = nodes.add("Mul", [less, is_causal], "mask.part", ir.DataType.INT64)
    return nodes.add("Add", [last, less], "mask.chosen", ir.DataType.INT64)


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def _by_length(model: ir.Model) -> list[ir.Node]:
    """Attentions without a mask."""
    return [
        node
        for node in _attentions(model)
        if len(node.inputs) > _LENGTH and node.inputs[_MASK] is None
    ]


def _is_causal(node: ir.Node) -> bool:
    return node.attributes.get_int("is_causal", 0) == 1


def _mask(graph: ir.Graph, before: ir.Node, capacity: int, *, is_causal: bool) -> ir.Value:
    """True where slot ``<=`` the last slot that a row sees.

    That is the row's own, or that of the last row.
    """
    inputs = {value.name: value for value in graph.inputs}
    nodes, int64 = Nodes(graph, before), ir.DataType.INT64
    shape = nodes.add(
        "Shape", [inputs["input_ids"]], "mask.rows", int64, attributes={"start": 1, "end": 2}
    )
    one, axis = nodes.constant("mask.one", np.array(1)), nodes.shape(0)
    rows = nodes.add("Squeeze", [shape, axis], "mask.count", int64)
    last = nodes.add("Sub", [rows, one], "mask.last", int64)
    if is_causal or JOINT in inputs:
        zero = nodes.constant("mask.zero", np.array(0))
        own = nodes.add("Range", [zero, rows, one], "mask.own", int64)
        if JOINT in inputs:
            own = _choose(nodes, inputs[JOINT], own, last)
        last = own
    else:
        last = nodes.add("Expand", [last, shape], "mask.row", int64)
    begin = nodes.add("Unsqueeze", [inputs["past_length"], nodes.shape(1)], "mask.begin", int64)
    reach = nodes.add("Add", [begin, last], "mask.reach", int64)
    reach = nodes.add("Unsqueeze", [reach, nodes.shape(1, 3)], "mask.reaches", int64)
    slots = nodes.constant("mask.slots", np.arange(capacity))
    return nodes.add("LessOrEqual", [slots, reach], "mask.seen", ir.DataType.BOOL)

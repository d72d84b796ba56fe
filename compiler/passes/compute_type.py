"""Lets a graph compute in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from trimode.compiler.passes.base import HEAD, IR_DTYPES, caches, cast_after, is_table, weights
from trimode.formats.contract import DType


class ComputeType(ir.passes.InPlacePass):
    """Computes in ``dtype`` from the embedding to the head.

    Logits are widened as soon as the head has made them, so the softmax, the candidates and the
    greedy ids are taken in float32, as the reference does. Token ids, lengths and every output but
    the cache keep their types.
    """

    def __init__(self, dtype: DType) -> None:
        super().__init__()
        self.dtype = IR_DTYPES[dtype]

    def requires(self, model: ir.Model) -> None:
        """A float32 graph in which nothing but products read the head."""
        if model.graph.initializers[HEAD].dtype != ir.DataType.FLOAT:
            raise ir.passes.PreconditionError("the graph does not compute in float32")
        if not (heads := _heads(model)) or any(node.op_type != "Gemm" for node in heads):
            raise ir.passes.PreconditionError("the head is not read by products, and only by these")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Retype everything before the head and put casts at the two borders."""
        graph = model.graph
        heads = _heads(model)
        wide = _downstream(heads)
        borders = [
            *(v for v in graph.inputs if v not in set(caches(model))),
            *(v for v in weights(model) if is_table(v)),
        ]
        for value in borders:
            if value.dtype == ir.DataType.FLOAT:
                cast_after(graph, value, self.dtype, before=graph[0])
        for head in heads:
            cast_after(graph, head.outputs[0], ir.DataType.FLOAT)
        kept = {*borders, *(v for node in wide for v in node.outputs)}
        for value in _values(model):
            if (
                value.dtype == ir.DataType.FLOAT
                and value not in kept
                and not _is_cast_to(value, ir.DataType.FLOAT)
            ):
                self._retype(value, wide)
        return ir.passes.PassResult(model, modified=True)

    def _retype(self, value: ir.Value, wide: set[ir.Node]) -> None:
        if value.const_value is not None:
            users = {node for node, _ in value.uses()}
            if users <= wide:
                return
            if users & wide:
                raise ir.passes.PassError(
                    f"the constant {value.name} is used on both sides of the head"
                )
            data = value.const_value.numpy().astype(self.dtype.numpy())
            value.const_value = ir.tensor(data, dtype=self.dtype, name=value.name)
        value.type = ir.TensorType(self.dtype)  # a new one: clones share their types

    def ensures(self, model: ir.Model) -> None:
        """Weights and cache have the type."""
        for value in (*weights(model), *caches(model)):
            if value.dtype != self.dtype and not is_table(value):
                raise ir.passes.PostconditionError(f"{value.name} is {value.dtype}")


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every value of a graph: inputs, weights, outputs of nodes."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _heads(model: ir.Model) -> list[ir.Node]:
    """Find the products with the head.

    There is one, or a second one over rows that the first has chosen.
    """
    return [node for node, _ in model.graph.initializers[HEAD].uses()]


def _downstream(start: list[ir.Node]) -> set[ir.Node]:
    """Find the nodes that compute with the numbers ``start`` gives.

    ``start`` is not included. An index taken from these numbers is no such number.
    """
    found: set[ir.Node] = set()
    pending = list(start)
    while pending:
        for value in (v for v in pending.pop().outputs if v.dtype == ir.DataType.FLOAT):
            new = {node for node, _ in value.uses()} - found
            found |= new
            pending += new
    return found


def _is_cast_to(value: ir.Value, dtype: ir.DataType) -> bool:
    """Whether a value comes from a Cast to ``dtype``."""
    producer = value.producer()
    return (
        producer is not None
        and producer.op_type == "Cast"
        and producer.attributes["to"].as_int() == dtype.value
    )

"""Keeps TensorRT-RTX from copying keys and values before attention."""

from __future__ import annotations

import onnx_ir as ir

from trimode.formats.contract import SCRATCH


class QueriesToOutputs(ir.passes.InPlacePass):
    """Returns the queries of every attention from the graph.

    They are rotated and by heads, and are named ``scratch.query.{layer}``.

    Nobody reads these outputs. TensorRT-RTX 1.7 fuses what makes a query with the attention that
    reads it, and in that fusion repeats keys and values for every head of the query and transposes
    the keys, over the cache's whole capacity and in every forward. An output has to lie in memory,
    which forbids the fusion; the kernel that is then chosen reads the cache as it lies. ``trimode
    inspect --plans`` shows both.
    """

    def requires(self, model: ir.Model) -> None:
        """Check that each query belongs to one attention and is computed.

        It is no output of the graph yet.
        """
        for query in _queries(model):
            if query.producer() is None or query.is_graph_output() or len(query.uses()) != 1:
                raise ir.passes.PreconditionError(
                    f"{query.name} is something else than the query of one attention"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Name and return them."""
        queries = _queries(model)
        for layer, query in enumerate(queries):
            query.name = f"{SCRATCH}.query.{layer}"
            query.shape = _shape(query)
            model.graph.outputs.append(query)
        return ir.passes.PassResult(model, modified=bool(queries))

    def ensures(self, model: ir.Model) -> None:
        """All are returned."""
        for query in _queries(model):
            if not query.is_graph_output():
                raise ir.passes.PostconditionError(f"{query.name} is not returned")


def _queries(model: ir.Model) -> list[ir.Value]:
    """First inputs of the attentions, in the graph's order."""
    return [
        query
        for node in model.graph
        if node.op_type == "Attention" and (query := node.inputs[0]) is not None
    ]


def _shape(query: ir.Value) -> ir.Shape:
    """Return a query's shape, with plain names of dimensions.

    It is ``(batch, heads, query_rows, head size)``. The names take the place of the tracer's.
    """
    assert query.shape is not None
    return ir.Shape(["batch", query.shape[1], "query_rows", query.shape[3]])

"""Turns weights into inputs of the graph."""

from __future__ import annotations

import onnx_ir as ir

from trimode.compiler.passes.base import weights


class WeightsToInputs(ir.passes.InPlacePass):
    """Turns weights into graph inputs behind those of the contract."""

    def requires(self, model: ir.Model) -> None:
        """The graph has weights, and none has data yet."""
        if not weights(model):
            raise ir.passes.PreconditionError("the graph has no weights")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move them."""
        for value in weights(model):
            assert value.name is not None
            del model.graph.initializers[value.name]
            model.graph.inputs.append(value)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Only small constants remain inside."""
        if weights(model):
            raise ir.passes.PostconditionError(
                f"{weights(model)[0].name} is still inside the graph"
            )

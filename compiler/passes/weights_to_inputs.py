"""Turns weights into inputs of the graph."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from trimode.compiler.passes.base import weights


class WeightsToInputs(ir.passes.InPlacePass):
    """Turns weights into graph inputs behind those of the contract.

    Args:
        kept: Names of weights that stay inside.
    """

    def __init__(self, kept: Collection[str] = ()) -> None:
        super().__init__()
        self._kept = frozenset(kept)

    def requires(self, model: ir.Model) -> None:
        """The graph has weights, and none has data yet."""
        if not weights(model):
            raise ir.passes.PreconditionError("the graph has no weights")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move them."""
        for value in self._moved(model):
            assert value.name is not None
            del model.graph.initializers[value.name]
            model.graph.inputs.append(value)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Only small constants, and what is kept, remain inside."""
        if left := self._moved(model):
            raise ir.passes.PostconditionError(f"{left[0].name} is still inside the graph")

    def _moved(self, model: ir.Model) -> list[ir.Value]:
        return [value for value in weights(model) if value.name not in self._kept]

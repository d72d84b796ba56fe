"""Gives the cache a fixed number of slots."""

from __future__ import annotations

import onnx_ir as ir

from trimode.compiler.passes.base import caches


class StaticCacheCapacity(ir.passes.InPlacePass):
    """Gives every cache tensor ``capacity`` slots instead of a dynamic number."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def requires(self, model: ir.Model) -> None:
        """The capacity is still dynamic."""
        for value in caches(model):
            if value.shape is None or value.shape.is_static(2):
                raise ir.passes.PreconditionError(f"{value.name} has no dynamic capacity")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Set the dimension of the caches to the capacity.

        Shapes inside are inferred again by whoever reads the graph.
        """
        for value in caches(model):
            assert value.shape is not None
            value.shape = ir.Shape([value.shape[0], value.shape[1], self.capacity, value.shape[3]])
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Every cache tensor has the capacity."""
        for value in caches(model):
            if value.shape is None or value.shape[2] != self.capacity:
                raise ir.passes.PostconditionError(f"{value.name} has shape {value.shape}")

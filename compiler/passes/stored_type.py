"""Reads weights in the type of the pack and widens them."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from trimode.compiler.passes.base import IR_DTYPES, QUANTIZED_TYPES, cast_after, is_table, weights
from trimode.formats.contract import DType


class StoredType(ir.passes.InPlacePass):
    """Reads weights as ``dtype`` and widens them to float32.

    It concerns weights that are not quantized, for runtimes that compute in float32.

    Args:
        dtype: Type of the weights in the pack.
        float32: Names of other tensors that the pack holds in float32, beside the position tables.
    """

    def __init__(self, dtype: DType, float32: Collection[str] = ()) -> None:
        super().__init__()
        self.dtype, self._float32 = IR_DTYPES[dtype], frozenset(float32)

    def requires(self, model: ir.Model) -> None:
        """Weights are float32, or quantized."""
        for value in [v for v in weights(model) if v.dtype not in QUANTIZED_TYPES]:
            if value.dtype != ir.DataType.FLOAT:
                raise ir.passes.PreconditionError(f"{value.name} is {value.dtype}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Retype the weights and put a Cast behind each."""
        for value in self._stored(model):
            cast_after(model.graph, value, ir.DataType.FLOAT, before=model.graph[0])
            value.type = ir.TensorType(self.dtype)  # a new one: clones share their types
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Weights have the type, and nothing but their casts reads them."""
        for value in self._stored(model):
            if value.dtype != self.dtype or not all(
                node.op_type == "Cast" for node, _ in value.uses()
            ):
                raise ir.passes.PostconditionError(
                    f"{value.name} is {value.dtype} or used without a Cast"
                )

    def _stored(self, model: ir.Model) -> list[ir.Value]:
        """Weights of the type that the pack as a whole has."""
        return [
            v
            for v in weights(model)
            if not is_table(v) and v.dtype not in QUANTIZED_TYPES and v.name not in self._float32
        ]

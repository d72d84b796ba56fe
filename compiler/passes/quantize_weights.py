"""Puts quantized weights into a graph.

For each weight that the pack holds in fp8, int8 or int4 (nvfp4: ``passes.nvfp4``), standard ONNX
and with the names of the pack::

    x -- Mul by .pre_quant_scale -- QuantizeLinear -- DequantizeLinear by .input_scale  --.
                                                                                Gemm(transB=1)
    .weight -- DequantizeLinear by .weight_scale  ----------------------------------------'

The first two steps are there only where the pack has their scales. All that is not quantized, and
what the product gives, stays in the type that the graph computes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trimode.compiler.passes.base import IR_DTYPES, QUANTIZED_TYPES, weights
from trimode.formats.contract import DType

_NUMPY: dict[ir.DataType, Any] = {
    ir.DataType.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    ir.DataType.INT8: np.int8,
}


class Stored(Protocol):
    """Describes a tensor of the pack, as the pass needs it."""

    @property
    def dtype(self) -> DType:
        """Type in the pack."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the pack."""
        ...


class WeightPass(ir.passes.InPlacePass):
    """Finds quantized weights that are second factors of products.

    Args:
        pack: Types and shapes of what the pack holds.

    Attributes:
        dtypes: Types in the pack of the weights that the pass handles.
    """

    dtypes: ClassVar[tuple[DType, ...]]

    def __init__(self, pack: Mapping[str, Stored]) -> None:
        super().__init__()
        self.pack = pack

    def requires(self, model: ir.Model) -> None:
        """Each such weight is the second factor of products, as ``(out, in)``."""
        for value in self._quantized(model):
            _check_second_factors(value)

    def _quantized(self, model: ir.Model) -> list[ir.Value]:
        names = {name for name, stored in self.pack.items() if stored.dtype in self.dtypes}
        return [v for v in weights(model) if v.name in names]


class QuantizeWeights(WeightPass):
    """Reads quantized weights from the pack.

    To be applied once the graph has its compute type, which the scales take.
    """

    dtypes = ("float8e4m3fn", "int8", "int4")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put the nodes around each product."""
        found = self._quantized(model)
        for value in found:
            self._rewrite(model.graph, value)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that weights are quantized and only DequantizeLinear reads them.

        They have the pack's type.
        """
        for value in self._quantized(model):
            if value.dtype not in QUANTIZED_TYPES or any(
                node.op_type != "DequantizeLinear" for node, _ in value.uses()
            ):
                raise ir.passes.PostconditionError(
                    f"{value.name} is {value.dtype}"
                    " or read by something else than a DequantizeLinear"
                )

    def _rewrite(self, graph: ir.Graph, weight: ir.Value) -> None:
        assert weight.name is not None
        compute = weight.dtype
        assert compute is not None
        # a new one: clones share their types
        weight.type = ir.TensorType(IR_DTYPES[self.pack[weight.name].dtype])
        for number, (product, _) in enumerate(list(weight.uses())):
            # Where a weight is used twice, it is dequantized twice: only right before a product
            # need it be in memory.
            self._rewrite_product(graph, product, weight, compute, f".{number}" if number else "")

    def _rewrite_product(
        self, graph: ir.Graph, product: ir.Node, weight: ir.Value, compute: ir.DataType, suffix: str
    ) -> None:
        assert weight.name is not None
        layer, kind, x = weight.name.removesuffix(".weight"), weight.dtype, product.inputs[0]
        assert x is not None
        assert kind is not None
        if f"{layer}.pre_quant_scale" in self.pack:
            x = _insert(
                product,
                "Mul",
                [x, self._scale(graph, f"{layer}.pre_quant_scale", compute)],
                f"{layer}.input_scaled{suffix}",
                compute,
                x,
            )
        if f"{layer}.input_scale" in self.pack:
            scale, zero = self._scale(graph, f"{layer}.input_scale", compute), _zero(graph, kind)
            narrow = _insert(
                product,
                "QuantizeLinear",
                [x, scale, zero],
                f"{layer}.input_quantized{suffix}",
                kind,
                x,
            )
            x = _insert(
                product,
                "DequantizeLinear",
                [narrow, scale, zero],
                f"{layer}.input_dequantized{suffix}",
                compute,
                x,
            )
        scale = self._scale(graph, f"{layer}.weight_scale", compute)
        assert scale.shape is not None
        assert weight.shape is not None
        axes, name = _axes(weight.shape, scale.shape), f"{layer}.weight_dequantized{suffix}"
        wide = _insert(product, "DequantizeLinear", [weight, scale], name, compute, weight, axes)
        product.replace_input_with(0, x)
        product.replace_input_with(1, wide)

    def _scale(self, graph: ir.Graph, name: str, compute: ir.DataType) -> ir.Value:
        """An initializer without data: what the pack holds under this name."""
        if name not in graph.initializers:
            graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(compute), shape=ir.Shape(self.pack[name].shape)
            )
        return graph.initializers[name]


def _check_second_factors(weight: ir.Value) -> None:
    """Raise ``PreconditionError`` unless weights are second factors of products.

    Products must multiply their inputs with them as ``(out, in)``, and none may be quantized yet.
    """
    if weight.dtype in QUANTIZED_TYPES:
        raise ir.passes.PreconditionError(f"{weight.name} is {weight.dtype} already")
    for node, index in weight.uses():
        if node.op_type != "Gemm" or index != 1 or len(node.inputs) != 2:
            raise ir.passes.PreconditionError(
                f"{weight.name} is something else than the second factor of a product"
            )
        if node.attributes.get_int("transB", 0) != 1:
            raise ir.passes.PreconditionError(
                f"the product with {weight.name} does not read it as (out, in)"
            )


def _axes(weight: ir.Shape, scale: ir.Shape) -> dict[str, int]:
    """Axes of the numbers that share a scale.

    These are all numbers, those of a row, or those of a block in a row.
    """
    if len(scale) == 0:
        return {}
    if len(scale) == 1:
        return {"axis": 0}
    return {"axis": 1, "block_size": weight.numpy()[1] // scale.numpy()[1]}


def _zero(graph: ir.Graph, kind: ir.DataType) -> ir.Value:
    """The constant zero point, which also says what type to quantize to."""
    name = f"zero.{kind.name.lower()}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.zeros((), _NUMPY[kind]), dtype=kind, name=name)
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(kind), shape=ir.Shape([]), const_value=tensor
        )
    return graph.initializers[name]


def _insert(
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    name: str,
    dtype: ir.DataType,
    like: ir.Value,
    attributes: dict[str, int] | None = None,
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes=attributes or {}, name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(dtype), like.shape
    before.graph.insert_before(before, node)  # type: ignore[union-attr]
    return output

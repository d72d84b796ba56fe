"""Multiplies int4 weights as they lie, for ONNX Runtime's CPU.

Standard ONNX can only dequantize a weight and multiply then, which reads it once and writes it
eight times as large, in every forward. ONNX Runtime's own operator ``MatMulNBits`` unpacks the
numbers in registers
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits)::

    before:  .weight -- DequantizeLinear by .weight_scale -- Gemm(transB=1)
    after:   .weight as bytes -- BitwiseXor with 0x88 -- MatMulNBits by .weight_scale

It wants numbers from 0 to 15 that stand for -8 to 7. In the pack they are two's complement: with
the highest bit of each flipped they are what it wants. ONNX Runtime computes that once, when it
loads the graph.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

AccuracyLevel = Literal[1, 4]
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Inputs that share a scale, as ``MatMulNBits`` takes them."""
ALIKE_BLOCK = 32
"""Longest block over which a row of a product with int8 inputs rounds as it does among others."""
DOMAIN = "com.microsoft"
_SIGN_BITS = 0x88
"""The sign of either number in a byte."""


class MultiplyInt4(ir.passes.InPlacePass):
    """Lets ``MatMulNBits`` read int4 weights.

    They are weights that a DequantizeLinear reads in blocks of a size it takes.

    Args:
        accuracy_level: Level of ``MatMulNBits``. With 1, the product is in float32. With 4, inputs
            are rounded to int8, each block of a row with a scale of its own.
    """

    def __init__(self, accuracy_level: AccuracyLevel) -> None:
        super().__init__()
        self.accuracy_level = accuracy_level

    def requires(self, model: ir.Model) -> None:
        """Check that each such node feeds one product, as ``(out, in)``.

        It is the second factor.
        """
        for widen in _widened_weights(model):
            uses = list(widen.outputs[0].uses())
            if (
                len(uses) != 1
                or uses[0].node.op_type != "Gemm"
                or uses[0].idx != 1
                or uses[0].node.attributes.get_int("transB", 0) != 1
            ):
                raise ir.passes.PreconditionError(
                    f"{widen.outputs[0].name} is not the second factor of one product"
                    " that reads it as (out, in)"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace both nodes of each product.

        A weight that several read is turned into unsigned numbers once.
        """
        found = _widened_weights(model)
        for weight in dict.fromkeys(widen.inputs[0] for widen in found):
            assert weight is not None
            self._replace(
                model.graph, weight, [widen for widen in found if widen.inputs[0] is weight]
            )
        if found:
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """None is dequantized any more."""
        if left := _widened_weights(model, (ir.DataType.INT4, ir.DataType.UINT8)):
            weight = left[0].inputs[0]
            assert weight is not None
            raise ir.passes.PostconditionError(f"{weight.name} is still dequantized")

    def _replace(self, graph: ir.Graph, weight: ir.Value, widens: list[ir.Node]) -> None:
        """Replace the products with one weight, and what dequantizes it.

        Nodes are taken in the graph's order.
        """
        assert weight.shape is not None
        (rows, columns), block = weight.shape.numpy(), widens[0].attributes.get_int("block_size")
        assert isinstance(block, int)
        weight.type, weight.shape = (
            ir.TensorType(ir.DataType.UINT8),
            ir.Shape([rows, columns // block, block // 2]),
        )
        flip = ir.node("BitwiseXor", [weight, _sign_bits(graph)], name=f"{weight.name}_unsigned")
        unsigned = flip.outputs[0]
        unsigned.name, unsigned.type, unsigned.shape = (
            f"{weight.name}_unsigned",
            weight.type,
            weight.shape,
        )
        graph.insert_before(widens[0], flip)
        sizes = {
            "K": columns,
            "N": rows,
            "bits": 4,
            "block_size": block,
            "accuracy_level": self.accuracy_level,
        }
        for widen in widens:
            ((product, _),) = widen.outputs[0].uses()
            multiply = ir.node(
                "MatMulNBits",
                [product.inputs[0], unsigned, widen.inputs[1]],
                attributes=sizes,
                domain=DOMAIN,
                name=product.name,
            )
            old, new = product.outputs[0], multiply.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            graph.insert_before(product, multiply)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove([product, widen], safe=True)


def _widened_weights(
    model: ir.Model, types: tuple[ir.DataType, ...] = (ir.DataType.INT4,)
) -> list[ir.Node]:
    """Return the nodes that dequantize weights that the operator can read.

    They are in the graph's order.
    """
    return [
        node
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and node.inputs[0].is_initializer()
        and node.inputs[0].dtype in types
        and node.attributes.get_int("block_size", 0) in BLOCK_SIZES
    ]


def _sign_bits(graph: ir.Graph) -> ir.Value:
    name = "signs.int4"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(_SIGN_BITS, np.uint8), name=name)
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([]), const_value=tensor
        )
    return graph.initializers[name]

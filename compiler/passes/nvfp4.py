"""Puts NVFP4 weights into a graph.

For TensorRT, whose kernels multiply numbers of four bits as they are, with the names of the pack::

    x:        TRT_FP4DynamicQuantize by the input's global scale
              -- DequantizeLinear of the scales, and of the numbers    -- Gemm(transB=1)
    .weight:  DequantizeLinear of .weight_scale by .weight_scale_2 -- Cast
              -- scale of the DequantizeLinear of .weight              -- Gemm(transB=1)

The operator in front is TensorRT's own, which ONNX does not have, and takes the global scale as a
constant only: it is the one scale that is no input of an engine. For ONNX Runtime, which knows
numbers of four bits by name alone, the same in operators of bytes and float32::

    .weight as bytes -- DequantizeLinear by 1 -- Cast -- Gather the two numbers of each byte
        -- Mul by the blocks' scales -- Gemm(transB=1)

The first step changes nothing but the type. It is there since ONNX Runtime would compute all that
follows a weight when it loads the graph, and keep it, eight times as large, unless a
DequantizeLinear is in between.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from trimode.compiler.passes.nodes import Nodes
from trimode.compiler.passes.quantize_weights import Stored, WeightPass
from trimode.graphs.numerics.integers import Floats
from trimode.graphs.numerics.nvfp4 import BLOCK_SIZE, LARGEST_CODE, PAIRS

DOMAIN = "trt"
_SCALE_IN_E4M3 = 17
"""``scale_type`` of TRT_FP4DynamicQuantize: the element type ``onnx.TensorProto.FLOAT8E4M3FN``."""
_SMALLEST_NORMAL = 2.0**-126


class _Nvfp4Pass(WeightPass):
    """Finds NVFP4 weights and walks through a graph."""

    dtypes = ("float4e2m1",)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put the nodes around each product."""
        found = self._quantized(model)
        for value in found:
            compute, shape = value.dtype, value.shape
            assert compute is not None
            assert shape is not None
            products = [product for product, _ in value.uses()]
            self._narrow(value, shape)
            for number, product in enumerate(products):
                # Where a weight is used twice, it is widened twice: only right before a product
                # need it be in memory.
                self._rewrite_product(
                    Nodes(model.graph, product, f".{number}" if number else ""),
                    product,
                    value,
                    compute,
                    shape,
                )
        return ir.passes.PassResult(model, modified=bool(found))

    def _rewrite_product(
        self,
        nodes: Nodes,
        product: ir.Node,
        weight: ir.Value,
        compute: ir.DataType,
        shape: ir.Shape,
    ) -> None:
        assert weight.name is not None
        layer, x = weight.name.removesuffix(".weight"), product.inputs[0]
        assert x is not None
        if f"{layer}.input_scale" in self.pack:
            product.replace_input_with(0, self._quantize_input(nodes, layer, x))
        product.replace_input_with(1, self._widen_weight(nodes, layer, weight, compute, shape))

    @abc.abstractmethod
    def _narrow(self, weight: ir.Value, shape: ir.Shape) -> None:
        """Give an ``(out, in)`` weight the type and shape of the graph."""

    @abc.abstractmethod
    def _quantize_input(self, nodes: Nodes, layer: str, x: ir.Value) -> ir.Value:
        """Quantize the input ``x (rows, in)`` and back, in its own type."""

    @abc.abstractmethod
    def _widen_weight(
        self, nodes: Nodes, layer: str, weight: ir.Value, compute: ir.DataType, shape: ir.Shape
    ) -> ir.Value:
        """The narrowed weight as ``(out, in)`` in the compute type."""

    def _scales(self, nodes: Nodes, layer: str) -> ir.Value:
        """Of the blocks, ``(out, in / 16)`` in float32."""
        blocks = nodes.stored(f"{layer}.weight_scale", ir.DataType.FLOAT8E4M3FN, self.pack)
        whole = nodes.stored(f"{layer}.weight_scale_2", ir.DataType.FLOAT, self.pack)
        return nodes.add(
            "DequantizeLinear",
            [blocks, whole],
            f"{layer}.weight_scales",
            ir.DataType.FLOAT,
            blocks.shape,
        )


class Nvfp4ForTensorRT(_Nvfp4Pass):
    """Reads NVFP4 weights from the pack, for TensorRT.

    The inputs of their products are quantized where the pack has a scale for them.

    To be applied once the graph has its compute type.

    Args:
        pack: Types and shapes of what the pack holds.
        input_scales: Global scales of inputs, by name.
    """

    def __init__(self, pack: Mapping[str, Stored], input_scales: Mapping[str, Floats]) -> None:
        super().__init__(pack)
        self.input_scales = input_scales

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put the nodes around each product, and import TensorRT's domain."""
        result = super().call(model)
        if any(node.domain == DOMAIN for node in model.graph):
            model.opset_imports[DOMAIN] = 1
        return result

    def ensures(self, model: ir.Model) -> None:
        """Check that weights have four bits and only DequantizeLinear reads them."""
        for value in self._quantized(model):
            if value.dtype != ir.DataType.FLOAT4E2M1 or any(
                node.op_type != "DequantizeLinear" for node, _ in value.uses()
            ):
                raise ir.passes.PostconditionError(
                    f"{value.name} is {value.dtype}"
                    " or read by something else than a DequantizeLinear"
                )

    def _quantize_input(self, nodes: Nodes, layer: str, x: ir.Value) -> ir.Value:
        name, compute = f"{layer}.input_scale", x.dtype
        assert compute is not None
        if name not in self.input_scales:
            raise ir.passes.PassError(f"the value of {name} is not known")
        scale = nodes.constant(
            f"{layer}.input_global", np.asarray(self.input_scales[name], np.float32)
        )
        narrow, blocks = nodes.add_two(
            "TRT_FP4DynamicQuantize",
            [x, scale],
            (f"{layer}.input_quantized", f"{layer}.input_blocks"),
            (ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN),
            {"axis": -1, "block_size": BLOCK_SIZE, "scale_type": _SCALE_IN_E4M3},
            DOMAIN,
        )
        wide = nodes.add(
            "DequantizeLinear", [blocks, scale], f"{layer}.input_scales", ir.DataType.FLOAT
        )
        return _widen(nodes, narrow, wide, f"{layer}.input", compute, x.shape, axis=-1)

    def _narrow(self, weight: ir.Value, shape: ir.Shape) -> None:  # noqa: ARG002  (the base's)
        weight.type = ir.TensorType(ir.DataType.FLOAT4E2M1)  # a new one: clones share their types

    def _widen_weight(
        self, nodes: Nodes, layer: str, weight: ir.Value, compute: ir.DataType, shape: ir.Shape
    ) -> ir.Value:
        return _widen(
            nodes, weight, self._scales(nodes, layer), f"{layer}.weight", compute, shape, axis=1
        )


class Nvfp4InFloat32(_Nvfp4Pass):
    """Reads NVFP4 weights from the pack, in float32 arithmetic.

    It uses the standard operators that ONNX Runtime's CPU provider has.
    """

    def ensures(self, model: ir.Model) -> None:
        """These weights are bytes."""
        for value in self._quantized(model):
            if value.dtype != ir.DataType.UINT8:
                raise ir.passes.PostconditionError(f"{value.name} is {value.dtype}")

    def _quantize_input(self, nodes: Nodes, layer: str, x: ir.Value) -> ir.Value:
        """Quantize each block by its own scale.

        That is ``q = round(clip(x / s, -6, 6) / step) * step``, where the step is 0.5 below 2, 1
        below 4, then 2.

        A block whose scale rounds to zero becomes zero.
        """
        name = f"{layer}.input"
        assert x.shape is not None
        columns = self.pack[f"{layer}.weight"].shape[1]
        scale = nodes.stored(f"{layer}.input_scale", ir.DataType.FLOAT, self.pack)
        blocks = nodes.float32(
            "Reshape", [x, nodes.shape(0, columns // BLOCK_SIZE, BLOCK_SIZE)], f"{name}_split"
        )
        magnitude = nodes.float32("Abs", [blocks], f"{name}_magnitude")
        amax = nodes.float32("ReduceMax", [magnitude, nodes.shape(-1)], f"{name}_amax")
        sixfold = nodes.float32("Mul", [scale, nodes.number(LARGEST_CODE)], f"{name}_scale_of_amax")
        narrow = nodes.add(
            "QuantizeLinear",
            [amax, sixfold, nodes.zero_e4m3()],
            f"{name}_blocks",
            ir.DataType.FLOAT8E4M3FN,
        )
        wide = nodes.float32("DequantizeLinear", [narrow, scale], f"{name}_scales")
        divisor = nodes.float32("Max", [wide, nodes.number(_SMALLEST_NORMAL)], f"{name}_divisor")
        steps = nodes.float32("Div", [blocks, divisor], f"{name}_in_scales")
        quantized = _round_to_e2m1(nodes, steps, name)
        values = nodes.float32("Mul", [quantized, wide], f"{name}_values")
        return nodes.add(
            "Reshape",
            [values, nodes.shape(0, columns)],
            f"{name}_dequantized",
            ir.DataType.FLOAT,
            x.shape,
        )

    def _narrow(self, weight: ir.Value, shape: ir.Shape) -> None:
        rows, columns = shape.numpy()
        weight.type, weight.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape([rows, columns // 2])

    def _widen_weight(
        self,
        nodes: Nodes,
        layer: str,
        weight: ir.Value,
        compute: ir.DataType,  # noqa: ARG002  (always float32)
        shape: ir.Shape,
    ) -> ir.Value:
        name, (rows, columns) = f"{layer}.weight", shape.numpy()
        scales = self._scales(nodes, layer)
        numbers = nodes.float32("DequantizeLinear", [weight, nodes.number(1)], f"{name}_bytes")
        index = nodes.add(
            "Cast",
            [numbers],
            f"{name}_index",
            ir.DataType.INT32,
            attributes={"to": ir.DataType.INT32.value},
        )
        pairs = nodes.float32(
            "Gather", [nodes.constant("pairs.float4e2m1", PAIRS), index], f"{name}_pairs"
        )
        blocks = nodes.float32(
            "Reshape",
            [pairs, nodes.shape(rows, columns // BLOCK_SIZE, BLOCK_SIZE)],
            f"{name}_split",
        )
        column = nodes.float32("Unsqueeze", [scales, nodes.shape(-1)], f"{name}_scale_of_block")
        values = nodes.float32("Mul", [blocks, column], f"{name}_values")
        return nodes.add(
            "Reshape",
            [values, nodes.shape(rows, columns)],
            f"{name}_dequantized",
            ir.DataType.FLOAT,
            shape,
        )


def _round_to_e2m1(nodes: Nodes, steps: ir.Value, name: str) -> ir.Value:
    cut = nodes.float32(
        "Clip", [steps, nodes.number(-LARGEST_CODE), nodes.number(LARGEST_CODE)], f"{name}_cut"
    )
    magnitude = nodes.float32("Abs", [cut], f"{name}_cut_magnitude")
    is_small = nodes.add("Less", [magnitude, nodes.number(2)], f"{name}_below_2", ir.DataType.BOOL)
    is_middle = nodes.add("Less", [magnitude, nodes.number(4)], f"{name}_below_4", ir.DataType.BOOL)
    coarse = nodes.float32(
        "Where", [is_middle, nodes.number(1), nodes.number(2)], f"{name}_coarse_step"
    )
    step = nodes.float32("Where", [is_small, nodes.number(0.5), coarse], f"{name}_step")
    whole = nodes.float32(
        "Round", [nodes.float32("Div", [cut, step], f"{name}_in_steps")], f"{name}_whole"
    )
    return nodes.float32("Mul", [whole, step], f"{name}_quantized")


def _widen(
    nodes: Nodes,
    narrow: ir.Value,
    scales: ir.Value,
    name: str,
    compute: ir.DataType,
    shape: ir.Shape | None,
    axis: int,
) -> ir.Value:
    """Widen numbers of four bits to the compute type.

    Their scales have to be in it too.
    """
    if compute != ir.DataType.FLOAT:
        scales = nodes.add(
            "Cast", [scales], f"{name}_scales_narrow", compute, scales.shape, {"to": compute.value}
        )
    return nodes.add(
        "DequantizeLinear",
        [narrow, scales],
        f"{name}_dequantized",
        compute,
        shape,
        {"axis": axis, "block_size": BLOCK_SIZE},
    )

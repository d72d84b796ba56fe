"""Puts nodes and constants in front of another node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trimode.compiler.passes.quantize_weights import Stored

Attributes = Mapping[str, int]


class Nodes:
    """Adds nodes in front of one node of a graph.

    Args:
        graph: Graph that grows.
        before: Node that new ones go in front of, each behind those added before it.
        suffix: End of the names of all that is added. Constants and stored tensors do not get it,
            since several nodes may read them.
    """

    def __init__(self, graph: ir.Graph, before: ir.Node, suffix: str = "") -> None:
        self._graph, self._before, self._suffix = graph, before, suffix

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        dtype: ir.DataType,
        shape: ir.Shape | None = None,
        attributes: Attributes | None = None,
    ) -> ir.Value:
        """The one output, of the same name as the node."""
        name += self._suffix
        node = ir.node(op_type, inputs, attributes=dict(attributes or {}), name=name)
        output = node.outputs[0]
        output.name, output.type, output.shape = name, ir.TensorType(dtype), shape
        self._graph.insert_before(self._before, node)
        return output

    def float32(self, op_type: str, inputs: Sequence[ir.Value], name: str) -> ir.Value:
        """An output in float32, of whatever shape."""
        return self.add(op_type, inputs, name, ir.DataType.FLOAT)

    def add_two(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        names: tuple[str, str],
        dtypes: tuple[ir.DataType, ir.DataType],
        attributes: Attributes,
        domain: str,
    ) -> tuple[ir.Value, ir.Value]:
        """Add an operator outside standard ONNX with two outputs.

        The node has the name of the first output.
        """
        names = (names[0] + self._suffix, names[1] + self._suffix)
        node = ir.node(
            op_type,
            inputs,
            attributes=dict(attributes),
            domain=domain,
            num_outputs=2,
            name=names[0],
        )
        for output, name, dtype in zip(node.outputs, names, dtypes, strict=True):
            output.name, output.type = name, ir.TensorType(dtype)
        self._graph.insert_before(self._before, node)
        return node.outputs[0], node.outputs[1]

    def stored(self, name: str, dtype: ir.DataType, pack: Mapping[str, Stored]) -> ir.Value:
        """An initializer without data: what the pack holds under this name."""
        if name not in self._graph.initializers:
            self._graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(dtype), shape=ir.Shape(pack[name].shape)
            )
        return self._graph.initializers[name]

    def constant(self, name: str, values: NDArray[Any]) -> ir.Value:
        """Return an initializer with data; an existing one of this name stays."""
        if name not in self._graph.initializers:
            tensor = ir.tensor(values, name=name)
            self._graph.initializers[name] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(values.shape),
                const_value=tensor,
            )
        return self._graph.initializers[name]

    def number(self, value: float) -> ir.Value:
        """A float32 constant ``()``."""
        return self.constant(f"number.{value:g}", np.array(value, np.float32))

    def shape(self, *sizes: int) -> ir.Value:
        """An int64 constant ``(n,)``."""
        return self.constant(f"sizes.{'.'.join(map(str, sizes))}", np.array(sizes, np.int64))

    def zero_e4m3(self) -> ir.Value:
        """The zero point that tells QuantizeLinear to quantize to E4M3."""
        return self.constant("zero.float8e4m3fn", np.zeros((), ml_dtypes.float8_e4m3fn))

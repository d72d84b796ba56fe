"""Lowers a traced graph to what a backend wants, by passes.

Each pass has a precondition and a postcondition. The result is standard ONNX in every case. Tensor
names stay those of the checkpoint, so that whoever runs the graph finds each weight in the pack by
its name. This module has what the passes share. The main passes:

- ``static_capacity``: TensorRT's cache update wants the slots of the cache as a constant.
- ``compute_type``: float16 or bfloat16 from the embedding to the head. What follows the head stays
  float32.
- ``stored_type``: weights lie in the pack in another type than they are computed in. A Cast stands
  behind each.
- ``weights_to_inputs``: no weight is in the graph. The runtime binds one copy of the pack to every
  engine.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from trimode.errors import BuildError
from trimode.formats.contract import DType

HEAD = "diffusion_head.weight"
TABLES = "rope."
"""Position tables stay float32 in every pack: angles at long positions need it."""
IR_DTYPES: dict[DType, ir.DataType] = {
    "int64": ir.DataType.INT64,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float8e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "float4e2m1": ir.DataType.FLOAT4E2M1,
}
QUANTIZED_TYPES = (
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.INT8,
    ir.DataType.INT4,
    ir.DataType.FLOAT4E2M1,
    ir.DataType.UINT8,
)
"""Types of weights, and of scales, that a DequantizeLinear reads; bytes hold two numbers of four
bits.
"""


def lower(model: ir.Model, *passes: ir.passes.InPlacePass) -> ir.Model:
    """Apply passes to a copy of ``model``.

    Types and shapes are inferred anew and checked after each.

    Raises:
        BuildError: a pass found a graph it does not understand, or left one that is not valid.
    """
    lowered = model.clone()
    for step in passes:
        try:
            ir.passes.Sequential(step)(lowered)
            _check_types(lowered)
        except (
            ir.passes.PassError,
            ir.passes.InvariantError,
            onnx.shape_inference.InferenceError,
        ) as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise BuildError(
                f"{model.graph.name}: expected to lower the graph ({type(step).__name__}),"
                f" found: {cause}",
                "this is an inconsistency of the compiler;"
                " please report it with the checkpoint's config.json",
            ) from error
    return lowered


def caches(model: ir.Model) -> list[ir.Value]:
    """Cache inputs and outputs, in graph order."""
    return [
        v
        for v in (*model.graph.inputs, *model.graph.outputs)
        if v.name and v.name.startswith(("past_key_values.", "present."))
    ]


def weights(model: ir.Model) -> list[ir.Value]:
    """Initializers whose data lies in the pack."""
    return [v for v in model.graph.initializers.values() if v.const_value is None]


def is_table(value: ir.Value) -> bool:
    """Whether a weight is one of the position tables."""
    return value.name is not None and value.name.startswith(TABLES)


def cast_after(
    graph: ir.Graph, value: ir.Value, dtype: ir.DataType, before: ir.Node | None = None
) -> None:
    """Let every user of ``value`` read it as ``dtype``.

    The Cast stands at its producer, or before ``before``.
    """
    users = list(value.uses())
    cast = ir.node("Cast", [value], attributes={"to": dtype.value})
    cast.outputs[0].name = f"{value.name}.{dtype.name.lower()}"
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, cast)
    else:
        assert before is not None
        graph.insert_before(before, cast)
    for node, index in users:
        node.replace_input_with(index, cast.outputs[0])
    for index, output in enumerate(graph.outputs):
        if output is value:  # the graph returns the cast value, under the same name
            graph.outputs[index] = cast.outputs[0]
            value.name, cast.outputs[0].name = f"{value.name}.narrow", value.name


def _check_types(model: ir.Model) -> None:
    """Infer all types and shapes from the inputs, strictly.

    Operators refuse mixed types, and the outputs must be as declared.
    """
    proto = ir.serde.serialize_model(_without_data(model))
    for value in [*proto.graph.value_info]:
        proto.graph.value_info.remove(value)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)


def _without_data(model: ir.Model) -> ir.Model:
    """Copy a graph and turn its weights into inputs.

    A tensor without data cannot be serialized as an initializer.
    """
    copy = model.clone()
    for value in weights(copy):
        assert value.name is not None
        del copy.graph.initializers[value.name]
        copy.graph.inputs.append(value)
    return copy


def to_bytes(model: ir.Model) -> bytes:
    """The serialized graph; weights must be inputs or have their data."""
    data: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return data

"""Lowering: passes that turn a traced graph into what a backend wants, each with a precondition and a postcondition.

The result is standard ONNX in every case. Tensor names stay those of the checkpoint, so that whoever runs the graph finds each weight
in the pack by its name.

===================== ==================================================================================================
static cache capacity TensorRT's cache update wants the slots of the cache as a constant
compute type          float16 or bfloat16 from the embedding to the head; what follows the head stays float32
stored type           weights lie in the pack in another type than they are computed in: a Cast behind each
weights to inputs     no weight in the graph: the runtime binds one copy of the pack to every engine
===================== ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
import onnx_ir as ir

from trimode.errors import BuildError
from trimode.graphs.contract import DType

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
QUANTIZED_TYPES = (ir.DataType.FLOAT8E4M3FN, ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT4E2M1, ir.DataType.UINT8)
"""Types of weights, and of scales, that a DequantizeLinear reads; bytes hold two numbers of four bits."""


def lower(model: ir.Model, *passes: ir.passes.InPlacePass) -> ir.Model:
    """Apply passes to a copy of ``model``; types and shapes are inferred anew and checked after each.

    Raises:
        BuildError: a pass found a graph it does not understand, or left one that is not valid.
    """
    lowered = model.clone()
    for step in passes:
        try:
            ir.passes.Sequential(step)(lowered)
            _check_types(lowered)
        except (ir.passes.PassError, ir.passes.InvariantError, onnx.shape_inference.InferenceError) as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise BuildError(f"{model.graph.name}: expected to lower the graph ({type(step).__name__}), found: {cause}",
                             "this is an inconsistency of the compiler; please report it with the checkpoint's config.json") from error  # fmt: skip
    return lowered


class StaticCacheCapacity(ir.passes.InPlacePass):
    """Give every cache tensor ``capacity`` slots instead of a dynamic number."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def requires(self, model: ir.Model) -> None:
        """The capacity is still dynamic."""
        for value in caches(model):
            if value.shape is None or value.shape.is_static(2):
                raise ir.passes.PreconditionError(f"{value.name} has no dynamic capacity")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Set the dimension; shapes inside are inferred again by whoever reads the graph."""
        for value in caches(model):
            assert value.shape is not None
            value.shape = ir.Shape([value.shape[0], value.shape[1], self.capacity, value.shape[3]])
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Every cache tensor has the capacity."""
        for value in caches(model):
            if value.shape is None or value.shape[2] != self.capacity:
                raise ir.passes.PostconditionError(f"{value.name} has shape {value.shape}")


class ComputeType(ir.passes.InPlacePass):
    """Compute in ``dtype`` from the embedding to the head.

    Logits are widened as soon as the head has made them, so the softmax, the candidates and the greedy ids are taken in float32, as the
    reference does. Token ids, lengths and every output but the cache keep their types.
    """

    def __init__(self, dtype: DType) -> None:
        super().__init__()
        self.dtype = IR_DTYPES[dtype]

    def requires(self, model: ir.Model) -> None:
        """A float32 graph in which nothing but products read the head."""
        if model.graph.initializers[HEAD].dtype != ir.DataType.FLOAT:
            raise ir.passes.PreconditionError("the graph does not compute in float32")
        if not (heads := _heads(model)) or any(node.op_type != "Gemm" for node in heads):
            raise ir.passes.PreconditionError("the head is not read by products, and only by these")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Retype everything before the head and put casts at the two borders."""
        graph = model.graph
        heads = _heads(model)
        wide = _downstream(heads)
        borders = [*(v for v in graph.inputs if v not in set(caches(model))), *(v for v in weights(model) if _is_table(v))]
        for value in borders:
            if value.dtype == ir.DataType.FLOAT:
                _cast_after(graph, value, self.dtype, before=graph[0])
        for head in heads:
            _cast_after(graph, head.outputs[0], ir.DataType.FLOAT)
        kept = {*borders, *(v for node in wide for v in node.outputs)}
        for value in _values(model):
            if value.dtype == ir.DataType.FLOAT and value not in kept and not _is_cast_to(value, ir.DataType.FLOAT):
                self._retype(value, wide)
        return ir.passes.PassResult(model, modified=True)

    def _retype(self, value: ir.Value, wide: set[ir.Node]) -> None:
        if value.const_value is not None:
            users = {node for node, _ in value.uses()}
            if users <= wide:
                return
            if users & wide:
                raise ir.passes.PassError(f"the constant {value.name} is used on both sides of the head")
            data = value.const_value.numpy().astype(self.dtype.numpy())
            value.const_value = ir.tensor(data, dtype=self.dtype, name=value.name)
        value.type = ir.TensorType(self.dtype)  # a new one: clones share their types

    def ensures(self, model: ir.Model) -> None:
        """Weights and cache have the type."""
        for value in (*weights(model), *caches(model)):
            if value.dtype != self.dtype and not _is_table(value):
                raise ir.passes.PostconditionError(f"{value.name} is {value.dtype}")


class StoredType(ir.passes.InPlacePass):
    """Read every weight that is not quantized as ``dtype`` and widen it to float32 before it is used: for runtimes that compute in float32.

    Args:
        dtype: of the pack.
        float32: names of what the pack holds in float32 all the same, beside the position tables.
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
            _cast_after(model.graph, value, ir.DataType.FLOAT, before=model.graph[0])
            value.type = ir.TensorType(self.dtype)  # a new one: clones share their types
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Weights have the type, and nothing but their casts reads them."""
        for value in self._stored(model):
            if value.dtype != self.dtype or not all(node.op_type == "Cast" for node, _ in value.uses()):
                raise ir.passes.PostconditionError(f"{value.name} is {value.dtype} or used without a Cast")

    def _stored(self, model: ir.Model) -> list[ir.Value]:
        """Weights of the type that the pack as a whole has."""
        return [v for v in weights(model) if not _is_table(v) and v.dtype not in QUANTIZED_TYPES and v.name not in self._float32]


class WeightsToInputs(ir.passes.InPlacePass):
    """Turn every weight into a graph input of the same name, after the inputs of the contract."""

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
            raise ir.passes.PostconditionError(f"{weights(model)[0].name} is still inside the graph")


def caches(model: ir.Model) -> list[ir.Value]:
    """Cache inputs and outputs, in graph order."""
    return [v for v in (*model.graph.inputs, *model.graph.outputs) if v.name and v.name.startswith(("past_key_values.", "present."))]


def weights(model: ir.Model) -> list[ir.Value]:
    """Initializers whose data lies in the pack."""
    return [v for v in model.graph.initializers.values() if v.const_value is None]


def _is_table(value: ir.Value) -> bool:
    return value.name is not None and value.name.startswith(TABLES)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _heads(model: ir.Model) -> list[ir.Node]:
    """The products with the head: one, or a second one over rows that what the first gave has chosen."""
    return [node for node, _ in model.graph.initializers[HEAD].uses()]


def _downstream(start: list[ir.Node]) -> set[ir.Node]:
    """Nodes that compute with the numbers ``start`` gives, themselves not included; an index taken from these is no such number."""
    found: set[ir.Node] = set()
    pending = list(start)
    while pending:
        for value in (v for v in pending.pop().outputs if v.dtype == ir.DataType.FLOAT):
            new = {node for node, _ in value.uses()} - found
            found |= new
            pending += new
    return found


def _cast_after(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, before: ir.Node | None = None) -> None:
    """Let every user of ``value`` read it as ``dtype``; the Cast stands at its producer, or before ``before``."""
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


def _is_cast_to(value: ir.Value, dtype: ir.DataType) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Cast" and producer.attributes["to"].as_int() == dtype.value


def _check_types(model: ir.Model) -> None:
    """Infer all types and shapes from the inputs, strictly: operators refuse mixed types, and the outputs must be as declared."""
    proto = ir.serde.serialize_model(_without_data(model))
    for value in [*proto.graph.value_info]:
        proto.graph.value_info.remove(value)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)


def _without_data(model: ir.Model) -> ir.Model:
    """A copy in which weights are inputs, since a tensor without data cannot be serialized as an initializer."""
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

"""Returns the logits in the type that the head gives them."""

from __future__ import annotations

import onnx_ir as ir

from trimode.compiler.passes.base import IR_DTYPES

LOGITS = "logits"
_NARROW = (IR_DTYPES["float16"], IR_DTYPES["bfloat16"])


class NarrowLogits(ir.passes.InPlacePass):
    """Returns logits in the type that they had before widening.

    They were widened for the output alone. Only what samples reads them, and it can widen the rows
    that it fetches. Widening all of 32 rows reads 8.4 MB and writes 16.8 MB in every forward, at a
    vocabulary of 131,072.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Skip the cast, and give the narrow type to what follows."""
        changed = False
        for value in list(model.graph.outputs):
            if value.name == LOGITS:
                changed |= _narrow(model, value)
        return ir.passes.PassResult(model, modified=changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that no cast from a narrow type precedes the output."""
        for value in model.graph.outputs:
            if value.name == LOGITS and _widening(_path(value)[0]) is not None:
                raise ir.passes.PostconditionError(f"{LOGITS} are still widened")


def _narrow(model: ir.Model, output: ir.Value) -> bool:
    wide, reshapes = _path(output)
    narrow = _widening(wide)
    if narrow is None:
        return False
    assert narrow.dtype is not None
    for reshape in reshapes:
        value = reshape.outputs[0]
        if len(value.uses()) + value.is_graph_output() > 1:
            raise ir.passes.PassError(f"{value.name} is read by something else than {LOGITS}")
        value.type = ir.TensorType(narrow.dtype)  # a new one: clones share their types
    if reshapes:
        reshapes[-1].replace_input_with(0, narrow)
    else:
        model.graph.outputs[list(model.graph.outputs).index(output)] = narrow
        output.name, narrow.name = f"{LOGITS}.wide", LOGITS
    return True


def _path(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """The value that reshapes make ``value`` from, and these, the last first."""
    reshapes: list[ir.Node] = []
    while (node := value.producer()) is not None and node.op_type == "Reshape":
        reshapes.append(node)
        assert node.inputs[0] is not None
        value = node.inputs[0]
    return value, reshapes


def _widening(value: ir.Value) -> ir.Value | None:
    """Return the input of a cast from a narrow type to float32.

    None where ``value`` does not come from such a cast.
    """
    cast = value.producer()
    if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None:
        return None
    widens = cast.attributes.get_int("to") == ir.DataType.FLOAT.value
    return cast.inputs[0] if widens and cast.inputs[0].dtype in _NARROW else None

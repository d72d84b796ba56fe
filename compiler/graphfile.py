"""Writes a traced graph whose initializers point into the weight packs, and checks the file it wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from trimode.compiler.lowering import IR_DTYPES
from trimode.compiler.weights import PackedTensor
from trimode.errors import BuildError
from trimode.runtime.pack import PACKED_DTYPES


def save_graph(model: ir.Model, tensors: Mapping[str, PackedTensor], path: Path) -> None:
    """Save ``model`` with its weights as external data in the packs, which lie in the same folder.

    Raises:
        BuildError: an initializer is in no pack, or has another type or shape there.
    """
    point_into_packs(model, tensors, path.parent)
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())


def point_into_packs(model: ir.Model, tensors: Mapping[str, PackedTensor], folder: Path) -> None:
    """Give every initializer without data its place in a pack of ``folder``.

    Raises:
        BuildError: an initializer is in no pack, or has another type or shape there.
    """
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        packed = tensors.get(name)
        if packed is None or not _is_as_declared(packed, value):
            raise BuildError(f"{model.graph.name}: expected the tensor {name} {value.dtype} {value.shape} in the weight pack, found {packed}",
                             "this is an inconsistency of the compiler; please report it with the checkpoint's config.json")  # fmt: skip
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            packed.file, packed.offset, packed.num_bytes, value.dtype, shape=value.shape, name=name, base_dir=folder
        )


def _is_as_declared(packed: PackedTensor, value: ir.Value) -> bool:
    """Whether the pack holds what a graph reads; int4 may also be read as bytes, of any shape, and float4e2m1."""
    shape = tuple(value.shape.numpy()) if value.shape is not None else None
    if packed.dtype in PACKED_DTYPES and value.dtype == ir.DataType.UINT8:
        return shape is not None and math.prod(shape) == packed.num_bytes
    return packed.shape == shape and IR_DTYPES[packed.dtype] == value.dtype


def check_graph(path: Path) -> None:
    """Run the ONNX checker (operators, attributes, external data) and shape inference on a saved graph."""
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise BuildError(f"{path.name}: expected a valid ONNX graph, found: {str(error).splitlines()[0]}",
                         "this is an inconsistency of the compiler; please report it with the checkpoint's config.json") from error  # fmt: skip

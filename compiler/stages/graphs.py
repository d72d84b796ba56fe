"""Writes the portable graphs beside their packs and checks them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from trimode.compiler.pack.layout import PackedTensor
from trimode.compiler.passes.base import IR_DTYPES
from trimode.compiler.passes.recipes import lower_portable
from trimode.compiler.stages.state import WithPack
from trimode.errors import BuildError
from trimode.formats.safetensors import PACKED_DTYPES


def write_graphs(state: WithPack) -> None:
    """Save and check the portable graphs beside their packs."""
    advance = state.progress.stage("write graphs", len(state.plan.graph_names))
    with _stand_ins(state.packs, state.folder):
        for graph_name, graph in state.graphs.items():
            path = state.folder / state.plan.names.graph(graph_name)
            save_graph(lower_portable(state.plan.dtype, graph, state.tensors), state.tensors, path)
            check_graph(path)
            state.record(path.name)
            advance(1)


@contextlib.contextmanager
def _stand_ins(packs: list[Path], folder: Path) -> Iterator[None]:
    """Put empty files of the packs' sizes where a check looks.

    Packs may lie elsewhere, and ONNX refuses links and other folders.
    """
    away = [pack for pack in packs if pack.parent != folder]
    for pack in away:
        with (folder / pack.name).open("wb") as stream:
            stream.truncate(pack.stat().st_size)  # takes no room on the disk
    try:
        yield
    finally:
        for pack in away:
            (folder / pack.name).unlink()


def save_graph(model: ir.Model, tensors: Mapping[str, PackedTensor], path: Path) -> None:
    """Save ``model``; its weights are external data in the packs.

    The packs lie in the same folder.

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
            raise BuildError(
                f"{model.graph.name}: expected the tensor {name} {value.dtype} {value.shape}"
                f" in the weight pack, found {packed}",
                "this is an inconsistency of the compiler;"
                " please report it with the checkpoint's config.json",
            )
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            packed.file,
            packed.offset,
            packed.num_bytes,
            value.dtype,
            shape=value.shape,
            name=name,
            base_dir=folder,
        )


def _is_as_declared(packed: PackedTensor, value: ir.Value) -> bool:
    """Whether the pack holds what a graph reads.

    int4 and float4e2m1 may also be read as bytes, of any shape.
    """
    shape = tuple(value.shape.numpy()) if value.shape is not None else None
    if packed.dtype in PACKED_DTYPES and value.dtype == ir.DataType.UINT8:
        return shape is not None and math.prod(shape) == packed.num_bytes
    return packed.shape == shape and IR_DTYPES[packed.dtype] == value.dtype


def check_graph(path: Path) -> None:
    """Run the ONNX checker on a saved graph.

    It checks operators, attributes and external data.
    """
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise BuildError(
            f"{path.name}: expected a valid ONNX graph, found: {str(error).splitlines()[0]}",
            "this is an inconsistency of the compiler;"
            " please report it with the checkpoint's config.json",
        ) from error

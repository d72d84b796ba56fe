"""Traces a module into an ONNX graph (opset 24) under fake tensors.

No weight is read and none is allocated.

The result is an onnx-ir model whose initializers carry the checkpoint's tensor names and no data;
the compiler says where the data lies.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trimode.formats.contract import GraphName, ModelInfo, TensorSpec, cache_specs, graph_contract
from trimode.graphs.adapter import Drafter
from trimode.graphs.config import ModelConfig
from trimode.graphs.decoder.attention import OPSET
from trimode.graphs.decoder.modules import build_module
from trimode.graphs.decoder.trunk import TriModeTrunk

IR_VERSION = 11

# Sizes used while tracing; each dimension is dynamic, and distinct sizes keep the exporter from
# taking two for one.
_EXAMPLE_SIZES = {"batch": 2, "rows": 5, "capacity": 64}
# The tracer wants to know that a slice of all rows but one is neither empty nor a single row; the
# graph itself runs with any number.
_LEAST_SIZES = {"rows": 3}


def trace_graph(
    graph_name: GraphName, config: ModelConfig, model: ModelInfo, drafter: Drafter | None = None
) -> ir.Model:
    """Trace one graph.

    Args:
        graph_name: Graph to trace.
        config: Sizes of the model, and its rope.
        model: Facts of the contract; they decide ``num_positions``.
        drafter: Shape of the adapter; only the draft graph has its branch.

    Returns:
        A model with inputs and outputs as in the contract and initializers that have a name, dtype
        and shape but no value,
        except small constants of the graph itself.
    """
    drafter = drafter if graph_name == "draft" else None
    contract = graph_contract(graph_name, model)
    inputs = (*contract.inputs, *cache_specs(model, "past_key_values"))
    outputs = (*contract.outputs, *cache_specs(model, "present"))
    with quiet_exporter():
        exported = _export(graph_name, config, model, drafter, contract.inputs)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
        )
        assert program is not None
        traced = program.model
        _tidy(traced, graph_name)
    declare(traced.graph.inputs, inputs)
    declare(traced.graph.outputs, outputs)
    return traced


def _export(
    graph_name: GraphName,
    config: ModelConfig,
    model: ModelInfo,
    drafter: Drafter | None,
    inputs: tuple[TensorSpec, ...],
) -> torch.export.ExportedProgram:
    """Export the module on fake tensors, the contract's symbolic dimensions dynamic."""
    dims = {name: torch.export.Dim(name, min=_LEAST_SIZES.get(name, 1)) for name in _EXAMPLE_SIZES}

    def example(spec: TensorSpec) -> Tensor:
        shape = [_EXAMPLE_SIZES[d] if isinstance(d, str) else d for d in spec.shape]
        return torch.ones(shape, dtype=getattr(torch, spec.dtype))

    def dynamic(spec: TensorSpec) -> dict[int, torch.export.Dim]:
        return {axis: dims[d] for axis, d in enumerate(spec.shape) if isinstance(d, str)}

    caches = cache_specs(model, "past_key_values")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        trunk = TriModeTrunk(
            config,
            model.num_positions,
            drafter_rank=drafter.rank if drafter else 0,
            drafter_alpha=drafter.alpha if drafter else 0.0,
        )
        args: list[Tensor | list[Tensor] | None] = [example(spec) for spec in inputs]
        shapes: list[dict[int, torch.export.Dim] | list[dict[int, torch.export.Dim]] | None] = [
            dynamic(spec) for spec in inputs
        ]
        if graph_name == "draft" and drafter is None:
            args.append(None)
            shapes.append(None)
        args.append([example(spec) for spec in caches])
        shapes.append([dynamic(spec) for spec in caches])
        return torch.export.export(
            build_module(graph_name, trunk.eval()),
            tuple(args),
            strict=False,
            dynamic_shapes=tuple(shapes),
        )


def _tidy(model: ir.Model, graph_name: GraphName) -> None:
    """Name initializers as the checkpoint does, and fold shape arithmetic.

    No leftovers of the exporter stay.
    """
    for name, value in list(model.graph.initializers.items()):
        if name.startswith("trunk."):
            del model.graph.initializers[name]
            value.name = name.removeprefix("trunk.")
            value.const_value = None
            model.graph.initializers[value.name] = value
    clean(model, graph_name)


def clean(model: ir.Model, name: str) -> None:
    """Fold constants and shape arithmetic, and name the graph.

    What the exporter leaves behind is dropped.
    """
    onnxscript.optimizer.optimize(model, onnx_shape_inference=False)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(o for node in model.graph for o in node.outputs),
    ):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "trimode", ""
    model.graph.name = name


def declare(values: Iterable[ir.Value], specs: tuple[TensorSpec, ...]) -> None:
    """Give graph inputs or outputs the contract's shapes.

    So dimension names are the contract's and not the exporter's.
    """
    values = list(values)
    assert [v.name for v in values] == [s.name for s in specs], (
        [v.name for v in values],
        [s.name for s in specs],
    )
    for value, spec in zip(values, specs, strict=True):
        value.shape = ir.Shape(spec.shape)
        value.dtype = {
            "int64": ir.DataType.INT64,
            "float32": ir.DataType.FLOAT,
            "bool": ir.DataType.BOOL,
        }[spec.dtype]


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings and logs about its own internals.

    A user can do nothing about them.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

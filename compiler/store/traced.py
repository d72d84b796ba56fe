"""Traces graphs by way of the cache.

Tracing takes seconds a graph and needs PyTorch; reading one takes neither.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trimode.compiler.passes.base import lower, to_bytes
from trimode.compiler.passes.weights_to_inputs import WeightsToInputs
from trimode.compiler.store.cache import ContentCache, key_of
from trimode.compiler.store.fingerprint import tracing_fingerprint
from trimode.formats.contract import GraphName, ModelInfo, cache_specs, graph_contract
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.config import ModelConfig


def traced_graph(
    graph_name: GraphName, checkpoint: Checkpoint, model: ModelInfo, kept: ContentCache | None
) -> ir.Model:
    """Trace a graph, or read it from the cache.

    It is as :func:`trimode.graphs.decoder.trace.trace_graph` makes it.
    """
    if kept is None:
        return _trace(graph_name, checkpoint, model)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "traced.onnx"
            kept.fetch(
                key_of_trace(graph_name, checkpoint, model),
                path,
                lambda entry: _write(_trace(graph_name, checkpoint, model), entry),
            )
            return _read(path, graph_name, model)
    except OSError as error:  # of the folder for temporary files: tracing reads and writes none
        kept.warn(error, Path(os.environ.get("TMPDIR", "/tmp")))  # noqa: S108
        return _trace(graph_name, checkpoint, model)


def key_of_trace(graph_name: GraphName, checkpoint: Checkpoint, model: ModelInfo) -> str:
    """Return a digest of all that a traced graph depends on.

    Weights are not part of it.
    """
    # as trace_graph: the others have no branch
    drafter = checkpoint.drafter if graph_name == "draft" else None
    config, facts = _that_decide(graph_name, checkpoint.config, model)
    return key_of(
        kind="traced graph",
        role=graph_name,
        config=repr(config),
        model=facts.model_dump(mode="json"),
        drafter=[drafter.rank, drafter.alpha] if drafter else None,
        sources=tracing_fingerprint(),
    )


def _trace(graph_name: GraphName, checkpoint: Checkpoint, model: ModelInfo) -> ir.Model:
    from trimode.graphs.decoder.trace import trace_graph  # brings PyTorch

    config, facts = _that_decide(graph_name, checkpoint.config, model)
    return trace_graph(graph_name, config, facts, checkpoint.drafter)


def _that_decide(
    graph_name: GraphName, config: ModelConfig, model: ModelInfo
) -> tuple[ModelConfig, ModelInfo]:
    """Remove the facts that decide no graph.

    So models that differ in them alone share their graphs. Tracing is given the same as the key:
    what is left out can change nothing.
    """
    unread: dict[str, Any] = {"bos_token_id": None, "eos_token_ids": (), "block_size": 1}
    has_drafter = model.has_drafter and graph_name == "draft"
    facts = model.model_copy(update={**unread, "has_drafter": has_drafter})
    return replace(config, **unread), facts


def _write(graph: ir.Model, path: Path) -> None:
    """Write a graph, its weights as inputs behind the contract's.

    They have no data, which ONNX cannot say of an initializer.
    """
    path.write_bytes(to_bytes(lower(graph, WeightsToInputs())))


def _read(path: Path, graph_name: GraphName, model: ModelInfo) -> ir.Model:
    graph = ir.load(path)
    count = len(graph_contract(graph_name, model).inputs) + len(
        cache_specs(model, "past_key_values")
    )
    for value in graph.graph.inputs[count:]:
        assert value.name is not None
        graph.graph.initializers[value.name] = value
    del graph.graph.inputs[count:]
    return graph

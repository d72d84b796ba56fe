"""Traces the graphs of a build."""

from __future__ import annotations

from trimode.compiler.stages.state import BuildState
from trimode.compiler.store.traced import traced_graph


def trace_graphs(state: BuildState) -> None:
    """Trace each graph, under fake tensors."""
    advance = state.progress.stage("trace graphs", len(state.plan.graph_names))
    for graph_name in state.plan.graph_names:
        state.graphs[graph_name] = traced_graph(
            graph_name, state.plan.checkpoint, state.plan.model, state.cache
        )
        advance(1)

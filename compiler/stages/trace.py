"""Traces the graphs of a build, one a role."""

from __future__ import annotations

from trimode.compiler.stages.state import BuildState
from trimode.compiler.store.traced import traced_graph


def trace_graphs(state: BuildState) -> None:
    """Trace one graph per role, under fake tensors."""
    advance = state.progress.stage("trace graphs", len(state.plan.roles))
    for role in state.plan.roles:
        state.graphs[role] = traced_graph(
            role, state.plan.checkpoint, state.plan.model, state.cache
        )
        advance(1)

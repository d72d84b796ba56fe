"""Runs a forward of neighbouring rows, each over its own part of one cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimode.formats.contract import GraphName, ModelInfo, slots_written
from trimode.runtime.decode.forward import Outputs
from trimode.runtime.engine.grouping import JointForward, Length
from trimode.runtime.sessions.base import BatchCache, BatchSession


def run_joint(
    session: BatchSession, cache: BatchCache, joint: JointForward, length_of: Length
) -> Outputs:
    """Run a forward. A row that only lies between gets padding behind what is valid.

    Args:
        session: Loaded graphs.
        cache: K/V of the rows.
        joint: Rows, and what those that asked for the forward give it.
        length_of: Valid slots of a row.

    Returns:
        Outputs of the graph's contract, one entry for each of ``joint.rows``.
    """
    shape, first = (len(joint.rows), joint.num_tokens), joint.rows.start
    ids, real = np.zeros(shape, np.int64), np.ones(shape[0], np.int64)
    past = np.array([length_of(row) for row in joint.rows])
    for one in joint.members:
        place = one.row - first
        ids[place, : one.num_tokens] = one.forward.token_ids
        past[place], real[place] = one.forward.past_length, one.num_tokens
    outputs = session.run_rows(
        joint.graph_name, cache, joint.rows, ids, past, real, joint.drafter_scale
    )
    return keep(joint.graph_name, outputs)


def has_room(
    cache: BatchCache, model: ModelInfo, graph_name: GraphName, past_length: int, num_tokens: int
) -> bool:
    """Whether padding stays within the cache, which must not grow for it, and within the position
    tables.
    """
    return (
        past_length + slots_written(graph_name, num_tokens) <= cache.capacity
        and past_length + num_tokens <= model.num_positions
    )


def keep(graph_name: GraphName, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Outputs that other rows' forwards do not overwrite.

    Those of ``verify`` are large, and read before anything else runs, or never.
    """
    return outputs if graph_name == "verify" else tuple(np.array(output) for output in outputs)

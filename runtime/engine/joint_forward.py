"""Runs a forward of neighbouring rows of one cache.

Each row runs over its own part of the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trimode.formats.contract import GraphName, ModelInfo, slots_written
from trimode.runtime.decode.forward import Outputs
from trimode.runtime.engine.grouping import JointForward, Length
from trimode.runtime.sessions.base import BatchCache, BatchSession, Ids


def run_joint(
    session: BatchSession, cache: BatchCache, joint: JointForward, length_of: Length
) -> Outputs:
    """Run a forward of neighbouring rows.

    A row that only lies between gets padding behind what is valid.

    Args:
        session: Loaded graphs.
        cache: K/V of the rows.
        joint: Rows, and the tokens of those that asked for the forward.
        length_of: Function that gives the valid slots of a row.

    Returns:
        Outputs of the graph's contract, one entry for each of ``joint.rows``.
    """
    ids, past, real = _inputs(joint, length_of)
    outputs = session.run_rows(
        joint.graph_name, cache, joint.rows, ids, past, real, joint.drafter_scale
    )
    return keep(joint.graph_name, outputs)


def _inputs(joint: JointForward, length_of: Length) -> tuple[Ids, Ids, Ids]:
    """Return ids ``(rows, tokens)``, and cached and new lengths ``(rows,)``."""
    first, num_rows = joint.members[0], len(joint.rows)
    if num_rows == 1:  # the usual case where nobody else is there: no padding
        ids = np.array(first.forward.token_ids, np.int64, ndmin=2)
        return ids, np.array([first.forward.past_length]), np.array([first.num_tokens])
    ids, real = np.zeros((num_rows, joint.num_tokens), np.int64), np.ones(num_rows, np.int64)
    past = np.array([length_of(row) for row in joint.rows])
    for one in joint.members:
        place = one.row - joint.rows.start
        ids[place, : one.num_tokens] = one.forward.token_ids
        past[place], real[place] = one.forward.past_length, one.num_tokens
    return ids, past, real


def has_room(
    cache: BatchCache, model: ModelInfo, graph_name: GraphName, past_length: int, num_tokens: int
) -> bool:
    """Whether padding stays within the cache and the position tables.

    The cache must not grow for padding.
    """
    return (
        past_length + slots_written(graph_name, num_tokens) <= cache.capacity
        and past_length + num_tokens <= model.num_positions
    )


def keep(graph_name: GraphName, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy outputs, so that other rows' forwards do not overwrite them.

    Those of ``verify`` are not copied: they are large, and read before anything else runs, or
    never.
    """
    return outputs if graph_name == "verify" else tuple(np.array(output) for output in outputs)

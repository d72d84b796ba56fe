"""Adapts one engine to the graphs ``ar``, ``draft`` and ``verify``.

That is what the engine is given, and what its outputs say to each graph
(:func:`trimode.formats.contract.joint_contract`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.formats.contract import GraphName
from trimode.runtime.sessions.base import Array, DeviceArray, Ids

Values = dict[str, Any]


def joint_values(graph_name: GraphName, values: Values) -> Values:
    """Inputs of a forward; the drafter's adapter is off but for ``draft``."""
    if graph_name == "draft":
        return {**values, "is_causal": 0}
    return {**values, "is_causal": 1, "drafter_scale": 0.0}


def joint_outputs(
    graph_name: GraphName, values: Values, copied: dict[str, Array], logits: DeviceArray
) -> tuple[Any, ...]:
    """Outputs of a graph, as its contract says.

    Args:
        graph_name: Graph that ran.
        values: Inputs of the forward.
        copied: ``top_ids`` and ``top_probabilities (batch, window, n)``.
        logits: The window's, ``(batch, window, vocabulary)``.
    """
    ids = copied["top_ids"]
    greedy: Ids = np.ascontiguousarray(ids[..., 0], np.int64)
    if graph_name == "draft":
        return ids, copied["top_probabilities"]
    if graph_name == "verify":
        return greedy, accepted_length(greedy, values["input_ids"]), logits
    last = _last_rows(values["input_length"], *greedy.shape)
    return greedy[np.arange(len(last)), last], _rows_of(logits, last)


def accepted_length(greedy: Ids, input_ids: Ids) -> NDArray[np.int64]:
    """Count the accepted drafts of each sequence, ``(batch,)``.

    Of ``input_ids[:, 1:]``, those up to the first that differs from the greedy id before it.
    """
    mismatch = greedy[:, :-1] != np.asarray(input_ids)[:, 1:]
    accepted: NDArray[np.int64] = (np.cumsum(mismatch, 1) == 0).sum(1).astype(np.int64)
    return accepted


def _last_rows(length: Any, batch: int, window: int) -> NDArray[np.int64]:
    """Where in its window the last real row of each sequence is."""
    lengths = np.broadcast_to(np.asarray(length, np.int64).reshape(-1), (batch,))
    last: NDArray[np.int64] = np.minimum(lengths, window) - 1
    return last


def _rows_of(logits: DeviceArray, rows: NDArray[np.int64]) -> DeviceArray:
    """Return one row's logits of each sequence, ``(batch, vocabulary)``.

    They stay on the GPU.
    """

    def fetch_row(sequence: int) -> Array:
        row: Array = np.asarray(logits.of_row(sequence).of_row(int(rows[sequence])))
        return row

    def fetch() -> Array:
        return np.stack([fetch_row(sequence) for sequence in range(len(rows))])

    return DeviceArray((len(rows), logits.shape[2]), logits.dtype, fetch, fetch_row)

"""Chooses the sizes that a TensorRT engine is compiled for.

``ar`` has one profile for decoding and one for prompt chunks; the others have one for each block
length, with that number of rows fixed, so that kernels are chosen for it and forwards can be
captured as CUDA graphs.
"""

from __future__ import annotations

from trimode.formats.contract import GraphName, ModelInfo, slots_written
from trimode.formats.manifest import ProfileRecord
from trimode.runtime.decode.sequence import PREFILL_CHUNK

DEFAULT_BLOCK_LENGTHS = (8, 16, 32)

_ONE_ROW_SLOTS = 24576
"""TensorRT-RTX 1.7 has an attention kernel for exactly one row, which keeps 2 bytes for each slot
of the cache and each element of a head in 48 KiB of shared memory, and refuses to compile where
they do not fit (found by bisection at head sizes 64, 128 and 256, on SM75 to SM121). A profile that
admits a second row gets the general kernel, at any capacity.
"""


_BATCH_STEP = 64
"""Several sequences lie one after the other in a cache tensor, and TensorRT wants each to begin at
a multiple of 256 bytes.
"""


def plan_capacity(
    graph_names: tuple[GraphName, ...],
    model: ModelInfo,
    block_lengths: tuple[int, ...],
    max_batch: int = 1,
    max_length: int | None = None,
) -> int:
    """Slots of a cache for the longest text and its block.

    Whatever the graphs write behind the text has to fit.

    Args:
        graph_names: Graphs that run over the cache.
        model: Facts that decide how long blocks may be.
        block_lengths: Rows of the graphs other than ``ar``.
        max_batch: Most sequences in one forward.
        max_length: Tokens of the longest text; None = the model's.
    """
    written = (
        slots_written(graph_name, rows)
        for graph_name in graph_names
        for rows in _lengths(graph_name, model, block_lengths)
    )
    capacity = (max_length or model.max_length) + max(model.max_block_length, *written)
    return capacity if max_batch == 1 else -(-capacity // _BATCH_STEP) * _BATCH_STEP


def plan_profiles(
    graph_name: GraphName,
    model: ModelInfo,
    block_lengths: tuple[int, ...],
    max_batch: int,
    capacity: int | None = None,
    *,
    one_row: bool = True,
) -> tuple[ProfileRecord, ...]:
    """Profiles of one graph, in the engine's order.

    Args:
        graph_name: Name of the graph.
        model: Facts that decide the longest prompt; a chunk is never longer.
        block_lengths: Rows of the other graphs.
        max_batch: Most sequences in one forward.
        capacity: Slots of the cache; None = a text and a block.
        one_row: Whether decoding may be compiled for exactly one row. TensorRT-RTX then expands
            int8 weights that are multiplied in high precision; a profile that admits a second row
            widens them on the way.
    """
    batch = (1, 1, max_batch)
    if graph_name == "ar":
        slots = (capacity or model.num_positions) + model.head_dim
        most = 1 if one_row and slots <= _ONE_ROW_SLOTS else 2
        longest = min(model.max_length, capacity or model.max_length)
        chunk = max(min(PREFILL_CHUNK, longest), *block_lengths)
        return (
            ProfileRecord(batch=batch, rows=(1, 1, most)),
            ProfileRecord(batch=batch, rows=(1, chunk, chunk)),
        )
    return tuple(
        ProfileRecord(batch=batch, rows=(n, n, n))
        for n in _lengths(graph_name, model, block_lengths)
    )


def _lengths(graph_name: GraphName, model: ModelInfo, block_lengths: tuple[int, ...]) -> list[int]:
    """Block lengths that a graph is compiled for, ascending."""
    most = model.max_quadratic_length if graph_name == "quadratic" else model.max_block_length
    return [length for length in sorted(set(block_lengths)) if length <= most]

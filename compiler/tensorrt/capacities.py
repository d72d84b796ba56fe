"""Plans engines for several capacities of the cache.

Engines fix their cache's slots. A text runs in the smallest capacity that holds it, so that
attention has fewer slots to pass over, and moves up when it has grown.
"""

from __future__ import annotations

from trimode.compiler.options import BuildOptions
from trimode.compiler.targets import Precision
from trimode.compiler.tensorrt.profiles import DEFAULT_BLOCK_LENGTHS, plan_capacity, plan_profiles
from trimode.errors import UsageError
from trimode.formats.contract import GraphName, ModelInfo
from trimode.formats.manifest import CapacityRecord, EngineRecord

_EXAMPLE = "pass for example `capacities` 2048,8192,32768"


def lengths_of_blocks(options: BuildOptions, model: ModelInfo) -> tuple[int, ...]:
    """Block lengths that engines are compiled for."""
    return options.block_lengths or (*DEFAULT_BLOCK_LENGTHS, model.block_size)


def plan_engines(
    options: BuildOptions,
    model: ModelInfo,
    graph_names: tuple[GraphName, ...],
    folder: str,
    max_length: int | None = None,
    *,
    one_row: bool = True,
) -> CapacityRecord:
    """Plan the engines of one capacity.

    Args:
        options: Block lengths and batch.
        model: Facts that decide sizes.
        graph_names: Graphs of the bundle.
        folder: Folder of the target in the bundle.
        max_length: Tokens of the longest text, which is part of the files' names; None = the
            model's, and plain names.
        one_row: Whether decoding may be compiled for exactly one row.
    """
    lengths = lengths_of_blocks(options, model)
    capacity = plan_capacity(graph_names, model, lengths, options.max_batch, max_length)
    suffix = "" if max_length is None else f"-{max_length}"
    graphs = {
        graph_name: EngineRecord(
            file=f"{folder}/{graph_name}{suffix}.engine",
            profiles=plan_profiles(
                graph_name, model, lengths, options.max_batch, capacity, one_row=one_row
            ),
        )
        for graph_name in graph_names
    }
    return CapacityRecord(
        max_length=max_length or model.max_length, capacity=capacity, graphs=graphs
    )


def plan_smaller(
    options: BuildOptions,
    model: ModelInfo,
    graph_names: tuple[GraphName, ...],
    folder: str,
    *,
    one_row: bool = True,
) -> tuple[CapacityRecord, ...]:
    """Plan the engines of the capacities below the largest, ascending.

    Raises:
        UsageError: a capacity is out of its range, or engines would hold the weights once more for
            each.
    """
    if options.capacities is None:
        return ()
    check_capacities(options, model)
    return tuple(
        plan_engines(options, model, graph_names, folder, length, one_row=one_row)
        for length in options.capacities
        if length < model.max_length
    )


def check_one_capacity(options: BuildOptions, precision: Precision) -> None:
    """Raise :class:`UsageError` for several capacities of engines that hold the weights."""
    if options.capacities is not None:
        raise UsageError(
            f"expected one capacity in {precision}, whose engines hold the weights,"
            f" found {len(options.capacities)}: each would hold another copy",
            "leave `capacities` out, or choose bf16, fp8, or int8 with a calibration",
        )


def check_capacities(options: BuildOptions, model: ModelInfo) -> None:
    """Raise :class:`UsageError` unless the capacities suit the model and the other options."""
    assert options.capacities is not None
    if options.weights == "baked":
        raise UsageError(
            "expected `weights` shared with `capacities`, found baked: each capacity would hold"
            " another copy of the weights for each graph",
            "leave one of the two out",
        )
    longest_block = max(n for n in lengths_of_blocks(options, model) if n <= model.max_block_length)
    for length in options.capacities:
        if length < longest_block:
            raise UsageError(
                f"expected capacities of at least the longest block, {longest_block} tokens,"
                f" found {length}",
                _EXAMPLE,
            )
        if length > model.max_length:
            raise UsageError(
                f"expected capacities up to the longest text, {model.max_length} tokens,"
                f" found {length}",
                "leave it out, or pass a larger `max_length` if the model allows it",
            )

"""Implements ``trimode plan``: what a GPU will hold, before anything is built."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trimode.cli.build import read_calibration
from trimode.cli.flags import BUILD_FLAGS, flags_in_errors
from trimode.cli.options import build as options
from trimode.cli.options import plan as own
from trimode.cli.options.shared import CheckpointPath, Json
from trimode.cli.parse import need, parse_optional_ints

if TYPE_CHECKING:
    from rich.table import Table

    from trimode.compiler.memory.predict import TargetMemory
    from trimode.compiler.options import BuildOptions

_NOTE = (
    "GB of one GPU, computed from the plans of shallow engines, not measured. The driver takes\n"
    "memory of its own: {reserved:.2f} GB are left for it. Longest text: tokens that fit with "
    "{batch} at a\ntime. Most texts: of {length} tokens each, at most {most}."
)


def plan(
    checkpoint: CheckpointPath,
    *,
    target: own.Targets = None,
    precision: own.Precision = None,
    calibration: own.Calibration = None,
    drafter: options.Drafter = None,
    max_length: options.MaxLength = None,
    block_lengths: options.BlockLengths = None,
    max_batch: options.MaxBatch = 1,
    quadratic: options.Quadratic = False,
    gpu_memory: options.GpuMemory = None,
    jobs: options.Jobs = None,
    no_cache: options.NoCache = False,
    as_json: Json = False,
) -> None:
    """Predict what a GPU will hold, and what fits, before a build.

    Compiles engines of a few layers; reads no weights.
    """
    need("the compiler", "compile", "torch", "onnx", "onnx_ir", "onnxscript", "filelock")
    from trimode.compiler.options import BuildOptions
    from trimode.runtime.bundle.cache_folder import usual_folder

    chosen = BuildOptions(
        targets=tuple(target or ("auto",)),
        precision=precision,
        calibration=read_calibration(calibration),
        drafter=drafter,
        max_length=max_length,
        block_lengths=parse_optional_ints(block_lengths),
        max_batch=max_batch,
        quadratic=quadratic,
        gpu_memory_gb=gpu_memory,
        num_jobs=jobs,
        cache=None if no_cache else usual_folder(),
    )
    with flags_in_errors(BUILD_FLAGS):
        found = _predict(checkpoint, chosen)
    _print(found, as_json=as_json)


def _predict(checkpoint: Any, chosen: BuildOptions) -> list[TargetMemory]:
    from trimode.cli.console import RichProgress
    from trimode.compiler.memory.predict import predict_memory
    from trimode.compiler.store.cache import ContentCache
    from trimode.graphs.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint, chosen.drafter)
    cache = ContentCache(chosen.cache, chosen.cache_limit_bytes) if chosen.cache else None
    with RichProgress() as progress:
        return predict_memory(opened, chosen, cache, progress)


def _print(found: list[TargetMemory], *, as_json: bool) -> None:
    from trimode.cli.output import print_json
    from trimode.cli.tables import table_console
    from trimode.compiler.memory.predict import RESERVED_BYTES
    from trimode.compiler.options import MAX_BATCH

    if as_json:
        print_json([_as_data(one) for one in found], indent=1)
        return
    console, first = table_console(120), found[0]
    for table in (_memory_table(found), _speed_table(found)):
        console.print(table)
        console.print()
    facts = {"batch": first.max_batch, "length": first.max_length, "most": MAX_BATCH}
    console.print(_NOTE.format(reserved=RESERVED_BYTES / 1e9, **facts), markup=False)


def _as_data(one: TargetMemory) -> dict[str, Any]:
    data = asdict(one)
    data["use"]["total"] = one.use.total
    return {**data, "fits": one.fits}


def _memory_table(found: list[TargetMemory]) -> Table:
    from trimode.cli.tables import plain_table

    parts = ("weights", "engines", "scratch", "in, out", "K/V", "in all", "of")
    table = plain_table(
        "target", "precision", figures=(*parts, "fits", "longest text", "most texts")
    )
    for one in found:
        use = one.use
        sizes = (use.weights, use.engines, use.scratch, use.io, use.cache, use.total)
        table.add_row(
            one.target, one.precision, *(f"{size / 1e9:.2f}" for size in sizes), *_room(one)
        )
    return table


def _room(one: TargetMemory) -> tuple[str, ...]:
    """Return cells: memory, whether it suffices, longest text, largest batch.

    All but the first are empty where the memory is not known.
    """
    if one.memory_bytes is None:
        return ("not known", "", "", "")
    verdict = "yes" if one.fits else "no"
    return (f"{one.memory_bytes / 1e9:g}", verdict, str(one.longest_text), str(one.largest_batch))


def _speed_table(found: list[TargetMemory]) -> Table:
    """A line for each forward; milliseconds follow from the GPU's bandwidth."""
    from trimode.cli.tables import decimal, plain_table

    table = plain_table("target", "forward", figures=("tokens", "GB moved", "ms"))
    for one in found:
        for cost in one.forwards:
            ms = decimal(cost.predicted_ms, 3, missing="")
            table.add_row(one.target, cost.graph, str(cost.tokens), f"{cost.moved / 1e9:.3f}", ms)
    return table

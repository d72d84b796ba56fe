"""The tables that ``benchmarks.predicted_speed`` writes: predictions, and published speeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pages import fill, table
from trimode.compiler.targets import TARGETS

TOKENS_PER_CYCLE = {"3b": 4.36, "8b": 5.99, "14b": 5.96}
"""Accepted tokens of a draft and its verification, mean of ten tasks, with the drafter: NVIDIA's
technical report, tables 6 and 7.
"""
SPEED_BENCH = 6.82
"""The same of 8B on SPEED-Bench, whose texts the published speeds are of: table 10."""
PUBLISHED = {
    ("rtx-pro-6000", "fp8"): (80.0, 277.0),
    ("rtx-pro-6000", "int4"): (None, 525.0),
    ("dgx-spark", "fp8"): (24.7, 77.5),
    ("dgx-spark", "int4"): (41.8, 112.5),
}
"""Tokens per second of 8B, one text at a time, in AR and self-speculation with the drafter: figure
9 of the report. Sources differ on AR in int4 on the RTX PRO 6000, so none is named.
"""


def write_tables(measured: dict[str, Any], path: Path) -> None:
    """Put the recorded figures into the page."""
    parts = {
        "sizes": table(_size_rows(measured)),
        "published": table(_published_rows(measured)),
        "check": _check(measured.get("check")),
    }
    fill(path, parts)


def _size_rows(measured: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield (
        "GPU",
        "size",
        "precision",
        "weights, GB",
        "AR, ms",
        "draft, ms",
        "verify, ms",
        "kernels of a cycle",
        "of floor",
        "AR, tokens/s",
        "self-speculation, tokens/s",
    )
    for gpu in measured["predictions"][0]["gpus"]:
        for one in measured["predictions"]:
            yield _size_row(gpu, one)


def _size_row(gpu: str, one: dict[str, Any]) -> tuple[str, ...]:
    by_graph = one["gpus"][gpu]
    cycle = [by_graph["draft"], by_graph["verify"]]
    head = (gpu, one["size"].upper(), one["precision"], f"{one['weight_bytes'] / 1e9:.1f}")
    if one["weight_bytes"] > (TARGETS[gpu].memory_gb or 0) * 1e9:
        return (*head, "does not fit", *[""] * 6)
    floor = sum(found["weights"] + found["keys_values"] for found in cycle)
    return (
        *head,
        *(f"{by_graph[graph_name]['computed_ms']:.2f}" for graph_name in ("ar", "draft", "verify")),
        str(sum(found["kernels"] for found in cycle)),
        f"{sum(found['moved'] for found in cycle) / floor:.2f}",
        f"{ar_speed(one, gpu):.0f}",
        f"{cycle_speed(one, gpu, TOKENS_PER_CYCLE[one['size']]):.0f}",
    )


def ar_speed(one: dict[str, Any], gpu: str) -> float:
    """Tokens per second, one forward each."""
    return float(1e3 / one["gpus"][gpu]["ar"]["computed_ms"])


def cycle_speed(one: dict[str, Any], gpu: str, tokens: float) -> float:
    """Tokens per second of a draft and a verification."""
    by_graph = one["gpus"][gpu]
    return float(
        1e3 * tokens / (by_graph["draft"]["computed_ms"] + by_graph["verify"]["computed_ms"])
    )


def _published_rows(measured: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield (
        "GPU",
        "precision",
        "AR computed",
        "AR published",
        "published / computed",
        "self-speculation computed",
        "published",
        "published / computed",
    )
    found = {one["precision"]: one for one in measured["predictions"] if one["size"] == "8b"}
    for (gpu, precision), (ar, cycle) in PUBLISHED.items():
        if precision not in found:
            continue
        one = found[precision]
        speeds = ((ar_speed(one, gpu), ar), (cycle_speed(one, gpu, SPEED_BENCH), cycle))
        yield (gpu, precision, *(cell for pair in speeds for cell in _compared(*pair)))


def _compared(computed: float, published: float | None) -> tuple[str, str, str]:
    if published is None:
        return f"{computed:.0f}", "sources differ", ""
    return f"{computed:.0f}", f"{published:g}", f"{published / computed:.2f}"


def _check(check: dict[str, Any] | None) -> str:
    if check is None:
        return "Not done yet."
    return (
        f"Engines of all 34 layers of 8B were compiled in {check['precision']} for the three GPUs. "
        "Each part of what a forward moves differs from the scaled figure by at most "
        f"{check['largest_difference']:.2%} of the whole."
    )

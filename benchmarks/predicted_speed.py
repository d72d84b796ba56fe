"""Milliseconds and tokens per second that follow from plans and bandwidths: computed, not measured.

python -m benchmarks.predicted_speed                  all sizes, precisions and GPUs
python -m benchmarks.predicted_speed --only 8b int4   one of them; the others stay as they were
python -m benchmarks.predicted_speed --check fp8      engines of 8B in full depth beside the scaling

Engines of the true shapes are compiled with one and with two layers. The second layer's bytes count
once for each further layer of the model. Writes results/predicted_speed.json, and from it the
tables of docs/results/predicted-2026-11.md. Engines and graphs come from the cache where it has
them; an engine of another form is compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.build_scale import SIZES
from benchmarks.common import RESULTS, save
from benchmarks.large import calibration_for, plans_of, sparse_checkpoint
from benchmarks.predicted_page import write_tables
from trimode.compiler.options import BuildOptions
from trimode.compiler.targets import TARGETS
from trimode.formats.contract import GraphName
from trimode.formats.plans import PlanRecord
from trimode.runtime.bundle.cache_folder import usual_folder

NAME = "predicted_speed"
PAGE = Path("docs/results/predicted-2026-11.md")
GPUS = ("rtx-pro-6000", "dgx-spark", "rtx-4090")
PRECISIONS = ("bf16", "fp8", "int4")
GRAPH_NAMES: tuple[GraphName, ...] = ("ar", "draft", "verify")
CAPACITY, BLOCK = 2048, 32
PARTS = ("kernels", "weights", "keys_values", "activations", "copied")
Counts = dict[str, dict[str, dict[str, int]]]
"""Bytes and kernels by GPU, graph and part."""


def counts_of(size: str, num_layers: int | None, precision: str) -> tuple[Counts, int]:
    """What one forward moves by the engines' plans, and the bytes of all weights."""
    with sparse_checkpoint(size, num_layers) as checkpoint:
        kind: Any = "tensor" if precision == "fp8" else None
        options = BuildOptions(
            targets=GPUS,
            precision=precision,
            calibration=calibration_for(checkpoint, precision, kind),
            block_lengths=(BLOCK,),
            max_length=CAPACITY,
            num_jobs=1,
            cache=usual_folder(),
        )
        manifest, plans = plans_of(checkpoint, options)
    counts = {
        gpu: {graph_name: parts_of(records[0]) for graph_name, records in by_graph.items()}
        for gpu, by_graph in plans.items()
    }
    return counts, manifest.precisions[manifest.first_precision].weight_bytes


def parts_of(record: PlanRecord) -> dict[str, int]:
    """The first profile: one row of ``ar``, a block of the others."""
    return {part: getattr(record, part) for part in PARTS}


def scaled(one: int, two: int, num_layers: int) -> int:
    """What is the same for every depth, and a layer's part for each layer."""
    return one + (num_layers - 1) * (two - one)


def predict(size: str, precision: str) -> dict[str, Any]:
    """Every GPU's forwards of a model in full depth."""
    (one, weights_of_one), (two, weights_of_two) = (
        counts_of(size, count, precision) for count in (1, 2)
    )
    depth = SIZES[size][2]
    found = {
        gpu: {
            graph_name: with_ms(
                {
                    part: scaled(one[gpu][graph_name][part], two[gpu][graph_name][part], depth)
                    for part in PARTS
                },
                gpu,
            )
            for graph_name in GRAPH_NAMES
        }
        for gpu in GPUS
    }
    weights = scaled(weights_of_one, weights_of_two, depth)
    return {"size": size, "precision": precision, "weight_bytes": weights, "gpus": found}


def with_ms(parts: dict[str, int], gpu: str) -> dict[str, Any]:
    """The parts, their sum and what it takes at the GPU's bandwidth."""
    bandwidth = TARGETS[gpu].bandwidth_gb_s
    assert bandwidth is not None
    moved = sum(value for part, value in parts.items() if part != "kernels")
    return {**parts, "moved": moved, "computed_ms": moved / (bandwidth * 1e6)}


def check(precision: str, predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """Engines of all of 8B's layers beside the scaled figures."""
    (scaled_ones,) = (
        one for one in predictions if (one["size"], one["precision"]) == ("8b", precision)
    )
    counts, weights = counts_of("8b", None, precision)
    rows = {
        f"{gpu} {graph_name}": {
            part: {
                "full": counts[gpu][graph_name][part],
                "scaled": scaled_ones["gpus"][gpu][graph_name][part],
            }
            for part in PARTS
        }
        for gpu in GPUS
        for graph_name in GRAPH_NAMES
    }
    worst = max(
        abs(pair["full"] - pair["scaled"])
        / sum(row[part]["full"] for part in PARTS if part != "kernels")
        for row in rows.values()
        for part, pair in row.items()
        if part != "kernels"
    )
    return {
        "precision": precision,
        "weight_bytes": {"full": weights, "scaled": scaled_ones["weight_bytes"]},
        "largest_difference": worst,
        "engines": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs=2, metavar=("SIZE", "PRECISION"))
    parser.add_argument("--check", metavar="PRECISION")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    old: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    predictions, checked = old.get("predictions", []), old.get("check")
    cases = [(size, precision) for size in SIZES for precision in PRECISIONS]
    if options.only:
        cases = [tuple(options.only)]
    for size, precision in [] if options.page or options.check else cases:
        rest = [one for one in predictions if (one["size"], one["precision"]) != (size, precision)]
        predictions = sorted([*rest, predict(size, precision)], key=_order)
        record(predictions, checked)  # at once: nothing is lost where the rest is stopped
    if options.check:
        record(predictions, check(options.check, predictions))
    write_tables(json.loads(path.read_text()), PAGE)


def _order(one: dict[str, Any]) -> tuple[int, int]:
    return list(SIZES).index(one["size"]), PRECISIONS.index(one["precision"])


def record(predictions: list[dict[str, Any]], checked: dict[str, Any] | None) -> None:
    """Write what is known by now."""
    facts = {"capacity": CAPACITY, "block_length": BLOCK, "load": os.getloadavg()[0]}
    save(NAME, {**facts, "predictions": predictions, "check": checked})


if __name__ == "__main__":
    main()

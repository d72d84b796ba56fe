"""Implements ``trimode inspect --plans``: bytes that engines move in a forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from trimode.cli.cpu_plans import inspect_cpu_graphs, is_cpu
from trimode.cli.output import print_json
from trimode.cli.tables import table_console
from trimode.compiler.plans.report import (
    EnginePlan,
    carries_plans,
    causes_of,
    predict_ms,
    read_plans,
)
from trimode.errors import UsageError
from trimode.formats.manifest import Manifest, TargetRecord
from trimode.formats.plans import PlanRecord, UnreadPlan
from trimode.runtime.bundle.open import open_bundle

_COLUMNS = (
    "engine",
    "rows",
    "kernels",
    "weights",
    "keys, values",
    "activations",
    "copies",
    "scratch",
    "of floor",
    "ms",
)
_NOTE = (
    "Computed from the plans, not measured. MB that one forward of one sequence moves; keys "
    "and values over the whole capacity; "
    "ms is bytes by the GPU's bandwidth; the floor is weights, keys and values once each."
)


def inspect_plans(path: Path, target: str | None, *, as_json: bool) -> None:
    """Print what each engine and profile moves, for people or as JSON.

    Raises:
        BundleError: it is no whole bundle.
        UsageError: the bundle has no such target, or no engine that holds its plan.
    """
    manifest = open_bundle(path, verify=False).manifest
    if target is not None and any(is_cpu(one) for one in _records(manifest, target)):
        inspect_cpu_graphs(path, manifest, target, as_json=as_json)
        return
    _check_target(path, manifest, target)
    plans = read_plans(path, manifest.precisions, target)
    if as_json:
        print_json([plan.as_data() for plan in plans], indent=1)
        return
    console = table_console(140)
    console.print(_table(plans))
    for line in (*_notes(plans), _NOTE):
        console.print(line, markup=False)


def _records(manifest: Manifest, target: str) -> list[TargetRecord]:
    """The records of one target, of each precision that has it."""
    precisions = manifest.precisions.values()
    return [one.targets[target] for one in precisions if target in one.targets]


def _check_target(path: Path, manifest: Manifest, target: str | None) -> None:
    records = {
        name: record for one in manifest.precisions.values() for name, record in one.targets.items()
    }
    able = sorted(name for name, record in records.items() if carries_plans(record))
    if target is not None and target not in able:
        raise UsageError(
            f"{path}: expected a target whose engines hold their plans, found {target}",
            f"pass --target {able[0]}"
            if able
            else "build a target of TensorRT-RTX (see `trimode targets`)",
        )
    if not able:
        raise UsageError(
            f"{path}: expected engines of TensorRT-RTX, which hold their plans, found "
            f"{', '.join(records) or 'no target'}",
            "build such a target (see `trimode targets`)",
        )


def _table(plans: list[EnginePlan]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in _COLUMNS:
        table.add_column(title, no_wrap=True, justify="left" if title == _COLUMNS[0] else "right")
    for engine in plans:
        if isinstance(engine.plan, UnreadPlan):
            table.add_row(engine.name, "plan not understood")
            continue
        for record in engine.plan:
            table.add_row(*_cells(engine, record))
    return table


def _cells(engine: EnginePlan, record: PlanRecord) -> tuple[str, ...]:
    sizes = (record.weights, record.keys_values, record.activations, record.copied, record.scratch)
    predicted = predict_ms(record, engine.target)
    ms = "" if predicted is None else f"{predicted:.2f}"
    return (
        engine.name,
        str(record.rows),
        str(record.kernels),
        *(f"{size / 1e6:.1f}" for size in sizes),
        f"{record.ratio:.2f}",
        ms,
    )


def _notes(plans: list[EnginePlan]) -> Iterator[str]:
    for engine in plans:
        if isinstance(engine.plan, UnreadPlan):
            yield (
                f"{engine.name}: plan not understood: {engine.plan.reason} ({engine.plan.library})"
            )
            continue
        for record in engine.plan:
            for cause, size in causes_of(record).items():
                kernels = dict.fromkeys(
                    copy.kernel for copy in record.copies if copy.cause == cause
                )
                yield (
                    f"{engine.name}, {record.rows} rows: {cause}, {size / 1e6:.1f} MB, by "
                    f"{', '.join(kernels)}"
                )

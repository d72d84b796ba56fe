"""Prints load tests, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from trimode.cli.tables import percent, plain_table, table_console
from trimode.formats.load import LoadResult, RunRecord, SpeculationRecord
from trimode.report.load_page import COLUMNS, Results, cells, mode_name, run_name


def show(results: Results) -> None:
    """Print the tables of load tests; several are compared with the first."""
    console = table_console(200)
    console.print(_runs(results))
    for name, result in results:
        if any(run.acceptance for run in result.runs):
            console.print(_acceptance(name, result))
    if len(results) > 1:
        console.print(_ratios(results))
    for name, result in results:
        if result.check is not None and result.check.passed:
            start = f"{name}: a" if name else "A"
            console.print(
                f"{start}ll {result.check.compared} greedy answers equal those of single requests."
            )


def complaints(result: LoadResult) -> list[str]:
    """Say what is wrong with a load test, a line each."""
    return list(_complaints(result))


def _complaints(result: LoadResult) -> Iterator[str]:
    check = result.check
    if check is not None and not check.passed:
        first = check.differences[0]
        yield (
            f"{check.differing} of {check.compared} greedy answers differ from those of single "
            f"requests; the first is {first.question_id}, turn {first.turn + 1}: expected "
            f"{first.expected!r}, found {first.found!r}"
        )
    for run in result.runs:
        if run.failed and (run.partial or not run.completed):
            reason, end = next(iter(run.errors)), "; the run ended early" if run.partial else ""
            yield (
                f"{run.failed} of {run.failed + run.completed} requests failed with "
                f"{run_name(run)}, {mode_name(run)}{end}: {reason}"
            )


def _runs(results: Results) -> Table:
    names = ("",) if len(results) > 1 else ()
    table = plain_table(*names, "mode", "load", figures=tuple(one.heading for one in COLUMNS))
    for name, result in results:
        for run in result.runs:
            load = run_name(run) + (" (interrupted)" if run.partial else "")
            table.add_row(*(name for _ in names), mode_name(run), load, *cells(run))
    return table


def _acceptance(name: str, result: LoadResult) -> Table:
    """Sum acceptance over the loads of a mode.

    It does not depend on them.
    """
    title = "acceptance by category" + (f", {name}" if name else "")
    table = plain_table("mode", "category", title=title, figures=("length", "rate", "steps"))
    for mode in dict.fromkeys(mode_name(run) for run in result.runs):
        runs = [run.acceptance_by_category for run in result.runs if mode_name(run) == mode]
        for category in sorted({category for one in runs for category in one}):
            summed = SpeculationRecord.summed(one[category] for one in runs if category in one)
            assert summed is not None
            shown = (f"{summed.mean_acceptance_length:.2f}", percent(summed.draft_acceptance_rate))
            table.add_row(mode, category, *shown, str(summed.num_spec_steps))
    return table


def _ratios(results: Results) -> Table:
    """Compare runs with those of the first load test.

    Runs of the same mode and load are compared.
    """
    judged = [column for column in COLUMNS if column.is_more_better is not None]
    (first_name, first), *others = results
    table = plain_table(
        "",
        "mode",
        "load",
        title=f"times the figure of {first_name}",
        figures=tuple(column.heading for column in judged),
    )
    base = {_key(run): run for run in first.runs}
    for name, result in others:
        for run in result.runs:
            if _key(run) in base:
                row = (_ratio(run, base[_key(run)], column.field) for column in judged)
                table.add_row(name, mode_name(run), run_name(run), *row)
    return table


def _key(run: RunRecord) -> tuple[str, str]:
    return mode_name(run), run_name(run)


def _ratio(run: RunRecord, base: RunRecord, field: str) -> str:
    value, known = getattr(run, field), getattr(base, field)
    return f"{value / known:.2f}" if value is not None and known else ""

"""Prints the figures of ``trimode bench`` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from trimode.runtime.auto.timings import ForwardTime, Timings


def show(timings: Timings) -> None:
    """Print the times as a table, then the acceptance rates."""
    from trimode.cli.tables import table_console

    console, subject = table_console(), timings.subject
    console.print(
        f"{subject.source_name} in {subject.precision}, target {subject.target}, "
        f"{subject.library}, {subject.gpu or subject.cpu}"
    )
    console.print(_table(timings))
    for record in timings.acceptance:
        name = "with the drafter" if record.drafter else "without the drafter"
        console.print(
            f"{100 * record.rate:.1f}% of the drafts whose predecessors were accepted "
            f"are accepted, {name} "
            f"({record.num_prompts} prompts, {len(record.kinds)} beginnings that several share)"
        )


def _table(timings: Timings) -> Table:
    from trimode.cli.tables import plain_table

    past = sorted({one.past for one in timings.forwards})
    figures = ("sequences", "rows of each", *(f"{cached} cached" for cached in past))
    title = "milliseconds a forward: median (quartiles)"
    table = plain_table("", title=title, figures=figures)
    by_case: dict[tuple[str, int, int], dict[int, ForwardTime]] = {}
    for one in timings.forwards:
        by_case.setdefault(
            (f"{one.graph} with the drafter" if one.drafter else one.graph, one.batch, one.rows), {}
        )[one.past] = one
    for (name, batch, rows), cells in by_case.items():
        table.add_row(name, str(batch), str(rows), *(_cell(cells[cached]) for cached in past))
    return table


def _cell(one: ForwardTime) -> str:
    return f"{one.median_ms:.3f} ({one.lower_quartile_ms:.3f}-{one.upper_quartile_ms:.3f})"

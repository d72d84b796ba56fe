"""Prints the figures of ``trimode bench`` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from trimode.runtime.auto.timings import ForwardTime, Timings


def show(timings: Timings) -> None:
    """Print the times as a table, then the acceptance rates."""
    from rich.console import Console

    console, subject = Console(highlight=False), timings.subject
    if not console.is_terminal:
        console.width = 150  # in a file or a pipe, lines are not broken at 80 columns
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
    from rich.table import Table

    past = sorted({one.past for one in timings.forwards})
    table = Table(
        title="milliseconds a forward: median (quartiles)",
        title_justify="left",
        box=None,
        header_style="bold",
    )
    table.add_column("")
    table.add_column("sequences", justify="right")
    table.add_column("rows of each", justify="right")
    for cached in past:
        table.add_column(f"{cached} cached", justify="right")
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

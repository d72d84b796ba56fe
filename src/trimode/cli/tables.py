"""Prints tables and figures in the same way in every command."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_WIDTH = 150


def table_console(width: int = _WIDTH) -> Console:
    """Return the console of stdout.

    Lines in a file have up to ``width`` columns.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def plain_table(*headings: str, title: str | None = None, figures: tuple[str, ...] = ()) -> Table:
    """Return a table without lines.

    Args:
        headings: Headings of columns that are aligned on the left.
        title: Title above the table.
        figures: Headings of further columns, aligned on the right.
    """
    table = Table(*headings, title=title, title_justify="left", box=None, header_style="bold")
    for heading in figures:
        table.add_column(heading, justify="right")
    return table


def decimal(value: float | None, digits: int, missing: str = "none") -> str:
    """Format a number with so many decimals; None is ``missing``."""
    return missing if value is None else f"{value:.{digits}f}"


def percent(share: float | None, missing: str = "") -> str:
    """Format a share as a percentage; None is ``missing``."""
    return missing if share is None else f"{100 * share:.1f}%"

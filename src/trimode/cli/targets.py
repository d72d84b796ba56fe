"""Implements ``trimode targets``: lists where bundles can run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimode.cli.options.shared import Json

if TYPE_CHECKING:
    from trimode.compiler.targets import Target


def targets(*, as_json: Json = False) -> None:
    """List the targets, and those that this machine can build and run."""
    list_targets(as_json=as_json)


def list_targets(*, as_json: bool) -> None:
    """Print the table, or the same facts as JSON."""
    from rich.table import Table

    from trimode.cli.output import print_json
    from trimode.cli.tables import table_console
    from trimode.compiler.targets import TARGETS

    facts = [_facts(target) for target in TARGETS.values()]
    if as_json:
        print_json(facts, indent=1)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in (
        "target",
        "GPU",
        "compiled by",
        "precisions",
        "memory",
        "builds here",
        "runs here",
    ):
        table.add_column(title, no_wrap=True)
    reasons: list[str] = []
    for row in facts:
        memory = f"{row['memory_gb']} GB" if row["memory_gb"] else ""
        cells = (
            row["target"],
            row["compute_capability"] or "any",
            row["backend"],
            " ".join(row["precisions"]),
            memory,
        )
        table.add_row(
            *cells, _answer(row["why_not_build"], reasons), _answer(row["why_not_run"], reasons)
        )
    console = table_console(120)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"[{number}] {reason}", markup=False)
    console.print("Also known: an architecture such as sm89, and auto for the GPU of this machine.")
    console.print(_what_is_built())


def _what_is_built() -> str:
    """Say which precisions are built, and where."""
    from trimode.compiler.targets import BUILT_PRECISIONS, TARGETS

    where = {
        precision: [t.name for t in TARGETS.values() if precision in t.precisions]
        for precision in BUILT_PRECISIONS
    }
    named = "; ".join(f"{precision} for {_names(names)}" for precision, names in where.items())
    return f"This version builds {named}. What is quantized takes --calibration."


def _names(names: list[str]) -> str:
    """Name targets; if they are most of them, name the others."""
    from trimode.compiler.targets import TARGETS

    others = [name for name in TARGETS if name not in names]
    if not others:
        return "every target"
    return ", ".join(names) if len(names) <= len(others) else f"all but {', '.join(others)}"


def _facts(target: Target) -> dict[str, Any]:
    from trimode.compiler.toolchain import why_not_build, why_not_run

    return {
        "target": target.name,
        "compute_capability": target.compute_capability,
        "backend": target.backend,
        "precisions": list(target.precisions),
        "memory_gb": target.memory_gb,
        "bandwidth_gb_s": target.bandwidth_gb_s,
        "bandwidth_source": target.bandwidth_source,
        "why_not_build": why_not_build(target),
        "why_not_run": why_not_run(target),
    }


def _answer(reason: str | None, reasons: list[str]) -> str:
    """Return ``yes``, or the number of a footnote."""
    if reason is None:
        return "yes"
    if reason not in reasons:
        reasons.append(reason)
    return f"no \\[{reasons.index(reason) + 1}]"

"""Writes the page of load tests: no script, no foreign origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jinja2

from trimode.formats.load import LoadResult, RunRecord
from trimode.report.load_template import TEMPLATE
from trimode.report.pareto_figure import Line, Point, pareto_svg

Results = Sequence[tuple[str, LoadResult]]
"""Load tests with their names; names matter only if there are several."""


class Column(NamedTuple):
    """Describes a column of the table of runs.

    Attributes:
        heading: Text above it, with the unit.
        field: Field of :class:`~trimode.formats.load.RunRecord`.
        digits: Number of decimals.
        is_more_better: Whether a larger value is better; None = neither.
    """

    heading: str
    field: str
    digits: int
    is_more_better: bool | None = None


COLUMNS = (
    Column("done", "completed", 0),
    Column("failed", "failed", 0),
    Column("requests/s", "request_throughput", 2, True),
    Column("tokens/s", "output_throughput", 1, True),
    Column("per user", "output_throughput_per_user", 1, True),
    Column("TTFT ms", "median_ttft_ms", 1, False),
    Column("TTFT p99", "p99_ttft_ms", 1, False),
    Column("TPOT ms", "median_tpot_ms", 2, False),
    Column("TPOT p99", "p99_tpot_ms", 2, False),
    Column("E2EL ms", "median_e2el_ms", 0, False),
    Column("E2EL p99", "p99_e2el_ms", 0, False),
    Column("ITL ms", "median_itl_ms", 2),
    Column("tokens/chunk", "mean_tokens_per_chunk", 2),
    Column("goodput/s", "request_goodput", 2, True),
)
"""Columns of the table of runs, in order."""


def run_name(run: RunRecord) -> str:
    """Name the load of a run."""
    if run.request_rate is not None:
        shape = "" if run.burstiness in (None, 1.0) else f", burstiness {run.burstiness:g}"
        return f"{run.request_rate:g}/s{shape}"
    return f"{run.max_concurrency} {'client' if run.max_concurrency == 1 else 'clients'}"


def cells(run: RunRecord) -> list[str]:
    """Return the texts of a run's row, in the order of :data:`COLUMNS`."""
    values = (getattr(run, column.field) for column in COLUMNS)
    return [
        "" if value is None else f"{value:.{column.digits}f}"
        for column, value in zip(COLUMNS, values, strict=True)
    ]


def mode_name(run: RunRecord) -> str:
    """Name the mode of a run."""
    return run.mode or "server's mode"


def load_page(results: Results) -> str:
    """Return the page as HTML.

    Args:
        results: At least one load test.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {
        "cells": cells,
        "facts": facts,
        "run_name": run_name,
        "mode_name": mode_name,
    }
    environment.filters["mib"] = lambda size: f"{size / 2**20:.1f} MiB"
    return environment.from_string(TEMPLATE).render(
        results=results, columns=COLUMNS, figure=pareto_svg(_lines(results))
    )


def _lines(results: Results) -> list[Line]:
    points: dict[str, list[Point]] = {}
    for name, result in results:
        for run in result.runs:
            if run.completed and run.output_throughput_per_user is not None:
                line = mode_name(run) if len(results) == 1 else f"{name}: {mode_name(run)}"
                points.setdefault(line, []).append(_point(run))
    return [Line(name, some) for name, some in points.items()]


def _point(run: RunRecord) -> Point:
    label = str(run.max_concurrency) if run.request_rate is None else run_name(run)
    return Point(run.output_throughput_per_user or 0.0, run.output_throughput, label)


def facts(result: LoadResult) -> Mapping[str, str]:
    """Return what a reader must know of a load test, by name."""
    work, server = result.workload, result.server
    length = (
        f"{work.duration_s:g} s" if work.duration_s is not None else f"{work.num_prompts} prompts"
    )
    found = {
        "server": server.url,
        "model": server.model,
        "bundle": server.bundle_sha256 or "",
        "version": ", ".join(f"{name} {value}" for name, value in server.version.items()),
        "data": f"{work.data}: {work.num_questions} conversations, {work.num_turns} turns",
        "shared prefix": f"{work.shared_prefix} tokens or words" if work.shared_prefix else "",
        "each run": f"{length} after {work.warmup_s:g} s of warm-up, seed {work.seed}",
        "answers": f"at most {work.max_tokens} tokens, temperature {work.temperature:g}",
        "limits": ", ".join(f"{name} {limit:g} ms" for name, limit in work.goodput_ms.items()),
        "client": ", ".join(f"{name} {value}" for name, value in result.machine.items()),
        "measured": f"{result.date}, trimode {result.trimode_version}",
        "command": result.command,
    }
    return {name: value for name, value in found.items() if value}

"""Prints what ``trimode verify`` found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from trimode.cli.tables import plain_table, table_console
from trimode.formats.verification import (
    GraphParity,
    OutputRecord,
    SamplerParity,
    TokenParity,
    Verification,
)

_GRAPH_HEADINGS = (
    "graph",
    "of",
    "in cache",
    "rows",
    "drafter",
    "output",
    "max error",
    "allowed",
    "mean error",
    "allowed",
    "same id",
    "",
)
_TOKEN_HEADINGS = (
    "mode",
    "drafter",
    "against",
    "prompt",
    "same tokens",
    "parts at",
    "preferred by",
    "allowed",
    "nfe",
    "other nfe",
    "",
)
_NO_NUMBER = "no number"
"""Stands for a figure that there is none of; :data:`_WHY` tells the reader why."""
_WHY = (
    "no number: a graph returned NaN or infinity, or an output of another shape, "
    "so there is no figure to compare"
)


def show_verification(verification: Verification, checkpoint: Path) -> None:
    """Print the figures as two tables, and what they come to."""
    console = table_console()
    console.print(_subject(verification, checkpoint))
    for line in _quantized_lines(verification):
        console.print(line)
    console.print(_graph_table(verification.graphs))
    console.print(_token_table(verification.tokens))
    if verification.sampler is not None:
        console.print(_sampler_line(verification.sampler))
    if _lacks_figures(verification):
        console.print(_WHY)
    for note in verification.notes:
        console.print(f"note: {note}")
    console.print(_summary(verification))


def _lacks_figures(found: Verification) -> bool:
    """Whether a table or line says that there is no number."""
    outputs = (output for record in found.graphs for output in record.outputs)
    return (
        any(output.max_error is None for output in outputs)
        or any(_preference(record) == _NO_NUMBER for record in found.tokens)
        or (found.sampler is not None and found.sampler.max_error is None)
    )


def _subject(found: Verification, checkpoint: Path) -> str:
    source = "the bundle's source" if found.checkpoint.is_source else "NOT the bundle's source"
    where = f"{found.precision} on {found.target} ({found.backend}, {found.compute_dtype})"
    return f"{where} against {checkpoint}, {source}"


def _sampler_line(sampler: SamplerParity) -> str:
    figures = (
        f"{sampler.num_scores} scores, largest error {_figure(sampler.max_error)}, "
        f"allowed {_figure(sampler.tolerance)}"
    )
    return f"learned sampler against {sampler.name}: {figures}  {_word(sampler.passed)}"


def _summary(found: Verification) -> str:
    records = (*found.graphs, *found.tokens, found.weights, found.scales, found.sampler)
    num_failed = sum(not record.passed for record in records if record is not None)
    return (
        f"{'passed' if found.passed else 'FAILED'}: {len(found.graphs)} graph comparisons and "
        f"{len(found.tokens)} generations, {num_failed} failed"
    )


def _quantized_lines(verification: Verification) -> Iterator[str]:
    """Yield lines on quantized weights, their scales and quantized inputs."""
    weights, scales = verification.weights, verification.scales
    if weights is not None:
        differing = "".join(
            f"; {count} differ in {layer}" for layer, count in weights.differs.items()
        )
        yield (
            f"quantized weights: {weights.num_compared} numbers in {weights.num_layers} "
            f"layers, bit for bit{differing}  {_word(weights.passed)}"
        )
    if scales is not None:
        differing = "".join(f"; {name} differs" for name in scales.differs)
        yield (
            f"scales against {scales.calibration}: {scales.num_layers} layers{differing}  "
            f"{_word(scales.passed)}"
        )
    codes = [record.codes for record in verification.graphs if record.codes is not None]
    if codes:
        refused = {
            layer: sum(record.refused.get(layer, 0) for record in codes)
            for record in codes
            for layer in record.refused
        }
        unexplained = "".join(
            f"; {count} unexplained in {layer}" for layer, count in refused.items()
        )
        counts = (
            f"{sum(record.num_compared for record in codes)}, "
            f"{sum(record.num_other for record in codes)} on the other side of a border"
        )
        yield (
            f"quantized inputs of the portable graphs: {counts}{unexplained}  {_word(not refused)}"
        )


def _graph_table(records: Sequence[GraphParity]) -> Table:
    """Make a table with a line an output; portable graphs are marked."""
    table = plain_table(*_GRAPH_HEADINGS, title="graphs against the torch trunk")
    for record in records:
        for index, output in enumerate(record.outputs):
            table.add_row(*_graph_row(record, output, is_first=index == 0))
    return table


def _graph_row(record: GraphParity, output: OutputRecord, *, is_first: bool) -> Iterator[str]:
    """Return the cells of one output.

    The first line of a comparison speaks for its ids too.
    """
    same = " ".join(f"{ids.num_equal}/{ids.num_compared}" for ids in record.ids)
    yield record.graph
    yield record.subject
    yield ",".join(map(str, record.positions))
    yield str(record.rows)
    yield _switch(record.use_drafter)
    yield output.name
    yield from map(
        _figure, (output.max_error, output.tolerance, output.mean_error, output.mean_tolerance)
    )
    yield same if is_first else ""
    yield _word(output.passed and (not is_first or _ids_passed(record)))


def _token_table(records: Sequence[TokenParity]) -> Table:
    table = plain_table(*_TOKEN_HEADINGS, title="tokens")
    for record in records:
        table.add_row(
            record.mode.replace("_", "-"),
            _switch(record.use_drafter),
            record.against,
            f"{record.prompt_length} tokens",
            f"{record.num_equal}/{record.num_tokens}",
            "" if record.first_divergence is None else str(record.first_divergence),
            _preference(record),
            "" if record.tolerance is None else _figure(record.tolerance),
            str(record.nfe),
            str(record.other_nfe),
            _word(record.passed),
        )
    return table


def _preference(record: TokenParity) -> str:
    """Say how much the reference prefers its token; blank without difference."""
    return "" if record.first_divergence is None else _figure(record.preference)


def _ids_passed(record: GraphParity) -> bool:
    return (
        all(ids.passed for ids in record.ids)
        and record.has_accepted_length is not False
        and (record.codes is None or record.codes.passed)
    )


def _switch(use_drafter: bool | None) -> str:
    return "" if use_drafter is None else "on" if use_drafter else "off"


def _figure(value: float | None) -> str:
    return _NO_NUMBER if value is None else f"{value:.2g}"


def _word(passed: bool) -> str:
    return "ok" if passed else "[bold red]FAILED[/bold red]"

"""Draws ``report.png`` from a quantization report."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trimode.errors import DependencyError
from trimode.formats.contract import GRAPH_NAMES, GraphName
from trimode.formats.evaluation import DecodingRecord, MeasuredPrecision, Report, decoding_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = 10
_GROUP = 0.8
"""Width of a group of bars, of the room that it has."""


def load_matplotlib() -> ModuleType:
    """Import ``matplotlib.figure``, without pyplot.

    So no window system and no state is involved.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise DependencyError(
            "expected matplotlib for the picture, found not installed",
            "pip install 'trimode[calib]', or leave out the figure",
        ) from error


def draw(report: Report, path: Path) -> None:
    """Draw errors by graph, divergence, right answers and speed.

    Args:
        report: Measurements to draw.
        path: PNG file to write.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    figure = load_matplotlib().Figure(figsize=(15, 11), layout="constrained")
    figure.suptitle(
        f"{report.source_name}: {report.data.num_questions} questions, {report.source_sha256[:12]}"
    )
    axes = figure.subplots(3, 3)
    quantized = report.precisions[1:]
    for column, graph_name in enumerate(GRAPH_NAMES):
        if graph_name not in report.data.num_rows:
            axes[0, column].set_axis_off()
            axes[1, column].set_axis_off()
            continue
        _local(axes[0, column], quantized, graph_name)
        _accumulated(axes[1, column], quantized, graph_name)
    _divergence(axes[2, 0], report)
    _bars(axes[2, 1], _match_title(report), _decodings(report, _match))
    _bars(axes[2, 2], "tokens per forward", _decodings(report, lambda one: one.tokens_per_forward))
    axes[0, 0].legend(fontsize="small")
    axes[2, 2].legend(fontsize="small")
    figure.savefig(path, format="png", dpi=100)


def _local(axes: Axes, precisions: tuple[MeasuredPrecision, ...], graph_name: GraphName) -> None:
    """Draw a line per precision over its layers, sorted by error.

    The JSON names the layers.
    """
    axes.set(
        title=f"{graph_name}: error of each layer alone",
        xlabel="layers, worst first",
        ylabel="SNR, dB",
    )
    for number, precision in enumerate(precisions, 1):
        values = sorted(
            by_graph[graph_name].snr_db
            for by_graph in precision.local.values()
            if graph_name in by_graph
        )
        axes.plot(
            range(1, len(values) + 1), values, **_line(number), marker=".", label=precision.name
        )
    axes.grid(visible=True, alpha=0.3)


def _accumulated(
    axes: Axes, precisions: tuple[MeasuredPrecision, ...], graph_name: GraphName
) -> None:
    axes.set(
        title=f"{graph_name}: error after each decoder block",
        xlabel="decoder block",
        ylabel="SNR, dB",
    )
    for number, precision in enumerate(precisions, 1):
        points = [
            (index, by_graph[graph_name].snr_db)
            for index, by_graph in enumerate(precision.accumulated)
            if graph_name in by_graph
        ]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            **_line(number),
            marker=".",
            label=precision.name,
        )
    axes.grid(visible=True, alpha=0.3)


def _line(number: int) -> dict[str, Any]:
    """Return a line's style; from the eleventh on, lines are dashed."""
    return {"color": f"C{number}", "linestyle": "-" if number < _COLOURS else "--"}


def _bar(number: int) -> dict[str, Any]:
    return {"color": f"C{number}", "hatch": None if number < _COLOURS else "//"}


def _divergence(axes: Axes, report: Report) -> None:
    values: dict[str, dict[str, float]] = {
        precision.name: {graph_name: one.kl_nats for graph_name, one in precision.outputs.items()}
        for precision in report.precisions[1:]
    }
    _bars(axes, "divergence of the probabilities, nats a row", values, first_colour=1)
    if all(value > 0 for by_graph in values.values() for value in by_graph.values()):
        axes.set_yscale("log")


def _decodings(
    report: Report, figure_of: Callable[[DecodingRecord], float]
) -> dict[str, dict[str, float]]:
    return {
        precision.name: {decoding_name(one): figure_of(one) for one in precision.decoding}
        for precision in report.precisions
    }


def _match_title(report: Report) -> str:
    return "answered exactly right" if report.data.num_answers else "answered with float32's tokens"


def _match(one: DecodingRecord) -> float:
    return one.same_tokens if one.exact_match is None else one.exact_match


def _bars(
    axes: Axes, title: str, values: Mapping[str, Mapping[str, float]], first_colour: int = 0
) -> None:
    """Draw groups of bars; ``values`` are by precision, then by group."""
    groups = list(next(iter(values.values())))
    width = _GROUP / len(values)
    for number, (name, by_group) in enumerate(values.items()):
        left = [index - _GROUP / 2 + (number + 0.5) * width for index in range(len(groups))]
        axes.bar(
            left,
            [by_group[group] for group in groups],
            width,
            **_bar(number + first_colour),
            label=name,
        )
    axes.set_xticks(range(len(groups)), [group.replace(", ", ",\n") for group in groups])
    axes.set_title(title)

"""Draws ``speed_of_light.png``: reached speed beside the best possible."""

from __future__ import annotations

from pathlib import Path

from trimode.formats.speed_of_light import LightReport, WayRecord
from trimode.report.quantization_figure import load_matplotlib

_COLOURS = {"serial denoising": "C0", "ar": "C1"}


def draw(report: LightReport, path: Path) -> None:
    """Draw tokens per forward of every way.

    For diffusion they are drawn against the share of texts equal to the serial one.

    Args:
        report: Measurements to draw.
        path: PNG file to write.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    figure = load_matplotlib().Figure(figsize=(14, 5.5), layout="constrained")
    figure.suptitle(
        f"{report.source_name}, block length {report.block_length}: {report.num_prompts} prompts"
    )
    bars, points = figure.subplots(1, 2)
    ways = report.ways[::-1]
    bars.barh(
        [way.name for way in ways],
        [way.tokens_per_forward for way in ways],
        color=[_COLOURS[way.target] for way in ways],
    )
    for row, way in enumerate(ways):
        bars.text(way.tokens_per_forward, row, f" {way.tokens_per_forward:.2f}", va="center")
    bars.set(title="serial text (blue), AR's text (orange)", xlabel="tokens per forward")
    bars.margins(x=0.12)
    for way in (way for way in report.ways if way.target == "serial denoising"):
        points.scatter(way.tokens_per_forward, 100 * way.same_as_target, label=_legend(way))
    points.set(
        title="diffusion: speed, and whether the serial text came out",
        xlabel="tokens per forward",
        ylabel="prompts with the serial text, %",
    )
    points.grid(visible=True, alpha=0.3)
    points.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=100)


def _legend(way: WayRecord) -> str:
    return way.name.removeprefix("diffusion, ")

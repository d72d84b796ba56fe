"""``trimode bench --speed-of-light``: the fewest forwards that reproduce the serial text, and what
the modes take.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import trimode
from trimode.calib.evaluate.speed_of_light.measure import (
    DEFAULT_THRESHOLDS,
    LightSettings,
    measure_light,
)
from trimode.cli.console import RichProgress
from trimode.cli.output import command_line, print_json
from trimode.errors import UsageError
from trimode.formats.files import check_apart, check_replaceable, sha256_of, staged_replacement
from trimode.formats.speed_of_light import REPORT, LightReport, WayRecord
from trimode.report.quantization_figure import load_matplotlib
from trimode.runtime.model import TriModeModel
from trimode.runtime.text.prompts import USUAL_STYLE, PromptStyle, encode_prompts, read_prompts_file

PICTURE = "speed_of_light.png"


@dataclass(frozen=True)
class LightRequest:
    """The options of the command, as given."""

    precision: str | None
    target: str | None
    prompts_file: Path | None
    block_length: int | None
    thresholds: str | None
    max_new_tokens: int | None
    threads: int | None
    runtime_cache: Path | None
    output: Path | None
    draws: bool
    as_json: bool
    style: PromptStyle = USUAL_STYLE


def run_light(bundle: Path, request: LightRequest) -> None:
    """Measure, write the folder if one was named, print a table or JSON. Errors are raised before
    anything is written.
    """
    if request.prompts_file is None:
        raise UsageError(
            "expected --prompts-file together with --speed-of-light, found none",
            "name a file of prompts, one JSON object a line",
        )
    if request.output is not None:
        check_replaceable(request.output, REPORT, "a report")
        check_apart(request.output, None, request.prompts_file)
        if request.draws:
            load_matplotlib()  # it takes minutes to need it, and no time to miss it
    settings = LightSettings(
        request.block_length,
        parse_probabilities(request.thresholds),
        request.max_new_tokens or LightSettings.max_new_tokens,
    )
    request.style.check()
    questions = read_prompts_file(request.prompts_file, request.style)
    with TriModeModel.from_pretrained(
        bundle,
        precision=request.precision,
        target=request.target,
        num_threads=request.threads,
        runtime_cache=request.runtime_cache,
    ) as model:
        # A prompt that the model does not take shows before minutes of measuring.
        prompts = encode_prompts(request.prompts_file, questions, lambda: model.codec, model.model)
        with RichProgress() as progress:
            ways = measure_light(
                model, prompts, settings, progress.stage("answer prompts", len(prompts))
            )
        source = model.bundle.manifest.source
        report = LightReport(
            trimode_version=trimode.__version__,
            command=command_line(),
            source_name=source.name,
            source_sha256=source.sha256,
            precision=model.bundle.precision,
            runs_on=model.target,
            prompts_sha256=sha256_of(request.prompts_file),
            num_prompts=len(prompts),
            block_length=settings.block_length or model.model.block_size,
            max_new_tokens=settings.max_new_tokens,
            ways=ways,
        )
    if request.output is not None:
        _save(report, request.output, draws=request.draws)
        sys.stderr.write(f"wrote {request.output}\n")
    if request.as_json:
        print_json(report, indent=1)
    else:
        _show(report)


def parse_probabilities(text: str | None) -> tuple[float, ...]:
    """``"0.5,0.9"`` -> ``(0.5, 0.9)``; the usual thresholds for None. Whether they are
    probabilities is checked with the other options.
    """
    if text is None:
        return DEFAULT_THRESHOLDS
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(
            f"expected probabilities like 0.5,0.9, found {text!r}", "separate them by commas"
        ) from error


def _save(report: LightReport, output: Path, *, draws: bool) -> None:
    with staged_replacement(output, REPORT) as staged:
        (staged / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if draws:
            from trimode.report.speed_of_light_figure import draw

            draw(report, staged / PICTURE)


def _show(report: LightReport) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150  # in a file or a pipe, lines are not broken at 80 columns
    console.print(
        f"{report.source_name} in {report.precision} on {report.runs_on}: {report.num_prompts} prompts, block length "
        f"{report.block_length}, at most {report.max_new_tokens} new tokens"
    )
    table = Table(
        title="a step is a denoise forward, a cycle of draft and verification, or a token of AR",
        title_justify="left",
        box=None,
        header_style="bold",
    )
    for heading in ("", "to reproduce"):
        table.add_column(heading)
    for heading in (
        "tokens per forward",
        "tokens per step",
        "prompts that it does",
        "searches cut short",
    ):
        table.add_column(heading, justify="right")
    for way in report.ways:
        table.add_row(*_cells(way))
    console.print(table)


def _cells(way: WayRecord) -> tuple[str, ...]:
    exhausted = "" if way.num_exhausted is None else str(way.num_exhausted)
    return (
        way.name,
        way.target,
        f"{way.tokens_per_forward:.2f}",
        f"{way.tokens_per_step:.2f}",
        f"{100 * way.same_as_target:.1f}%",
        exhausted,
    )

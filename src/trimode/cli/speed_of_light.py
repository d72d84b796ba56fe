"""Implements ``trimode bench --speed-of-light``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trimode
from trimode.calib.evaluate.speed_of_light.measure import (
    DEFAULT_THRESHOLDS,
    LightSettings,
    measure_light,
)
from trimode.cli.console import RichProgress
from trimode.cli.output import command_line, print_json
from trimode.cli.prompt_options import PromptsFile
from trimode.cli.tables import percent, plain_table, table_console
from trimode.errors import UsageError
from trimode.formats.files import check_apart, check_replaceable, sha256_of, staged_replacement
from trimode.formats.speed_of_light import REPORT, LightReport, WayRecord
from trimode.report.quantization_figure import load_matplotlib
from trimode.runtime.model import TriModeModel
from trimode.runtime.text.prompts import encode_prompts, read_prompts_file

PICTURE = "speed_of_light.png"


def light_settings(
    *, block_length: int | None, thresholds: str | None, max_new_tokens: int | None
) -> LightSettings:
    """Parse the options; values are checked with the model later."""
    return LightSettings(
        block_length=block_length,
        thresholds=parse_probabilities(thresholds),
        max_new_tokens=max_new_tokens or LightSettings.max_new_tokens,
    )


def run_light(
    bundle: Path,
    options: Mapping[str, Any],
    settings: LightSettings,
    *,
    questions: PromptsFile,
    output: Path | None,
    draws: bool,
    as_json: bool,
) -> None:
    """Measure, write any folder named, and print a table or JSON.

    Args:
        bundle: Folder of the bundle.
        options: Keywords for :meth:`trimode.runtime.model.TriModeModel.from_pretrained`.
        settings: Blocks and thresholds to try.
        questions: Prompts to answer; a file is required.
        output: Folder to write, if any.
        draws: Whether a figure is written too.
        as_json: Whether the report is printed as JSON.

    Raises:
        UsageError: an option, the output or a prompt cannot be used; nothing is written.
        BundleError: the bundle is missing or damaged.
    """
    file = _checked_prompts(questions.file, output, draws=draws)
    questions.style.check()
    lines = read_prompts_file(file, questions.style)
    with TriModeModel.from_pretrained(bundle, **options) as model:
        # A prompt that the model does not take shows before minutes of measuring.
        prompts = encode_prompts(file, lines, lambda: model.codec, model.model)
        report = _measure(model, prompts, sha256_of(file), settings)
    if output is not None:
        _save(report, output, draws=draws)
        sys.stderr.write(f"wrote {output}\n")
    if as_json:
        print_json(report, indent=1)
    else:
        _show(report)


def _checked_prompts(file: Path | None, output: Path | None, *, draws: bool) -> Path:
    """Return the file of prompts, once it and the output are fit."""
    if file is None:
        raise UsageError(
            "expected --prompts-file together with --speed-of-light, found none",
            "name a file of prompts, one JSON object a line",
        )
    if output is not None:
        check_replaceable(output, REPORT, "a report")
        check_apart(output, None, file)
        if draws:
            load_matplotlib()  # it takes minutes to need it, and no time to miss it
    return file


def _measure(
    model: TriModeModel, prompts: list[list[int]], sha256: str, settings: LightSettings
) -> LightReport:
    with RichProgress() as progress:
        advance = progress.stage("answer prompts", len(prompts))
        ways = measure_light(model, prompts, settings, advance)
    source = model.bundle.manifest.source
    return LightReport(
        trimode_version=trimode.__version__,
        command=command_line(),
        source_name=source.name,
        source_sha256=source.sha256,
        precision=model.bundle.precision,
        runs_on=model.target,
        prompts_sha256=sha256,
        num_prompts=len(prompts),
        block_length=settings.block_length or model.model.block_size,
        max_new_tokens=settings.max_new_tokens,
        ways=ways,
    )


def parse_probabilities(text: str | None) -> tuple[float, ...]:
    """Parse ``"0.5,0.9"`` into ``(0.5, 0.9)``; None means the usual thresholds.

    The settings check later that they are probabilities.
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
    console = table_console()
    console.print(
        f"{report.source_name} in {report.precision} on {report.runs_on}: "
        f"{report.num_prompts} prompts, block length "
        f"{report.block_length}, at most {report.max_new_tokens} new tokens"
    )
    speeds = ("tokens per forward", "tokens per step")
    table = plain_table(
        "",
        "to reproduce",
        title="a step is a denoise forward, a cycle of draft and verification, or a token of AR",
        figures=(*speeds, "prompts that it does", "searches cut short"),
    )
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
        percent(way.same_as_target),
        exhausted,
    )

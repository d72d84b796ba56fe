"""Implements ``trimode bench forwards``; mode ``auto`` reads its timings."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trimode
from trimode.cli.bench_output import show
from trimode.cli.flags import BENCH_FLAGS, flags_in_errors
from trimode.cli.options import bench as options
from trimode.cli.options.shared import (
    BundlePath,
    Json,
    NoFigure,
    Raw,
    RunPrecision,
    RunTarget,
    RuntimeCache,
    System,
    Thinking,
    Threads,
)
from trimode.cli.parse import given, need, parse_optional_ints
from trimode.cli.prompt_options import PromptsFile, prompt_style
from trimode.errors import UsageError

if TYPE_CHECKING:
    from trimode.cli.console import RichProgress
    from trimode.runtime.auto.timings import AcceptanceRecord, Timings
    from trimode.runtime.measure.forwards import TimerSettings
    from trimode.runtime.model import TriModeModel


def forwards(
    bundle: BundlePath,
    *,
    precision: RunPrecision = None,
    target: RunTarget = None,
    rows: options.Rows = None,
    past: options.Past = None,
    batch: options.Batch = None,
    repeats: options.Repeats = None,
    prompts_file: options.PromptsFile = None,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    speed_of_light: options.SpeedOfLight = False,
    block_length: options.BlockLength = None,
    thresholds: options.Thresholds = None,
    max_new_tokens: options.MaxNewTokens = None,
    no_figure: NoFigure = False,
    threads: Threads = None,
    runtime_cache: RuntimeCache = None,
    output: options.Output = None,
    as_json: Json = False,
) -> None:
    """Measure milliseconds per forward on this machine.

    `run --mode auto` uses the timings.
    """
    timer: dict[str, Any] = {"rows": rows, "past": past, "batch": batch, "repeats": repeats}
    counter: dict[str, Any] = {"block_length": block_length, "thresholds": thresholds}
    counter["max_new_tokens"] = max_new_tokens
    _check_options(timer, {**counter, "no_figure": no_figure or None}, counts=speed_of_light)
    machine = {"num_threads": threads, "runtime_cache": runtime_cache}
    model = {"precision": precision, "target": target, **machine}
    questions = PromptsFile(prompts_file, prompt_style(raw, system, enable_thinking))
    if not speed_of_light:
        settings = timer_settings(**timer)
        run_bench(bundle, model, settings, questions=questions, output=output, as_json=as_json)
        return
    from trimode.cli.speed_of_light import light_settings, run_light

    draws = not no_figure
    if output is not None and draws:
        need("the picture (--no-figure leaves it out)", "calib", "matplotlib")
    run_light(
        bundle,
        model,
        light_settings(**counter),
        questions=questions,
        output=output,
        draws=draws,
        as_json=as_json,
    )


def _check_options(timer: dict[str, Any], counter: dict[str, Any], *, counts: bool) -> None:
    """Refuse options of the measurement that was not asked for."""
    misplaced = list(given(**(timer if counts else counter)))
    if misplaced:
        name = "--" + misplaced[0].replace("_", "-")
        expected, found = ("without", "with") if counts else ("together with", "alone")
        raise UsageError(
            f"expected {name} {expected} --speed-of-light, found it {found}",
            "time and forwards are measured by separate commands",
        )


def timer_settings(
    *, rows: str | None, past: str | None, batch: str | None, repeats: int | None
) -> TimerSettings:
    """Parse the timer's options; values are checked against the model later."""
    from trimode.runtime.measure.forwards import TimerSettings

    return TimerSettings(
        rows=parse_optional_ints(rows),
        past=parse_optional_ints(past),
        batch=parse_optional_ints(batch) or (1,),
        repeats=repeats,
    )


def run_bench(
    bundle: Path,
    options: Mapping[str, Any],
    settings: TimerSettings,
    *,
    questions: PromptsFile,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure, keep the table for mode ``auto``, and print it.

    Args:
        bundle: Folder of the bundle.
        options: Keywords for :meth:`trimode.runtime.model.TriModeModel.from_pretrained`.
        settings: Forwards to time.
        questions: Prompts to measure acceptance with, if any.
        output: File to write besides the one that mode ``auto`` reads.
        as_json: Whether the table is printed as JSON.

    Raises:
        UsageError: an option or a prompt does not suit the model.
        BundleError: the bundle is missing or damaged.
    """
    from trimode.cli.output import print_json
    from trimode.cli.prompt_options import check_prompt_options
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.text.prompts import encode_prompts, read_prompts_file

    if output is not None:
        _check_output(output)
    check_prompt_options(questions.file, questions.style)
    prompts = read_prompts_file(questions.file, questions.style) if questions.file else []
    with (
        flags_in_errors(BENCH_FLAGS),
        TriModeModel.from_pretrained(bundle, **options) as model,
    ):
        # A prompt that the model does not take shows before minutes of measuring.
        encoded = encode_prompts(
            questions.file or Path(), prompts, lambda: model.codec, model.model
        )
        timings = _measure(model, encoded, settings, options["num_threads"])
    _keep(timings, output)
    if as_json:
        print_json(timings, indent=1)
    else:
        show(timings)


def _check_output(output: Path) -> None:
    """Refuse an output that cannot be a file here."""
    from trimode.formats.files import check_file_place

    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UsageError(
            f"{output}: expected a file to write, in a folder that exists, found neither",
            "name a file such as timings.json",
        )
    check_file_place(output)


def _measure(
    model: TriModeModel,
    prompts: list[list[int]],
    settings: TimerSettings,
    num_threads: int | None,
) -> Timings:
    """Time the forwards, then measure acceptance over the prompts."""
    from trimode.cli.console import RichProgress
    from trimode.cli.output import command_line
    from trimode.runtime.auto.timings import Timings, subject_of
    from trimode.runtime.measure.forwards import USUAL_REPEATS, check_settings, time_forwards

    settings = check_settings(settings, model.model, model.session)
    subject = subject_of(model.bundle, model.target, num_threads)
    with RichProgress() as progress:
        advance = progress.stage("time forwards", settings.repeats or USUAL_REPEATS)
        forwards = time_forwards(model.session, model.model, settings, advance)
        acceptance = _acceptance(model, prompts, settings, progress)
    return Timings(
        trimode_version=trimode.__version__,
        command=command_line(),
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        subject=subject,
        forwards=forwards,
        acceptance=acceptance,
    )


def _acceptance(
    model: TriModeModel, prompts: list[list[int]], settings: TimerSettings, progress: RichProgress
) -> tuple[AcceptanceRecord, ...]:
    """Measure drafts of the longest timed block, with and without drafter.

    Returns:
        Nothing if there are no prompts or no blocks.
    """
    from trimode.runtime.auto.timings import AcceptanceRecord
    from trimode.runtime.measure.acceptance import write_texts

    length = max(settings.rows or (1,))
    if not prompts or length == 1:
        return ()
    records, drafters = [], (False, True) if model.model.has_drafter else (False,)
    advance = progress.stage("answer prompts", len(drafters) * len(prompts))
    for drafter in drafters:
        texts = []
        for text in write_texts(model, prompts, length, use_drafter=drafter):
            texts.append(text)
            advance(1)
        records.append(AcceptanceRecord.of(texts, length, drafter=drafter))
    return tuple(record for record in records if record is not None)


def _keep(timings: Timings, output: Path | None) -> None:
    """Write the table to the cache and to ``output``.

    If the cache cannot be written, the figures are still printed.
    """
    from trimode.formats.texts import reason_of
    from trimode.runtime.auto.timings import save_timings, table_path

    if output is not None:
        try:
            save_timings(timings, output)
        except OSError as error:
            raise UsageError(
                f"{output}: expected a file that can be written, found: {reason_of(error)}",
                "choose another place",
            ) from error
        sys.stderr.write(f"wrote {output}\n")
    try:
        path = table_path(timings.subject)
        save_timings(timings, path)
    except OSError as error:
        sys.stderr.write(
            f"warning: the table cannot be kept for mode auto: {reason_of(error)}; "
            "pass it with --timings\n"
        )
    else:
        sys.stderr.write(f"wrote {path}, where mode auto looks for it\n")

"""``trimode bench``: milliseconds of each forward on this machine, kept where mode ``auto`` looks
for them.
"""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import trimode
from trimode.cli.options import BundlePath, Json, Raw, RunPrecision, System, Thinking, usual_style
from trimode.cli.parse import need, parse_optional_ints
from trimode.errors import UsageError

if TYPE_CHECKING:
    from trimode.cli.console import RichProgress
    from trimode.runtime.auto.timings import AcceptanceRecord, ForwardTime, Timings
    from trimode.runtime.measure.forwards import TimerSettings
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.text.prompts import PromptStyle


def bench(
    bundle: BundlePath,
    precision: RunPrecision = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of the precision's targets, or portable; what fits if left out.",
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Tokens of a forward; 1,4,8,12,16,24,32 or the model's block if left out.",
        ),
    ] = None,
    past: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Tokens cached before it; 64, 512 and 2048 if left out."
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Sequences in a forward; single ones if left out."),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Rounds; 20, or what fits into two minutes, if left out.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with `prompt`, `messages` or `token_ids`: what becomes of their drafts is measured too, by how prompts begin."
        ),
    ] = None,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    speed_of_light: Annotated[
        bool,
        typer.Option(
            "--speed-of-light",
            help="Measure not time but forwards, over the prompts: the fewest, and what each mode takes.",
        ),
    ] = False,
    block_length: Annotated[
        int | None, typer.Option(help="With --speed-of-light; the model's if left out.")
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="P,P,...", help="With --speed-of-light; 0.5,0.7,0.9,0.95 if left out."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="With --speed-of-light, of each answer; 128 if left out.")
    ] = None,
    no_figure: Annotated[
        bool, typer.Option("--no-figure", help="Leave out the picture, which takes matplotlib.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="Threads inside one operator; every core if left out.")
    ] = None,
    runtime_cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where what is made for this machine is kept."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PLACE",
            help="Write the table to this file too; with --speed-of-light, a folder.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the milliseconds of each forward on this machine, and keep them for `run --mode
    auto`.
    """
    from trimode.runtime.text.prompts import PromptStyle

    timer = {"--rows": rows, "--past": past, "--batch": batch, "--repeats": repeats}
    light = {
        "--block-length": block_length,
        "--thresholds": thresholds,
        "--max-new-tokens": max_new_tokens,
        "--no-figure": no_figure or None,
    }
    misplaced = [
        name for name, value in (timer if speed_of_light else light).items() if value is not None
    ]
    if misplaced:
        found = f"expected {misplaced[0]} {'without' if speed_of_light else 'together with'} --speed-of-light"
        raise UsageError(
            f"{found}, found it {'with' if speed_of_light else 'alone'}",
            "time and forwards are measured by separate commands",
        )
    style = PromptStyle(raw, system, enable_thinking)
    if speed_of_light:
        from trimode.cli.speed_of_light import LightRequest, run_light

        if output is not None and not no_figure:
            need("the picture (--no-figure leaves it out)", "calib", "matplotlib")
        light_request = LightRequest(
            precision,
            target,
            prompts_file,
            block_length,
            thresholds,
            max_new_tokens,
            threads,
            runtime_cache,
            output,
            not no_figure,
            as_json,
            style,
        )
        run_light(bundle, light_request)
        return
    request = BenchRequest(
        precision,
        target,
        parse_optional_ints(rows),
        parse_optional_ints(past),
        parse_optional_ints(batch),
        repeats,
        threads,
        runtime_cache,
        prompts_file,
        output,
        as_json,
        style,
    )
    run_bench(bundle, request)


@dataclass(frozen=True)
class BenchRequest:
    """The options of the command, as given."""

    precision: str | None
    target: str | None
    rows: tuple[int, ...] | None
    past: tuple[int, ...] | None
    batch: tuple[int, ...] | None
    repeats: int | None
    threads: int | None
    runtime_cache: Path | None
    prompts_file: Path | None
    output: Path | None
    as_json: bool
    style: PromptStyle = field(default_factory=usual_style)


def run_bench(bundle: Path, request: BenchRequest) -> None:
    """Measure, keep the table, print it; see the command's help."""
    from trimode.cli.console import RichProgress
    from trimode.cli.output import command_line, print_json
    from trimode.cli.prompt_options import check_prompt_options
    from trimode.formats.files import check_file_place
    from trimode.runtime.auto.timings import Timings, subject_of
    from trimode.runtime.measure.forwards import (
        USUAL_REPEATS,
        TimerSettings,
        check_settings,
        time_forwards,
    )
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.text.prompts import encode_prompts, read_prompts_file

    if request.output is not None and (
        request.output.is_dir() or not request.output.absolute().parent.is_dir()
    ):
        raise UsageError(
            f"{request.output}: expected a file to write, in a folder that exists, found neither",
            "name a file such as timings.json",
        )
    if request.output is not None:
        check_file_place(request.output)
    check_prompt_options(request.prompts_file, request.style)
    questions = (
        read_prompts_file(request.prompts_file, request.style) if request.prompts_file else []
    )
    with TriModeModel.from_pretrained(
        bundle,
        precision=request.precision,
        target=request.target,
        num_threads=request.threads,
        runtime_cache=request.runtime_cache,
    ) as model:
        settings = check_settings(
            TimerSettings(request.rows, request.past, request.batch or (1,), request.repeats),
            model.model,
            model.session,
        )
        subject = subject_of(model.bundle, model.target, request.threads)
        # A prompt that the model does not take shows before minutes of measuring.
        prompts = encode_prompts(
            request.prompts_file or Path(), questions, lambda: model.codec, model.model
        )
        with RichProgress() as progress:
            advance = progress.stage("time forwards", settings.repeats or USUAL_REPEATS)
            forwards = time_forwards(model.session, model.model, settings, advance)
            acceptance = _acceptance(model, prompts, settings, progress)
    timings = Timings(
        trimode_version=trimode.__version__,
        command=command_line(),
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        subject=subject,
        forwards=forwards,
        acceptance=acceptance,
    )
    _keep(timings, request.output)
    if request.as_json:
        print_json(timings, indent=1)
    else:
        _show(timings)


def _acceptance(
    model: TriModeModel, prompts: list[list[int]], settings: TimerSettings, progress: RichProgress
) -> tuple[AcceptanceRecord, ...]:
    """Over the longest block that was timed, with the drafter and without; nothing where there are
    no prompts or no blocks.
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
    """In the cache, and where it was asked for. A cache that cannot be written is no reason to lose
    the figures.
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
            f"warning: the table cannot be kept for mode auto: {reason_of(error)}; pass it with --timings\n"
        )
    else:
        sys.stderr.write(f"wrote {path}, where mode auto looks for it\n")


def _show(timings: Timings) -> None:
    from rich.console import Console
    from rich.table import Table

    console, subject = Console(highlight=False), timings.subject
    if not console.is_terminal:
        console.width = 150  # in a file or a pipe, lines are not broken at 80 columns
    console.print(
        f"{subject.source_name} in {subject.precision}, target {subject.target}, {subject.library}, {subject.gpu or subject.cpu}"
    )
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
    console.print(table)
    for record in timings.acceptance:
        name = "with the drafter" if record.drafter else "without the drafter"
        console.print(
            f"{100 * record.rate:.1f}% of the drafts whose predecessors were accepted are accepted, {name} "
            f"({record.num_prompts} prompts, {len(record.kinds)} beginnings that several share)"
        )


def _cell(one: ForwardTime) -> str:
    return f"{one.median_ms:.3f} ({one.lower_quartile_ms:.3f}-{one.upper_quartile_ms:.3f})"

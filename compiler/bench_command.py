"""``trimode bench``: milliseconds of each forward on this machine, kept where mode ``auto`` looks for them."""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import trimode
from trimode.compiler.console import RichProgress
from trimode.compiler.output import command_line, print_json
from trimode.compiler.prompt_options import check_prompt_options
from trimode.errors import UsageError
from trimode.files import check_file_place
from trimode.runtime.acceptance import write_texts
from trimode.runtime.forward_timer import USUAL_REPEATS, TimerSettings, check_settings, time_forwards
from trimode.runtime.model import TriModeModel
from trimode.runtime.prompts import USUAL_STYLE, PromptStyle, encode_prompts, read_prompts_file
from trimode.runtime.timings import AcceptanceRecord, ForwardTime, Timings, save_timings, subject_of, table_path
from trimode.texts import reason_of


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
    style: PromptStyle = USUAL_STYLE


def run_bench(bundle: Path, request: BenchRequest) -> None:
    """Measure, keep the table, print it; see the command's help."""
    if request.output is not None and (request.output.is_dir() or not request.output.absolute().parent.is_dir()):
        raise UsageError(f"{request.output}: expected a file to write, in a folder that exists, found neither", "name a file such as timings.json")
    if request.output is not None:
        check_file_place(request.output)
    check_prompt_options(request.prompts_file, request.style)
    questions = read_prompts_file(request.prompts_file, request.style) if request.prompts_file else []
    with TriModeModel.from_pretrained(
        bundle, precision=request.precision, target=request.target, num_threads=request.threads, runtime_cache=request.runtime_cache
    ) as model:
        settings = check_settings(TimerSettings(request.rows, request.past, request.batch or (1,), request.repeats), model.model, model.session)
        subject = subject_of(model.bundle, model.target, request.threads)
        # A prompt that the model does not take shows before minutes of measuring.
        prompts = encode_prompts(request.prompts_file or Path(), questions, lambda: model.codec, model.model)
        with RichProgress() as progress:
            advance = progress.stage("time forwards", settings.repeats or USUAL_REPEATS)
            forwards = time_forwards(model.session, model.model, settings, advance)
            acceptance = _acceptance(model, prompts, settings, progress)
    timings = Timings(
        trimode_version=trimode.__version__, command=command_line(), date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}", subject=subject, forwards=forwards,
        acceptance=acceptance,
    )  # fmt: skip
    _keep(timings, request.output)
    if request.as_json:
        print_json(timings, indent=1)
    else:
        _show(timings)


def _acceptance(model: TriModeModel, prompts: list[list[int]], settings: TimerSettings, progress: RichProgress) -> tuple[AcceptanceRecord, ...]:
    """Over the longest block that was timed, with the drafter and without; nothing where there are no prompts or no blocks."""
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
    """In the cache, and where it was asked for. A cache that cannot be written is no reason to lose the figures."""
    if output is not None:
        try:
            save_timings(timings, output)
        except OSError as error:
            raise UsageError(f"{output}: expected a file that can be written, found: {reason_of(error)}", "choose another place") from error
        sys.stderr.write(f"wrote {output}\n")
    try:
        path = table_path(timings.subject)
        save_timings(timings, path)
    except OSError as error:
        sys.stderr.write(f"warning: the table cannot be kept for mode auto: {reason_of(error)}; pass it with --timings\n")
    else:
        sys.stderr.write(f"wrote {path}, where mode auto looks for it\n")


def _show(timings: Timings) -> None:
    console, subject = Console(highlight=False), timings.subject
    if not console.is_terminal:
        console.width = 150  # in a file or a pipe, lines are not broken at 80 columns
    console.print(f"{subject.source_name} in {subject.precision}, target {subject.target}, {subject.library}, {subject.gpu or subject.cpu}")
    past = sorted({one.past for one in timings.forwards})
    table = Table(title="milliseconds a forward: median (quartiles)", title_justify="left", box=None, header_style="bold")
    table.add_column("")
    table.add_column("sequences", justify="right")
    table.add_column("rows of each", justify="right")
    for cached in past:
        table.add_column(f"{cached} cached", justify="right")
    by_case: dict[tuple[str, int, int], dict[int, ForwardTime]] = {}
    for one in timings.forwards:
        by_case.setdefault((f"{one.graph} with the drafter" if one.drafter else one.graph, one.batch, one.rows), {})[one.past] = one
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

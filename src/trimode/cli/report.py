"""``trimode report quantization``: measures the cost of each precision.

The results are tables, JSON and a figure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimode.cli.options import calibrate as options
from trimode.cli.options.shared import (
    CheckpointPath,
    Device,
    Json,
    NoFigure,
    Raw,
    System,
    Thinking,
    usual_style,
)
from trimode.cli.parse import need, parse_modes
from trimode.cli.prompt_options import prompt_style

if TYPE_CHECKING:
    from rich.table import Table

    from trimode.formats.contract import Role
    from trimode.formats.evaluation import DecodingRecord, FidelityRecord, MeasuredPrecision, Report
    from trimode.runtime.text.prompts import PromptStyle

_WORST = 3


def quantization(
    checkpoint: CheckpointPath,
    *,
    output: options.ReportOutput,
    calibration: options.Calibrations,
    data: options.Questions,
    samples: options.Samples = None,
    modes: options.AnswerModes = "ar,diffusion,linear-spec",
    max_new_tokens: options.DecodedTokens = 128,
    seed: options.SamplingSeed = 0,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    device: Device = "cpu",
    no_figure: NoFigure = False,
    as_json: Json = False,
) -> None:
    """Measure what quantization costs; exit code 1 if self-speculation differs from AR."""
    need("the report", "compile", "torch", "safetensors", "ml_dtypes")
    if not no_figure:
        need("the report's picture (--no-figure leaves it out)", "calib", "matplotlib")
    request = ReportRequest(
        calibrations=tuple(calibration),
        data=data,
        num_samples=samples,
        modes=modes,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device,
        draws=not no_figure,
        as_json=as_json,
        style=prompt_style(raw, system, enable_thinking),
    )
    if not run_report(checkpoint, output, request):
        raise typer.Exit(1)


@dataclass(frozen=True)
class ReportRequest:
    """Holds what a user asks of ``trimode report quantization``."""

    calibrations: tuple[str, ...]
    data: Path
    num_samples: int | None
    modes: str
    max_new_tokens: int
    seed: int
    device: str
    draws: bool
    as_json: bool
    style: PromptStyle = field(default_factory=usual_style)


def run_report(checkpoint_path: Path, output: Path, request: ReportRequest) -> bool:
    """Measure, write the folder, and print tables or JSON.

    Returns whether self-speculation gave autoregression's tokens throughout.

    Errors are raised before anything is written.
    """
    from trimode.calib.evaluate.quantization.candidate import ROUNDED, read_candidate
    from trimode.calib.evaluate.quantization.job import check_output, measure, save_report
    from trimode.calib.evaluate.quantization.questions import QualitySettings, read_questions
    from trimode.cli.console import RichProgress
    from trimode.cli.output import print_json
    from trimode.formats.files import check_apart, sha256_of
    from trimode.graphs.checkpoint import describe_model, open_checkpoint
    from trimode.report.quantization_figure import load_matplotlib

    settings = QualitySettings(
        parse_modes(request.modes),
        request.num_samples,
        request.max_new_tokens,
        request.seed,
        request.device,
    )
    settings.check()
    request.style.check()
    check_output(output)
    check_apart(
        output,
        checkpoint_path,
        request.data,
        *(Path(name) for name in request.calibrations if name not in ROUNDED),
    )
    if request.draws:
        load_matplotlib()  # it takes minutes to need it, and no time to miss it
    checkpoint = open_checkpoint(checkpoint_path)
    candidates = [read_candidate(name, checkpoint) for name in request.calibrations]
    model = describe_model(checkpoint)
    questions, to_text = read_questions(request.data, request.style, checkpoint_path, model)
    with RichProgress() as progress:
        sha256 = sha256_of(request.data)
        report = measure(
            checkpoint,
            model,
            questions,
            sha256,
            candidates,
            settings,
            progress=progress,
            to_text=to_text,
        )
    save_report(output, report, draws=request.draws)
    if request.as_json:
        print_json(report, indent=1)
    else:
        _show(report)
    sys.stderr.write(f"wrote {output}\n")
    if not report.passed:
        sys.stderr.write(
            "FAILED: self-speculation does not give the tokens of autoregression everywhere; "
            "see `partings` in the report\n"
        )
    return report.passed


def _show(report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150  # in a file or a pipe, lines are not broken at 80 columns
    console.print(
        f"{report.source_name}: {report.data.num_questions} questions, "
        f"{report.data.num_answers} with known answers; "
        f"dense in {report.compute_type} {report.dense_bytes / 1e6:.1f} MB"
    )
    console.print(_size_table(report))
    console.print(_decoding_table(report))
    console.print(_layer_table(report))


def _size_table(report: Report) -> Table:
    table = _table(
        "precisions: divergence of the probabilities from float32's, and the same token first"
    )
    table.add_column("")
    for heading in ("weights", "layers"):
        table.add_column(heading, justify="right")
    roles = list(report.precisions[0].outputs)
    for role in roles:
        table.add_column(f"{role} KL, nats", justify="right")
        table.add_column(f"{role} top-1", justify="right")
    for precision in report.precisions:
        cells = [
            cell
            for role in roles
            for cell in (
                f"{precision.outputs[role].kl_nats:.2e}",
                _percent(precision.outputs[role].top1_agreement),
            )
        ]
        table.add_row(
            precision.name,
            f"{precision.weight_bytes / 1e6:.1f} MB",
            str(precision.num_quantized),
            *cells,
        )
    return table


def _decoding_table(report: Report) -> Table:
    from trimode.formats.evaluation import decoding_name

    table = _table("decoding")
    for heading in ("", "mode"):
        table.add_column(heading)
    for heading in (
        "answered right",
        "float32's tokens",
        "AR's tokens",
        "tokens per forward",
        "acceptance length",
    ):
        table.add_column(heading, justify="right")
    for precision in report.precisions:
        for index, one in enumerate(precision.decoding):
            table.add_row(
                "" if index else precision.name,
                decoding_name(one),
                _percent(one.exact_match),
                _percent(one.same_tokens),
                _equality(one),
                f"{one.tokens_per_forward:.2f}",
                "" if one.acceptance_length is None else f"{one.acceptance_length:.2f}",
            )
    return table


def _layer_table(report: Report) -> Table:
    table = _table(
        f"lowest signal-to-noise ratio, dB: after the last decoder block, and of the {_WORST} "
        "worst layers alone"
    )
    for heading in ("", "role"):
        table.add_column(heading)
    table.add_column("last block", justify="right")
    table.add_column("worst layers")
    for precision in report.precisions[1:]:
        for index, (role, last) in enumerate(precision.accumulated[-1].items()):
            worst = ", ".join(f"{name} {snr:.1f}" for snr, name in _worst_layers(precision, role))
            table.add_row("" if index else precision.name, role, f"{last.snr_db:.1f}", worst)
    return table


def _worst_layers(precision: MeasuredPrecision, role: Role) -> Sequence[tuple[float, str]]:
    local: Iterable[tuple[str, Mapping[Role, FidelityRecord]]] = precision.local.items()
    return sorted((by_role[role].snr_db, name) for name, by_role in local if role in by_role)[
        :_WORST
    ]


def _table(title: str) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left", box=None, header_style="bold")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _equality(one: DecodingRecord) -> str:
    return (
        f"[bold red]{_percent(one.equals_ar)}[/bold red]"
        if one.partings
        else _percent(one.equals_ar)
    )

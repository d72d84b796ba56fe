"""Implements ``trimode report quantization``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimode.cli.calibrate.questions import Inputs, read_inputs
from trimode.cli.flags import flags_in_errors
from trimode.cli.options import calibrate as options
from trimode.cli.options.shared import CheckpointPath, Device, Json, NoFigure, Raw, System, Thinking
from trimode.cli.parse import need, parse_modes
from trimode.cli.prompt_options import prompt_style

if TYPE_CHECKING:
    from rich.table import Table

    from trimode.calib.evaluate.quantization.questions import QualitySettings
    from trimode.formats.contract import GraphName
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
    from trimode.calib.evaluate.quantization.questions import QualitySettings

    settings = QualitySettings(parse_modes(modes), samples, max_new_tokens, seed, device)
    passed = run_report(
        checkpoint,
        output,
        data,
        calibration,
        settings,
        style=prompt_style(raw, system, enable_thinking),
        draws=not no_figure,
        as_json=as_json,
    )
    if not passed:
        raise typer.Exit(1)


def run_report(
    checkpoint_path: Path,
    output: Path,
    data: Path,
    calibrations: Sequence[str],
    settings: QualitySettings,
    *,
    style: PromptStyle,
    draws: bool = True,
    as_json: bool = False,
) -> bool:
    """Measure, write the folder, and print tables or JSON.

    Errors are raised before anything is written.

    Returns:
        Whether self-speculation gave autoregression's tokens throughout.
    """
    from trimode.calib.evaluate.quantization.candidate import ROUNDED
    from trimode.calib.evaluate.quantization.job import check_output, save_report
    from trimode.cli.output import print_json
    from trimode.formats.files import check_apart
    from trimode.report.quantization_figure import load_matplotlib

    with flags_in_errors():
        settings.check()
        style.check()
        check_output(output)
        folders = (Path(name) for name in calibrations if name not in ROUNDED)
        check_apart(output, checkpoint_path, data, *folders)
        if draws:
            load_matplotlib()  # it takes minutes to need it, and no time to miss it
        report = _measure(read_inputs(checkpoint_path, calibrations, data, style), settings)
    save_report(output, report, draws=draws)
    if as_json:
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


def _measure(inputs: Inputs, settings: QualitySettings) -> Report:
    from trimode.calib.evaluate.quantization.job import measure
    from trimode.cli.console import RichProgress

    with RichProgress() as progress:
        return measure(
            inputs.checkpoint,
            inputs.model,
            inputs.questions,
            inputs.sha256,
            inputs.candidates,
            settings,
            progress=progress,
            to_text=inputs.to_text,
        )


def _show(report: Report) -> None:
    from trimode.cli.tables import table_console

    console = table_console()
    console.print(
        f"{report.source_name}: {report.data.num_questions} questions, "
        f"{report.data.num_answers} with known answers; "
        f"dense in {report.compute_type} {report.dense_bytes / 1e6:.1f} MB"
    )
    console.print(_size_table(report))
    console.print(_decoding_table(report))
    console.print(_layer_table(report))


def _size_table(report: Report) -> Table:
    from trimode.cli.tables import percent, plain_table

    graph_names = list(report.precisions[0].outputs)
    by_graph = [
        heading
        for graph_name in graph_names
        for heading in (f"{graph_name} KL, nats", f"{graph_name} top-1")
    ]
    table = plain_table(
        "",
        title="precisions: divergence of the probabilities from float32's, "
        "and the same token first",
        figures=("weights", "layers", *by_graph),
    )
    for precision in report.precisions:
        outputs = [precision.outputs[graph_name] for graph_name in graph_names]
        cells = [(f"{one.kl_nats:.2e}", percent(one.top1_agreement)) for one in outputs]
        table.add_row(
            precision.name,
            f"{precision.weight_bytes / 1e6:.1f} MB",
            str(precision.num_quantized),
            *(cell for pair in cells for cell in pair),
        )
    return table


def _decoding_table(report: Report) -> Table:
    from trimode.cli.tables import decimal, percent, plain_table
    from trimode.formats.evaluation import decoding_name

    shares = ("answered right", "float32's tokens", "AR's tokens")
    figures = (*shares, "tokens per forward", "acceptance length")
    table = plain_table("", "mode", title="decoding", figures=figures)
    for precision in report.precisions:
        for index, one in enumerate(precision.decoding):
            table.add_row(
                "" if index else precision.name,
                decoding_name(one),
                percent(one.exact_match),
                percent(one.same_tokens),
                _equality(one),
                f"{one.tokens_per_forward:.2f}",
                decimal(one.acceptance_length, 2, missing=""),
            )
    return table


def _layer_table(report: Report) -> Table:
    from trimode.cli.tables import plain_table

    table = plain_table(
        "",
        "graph",
        title="lowest signal-to-noise ratio, dB: after the last decoder block, and of the "
        f"{_WORST} worst layers alone",
        figures=("last block",),
    )
    table.add_column("worst layers")
    for precision in report.precisions[1:]:
        for index, (graph_name, last) in enumerate(precision.accumulated[-1].items()):
            worst = ", ".join(
                f"{name} {snr:.1f}" for snr, name in _worst_layers(precision, graph_name)
            )
            table.add_row("" if index else precision.name, graph_name, f"{last.snr_db:.1f}", worst)
    return table


def _worst_layers(
    precision: MeasuredPrecision, graph_name: GraphName
) -> Sequence[tuple[float, str]]:
    local: Iterable[tuple[str, Mapping[GraphName, FidelityRecord]]] = precision.local.items()
    return sorted(
        (by_graph[graph_name].snr_db, name) for name, by_graph in local if graph_name in by_graph
    )[:_WORST]


def _equality(one: DecodingRecord) -> str:
    from trimode.cli.tables import percent

    share = percent(one.equals_ar)
    return f"[bold red]{share}[/bold red]" if one.partings else share

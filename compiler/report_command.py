"""``trimode report quantization``: a checkpoint, calibrations and questions in; what each precision costs, as tables, JSON and a picture, out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.table import Table

from trimode.calib.quality.candidate import Candidate
from trimode.calib.quality.decoding import ToText
from trimode.calib.quality.figure import load_matplotlib
from trimode.calib.quality.questions import QualitySettings, Question
from trimode.calib.quality.report import check_output, measure, save_report
from trimode.calib.quality.schema import DecodingRecord, FidelityRecord, PrecisionRecord, Report, decoding_name
from trimode.compiler.console import RichProgress
from trimode.compiler.output import print_json
from trimode.compiler.plan import describe_model
from trimode.compiler.quantize.scales import RTN, Quantization, load_quantization
from trimode.errors import UsageError
from trimode.files import check_apart
from trimode.graphs.calibration import QuantizedPrecision, Scales, load_record
from trimode.graphs.checkpoint import Checkpoint, open_checkpoint
from trimode.graphs.contract import ModelInfo, Role
from trimode.hints import CALIBRATE
from trimode.runtime.bundle import sha256_of
from trimode.runtime.options import Mode
from trimode.runtime.prompts import USUAL_STYLE, PromptStyle, encode_prompts, read_prompts_file
from trimode.runtime.text import TextCodec
from trimode.texts import whole_text

ROUNDED: dict[str, QuantizedPrecision] = {"rtn-int8": "int8", "rtn-int4": "int4", "rtn-nvfp4": "nvfp4"}
"""Weights rounded to nearest, in the place of a calibration."""
_WORST = 3


@dataclass(frozen=True)
class ReportRequest:
    """The command line's options, in its order."""

    calibrations: tuple[str, ...]
    data: Path
    num_samples: int | None
    modes: str
    max_new_tokens: int
    seed: int
    device: str
    draws: bool
    as_json: bool
    style: PromptStyle = USUAL_STYLE


def run_report(checkpoint_path: Path, output: Path, request: ReportRequest) -> bool:
    """Measure, write the folder, print tables or JSON; returns whether self-speculation gave autoregression's tokens throughout.

    Errors are raised before anything is written.
    """
    settings = QualitySettings(parse_modes(request.modes), request.num_samples, request.max_new_tokens, request.seed, request.device)
    settings.check()
    request.style.check()
    check_output(output)
    check_apart(output, checkpoint_path, request.data, *(Path(name) for name in request.calibrations if name not in ROUNDED))
    if request.draws:
        load_matplotlib()  # it takes minutes to need it, and no time to miss it
    checkpoint = open_checkpoint(checkpoint_path)
    candidates = [read_candidate(name, checkpoint) for name in request.calibrations]
    model = describe_model(checkpoint)
    questions, to_text = read_questions(request.data, request.style, checkpoint_path, model)
    with RichProgress() as progress:
        sha256 = sha256_of(request.data)
        report = measure(checkpoint, model, questions, sha256, candidates, settings, progress, to_text)
    save_report(output, report, draws=request.draws)
    if request.as_json:
        print_json(report, indent=1)
    else:
        _show(report)
    sys.stderr.write(f"wrote {output}\n")
    if not report.passed:
        sys.stderr.write("FAILED: self-speculation does not give the tokens of autoregression everywhere; see `partings` in the report\n")
    return report.passed


def parse_modes(text: str) -> tuple[Mode, ...]:
    """``ar,linear-spec`` -> modes; unknown ones are left for :meth:`QualitySettings.check`."""
    return cast("tuple[Mode, ...]", tuple(part.strip().replace("-", "_") for part in text.split(",") if part.strip()))


def read_candidate(name: str, checkpoint: Checkpoint) -> Candidate:
    """A calibration folder, or a name of :data:`ROUNDED`, checked against the checkpoint as a build checks it.

    Raises:
        UsageError: a rounding that does not exist, or that the checkpoint's shapes rule out.
        CheckpointError: a calibration that cannot be read or does not fit the checkpoint's weights.
    """
    if name == RTN or (name.startswith(f"{RTN}-") and name not in ROUNDED):
        names = tuple(ROUNDED)
        found = f"--calibration: expected a folder, {', '.join(names[:-1])} or {names[-1]}, found {name}"
        command = CALIBRATE.replace("PRECISION", "fp8")
        raise UsageError(found, f"fp8 quantizes inputs too, whose scales take data: {command}")
    if name in ROUNDED:
        quantization, scales = load_quantization(RTN, ROUNDED[name], checkpoint), None
    else:
        quantization = load_quantization(Path(name), load_record(Path(name)).precision, checkpoint)
        scales = _scales(quantization)
    record = quantization.record
    return Candidate(
        whole_text(name), quantization.precision, record.algorithm, record.block_size, tuple(quantization.layers), scales, record.scales_sha256,
        quantization.source_sha256,
    )  # fmt: skip


def read_questions(data: Path, style: PromptStyle, checkpoint_path: Path, model: ModelInfo) -> tuple[list[Question], ToText | None]:
    """The prompts of a file, and the tokenizer's decoder where an answer is known.

    Raises:
        UsageError: the file cannot be read or is empty, or has lines that the checkpoint's tokenizer and template, or the model, do not take.
    """
    prompts, codec = read_prompts_file(data, style), cache(partial(TextCodec, checkpoint_path))
    texts = encode_prompts(data, prompts, codec, model)
    to_text = codec().decode if any(prompt.answers for prompt in prompts) else None
    return [Question(text, prompt.answers) for text, prompt in zip(texts, prompts, strict=True)], to_text


def _scales(quantization: Quantization) -> Scales:
    found = {
        f"{layer}.{kind}": getattr(scales, kind)
        for layer, scales in quantization.layers.items()
        for kind in ("weight_amax", "input_amax", "pre_quant_scale")
    }
    return {name: values for name, values in found.items() if values is not None}


def _show(report: Report) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150  # in a file or a pipe, lines are not broken at 80 columns
    console.print(f"{report.source_name}: {report.data.num_questions} questions, {report.data.num_answers} with known answers; "
                  f"dense in {report.compute_type} {report.dense_bytes / 1e6:.1f} MB")  # fmt: skip
    console.print(_size_table(report))
    console.print(_decoding_table(report))
    console.print(_layer_table(report))


def _size_table(report: Report) -> Table:
    table = _table("precisions: divergence of the probabilities from float32's, and the same token first")
    table.add_column("")
    for heading in ("weights", "layers"):
        table.add_column(heading, justify="right")
    roles = list(report.precisions[0].outputs)
    for role in roles:
        table.add_column(f"{role} KL, nats", justify="right")
        table.add_column(f"{role} top-1", justify="right")
    for precision in report.precisions:
        cells = [cell for role in roles for cell in (f"{precision.outputs[role].kl_nats:.2e}", _percent(precision.outputs[role].top1_agreement))]
        table.add_row(precision.name, f"{precision.weight_bytes / 1e6:.1f} MB", str(precision.num_quantized), *cells)
    return table


def _decoding_table(report: Report) -> Table:
    table = _table("decoding")
    for heading in ("", "mode"):
        table.add_column(heading)
    for heading in ("answered right", "float32's tokens", "AR's tokens", "tokens per forward", "acceptance length"):
        table.add_column(heading, justify="right")
    for precision in report.precisions:
        for index, one in enumerate(precision.decoding):
            table.add_row(
                "" if index else precision.name, decoding_name(one), _percent(one.exact_match), _percent(one.same_tokens), _equality(one),
                f"{one.tokens_per_forward:.2f}", "" if one.acceptance_length is None else f"{one.acceptance_length:.2f}",
            )  # fmt: skip
    return table


def _layer_table(report: Report) -> Table:
    table = _table(f"lowest signal-to-noise ratio, dB: after the last decoder block, and of the {_WORST} worst layers alone")
    for heading in ("", "role"):
        table.add_column(heading)
    table.add_column("last block", justify="right")
    table.add_column("worst layers")
    for precision in report.precisions[1:]:
        for index, (role, last) in enumerate(precision.accumulated[-1].items()):
            worst = ", ".join(f"{name} {snr:.1f}" for snr, name in _worst_layers(precision, role))
            table.add_row("" if index else precision.name, role, f"{last.snr_db:.1f}", worst)
    return table


def _worst_layers(precision: PrecisionRecord, role: Role) -> Sequence[tuple[float, str]]:
    local: Iterable[tuple[str, Mapping[Role, FidelityRecord]]] = precision.local.items()
    return sorted((by_role[role].snr_db, name) for name, by_role in local if role in by_role)[:_WORST]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, header_style="bold")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _equality(one: DecodingRecord) -> str:
    return f"[bold red]{_percent(one.equals_ar)}[/bold red]" if one.partings else _percent(one.equals_ar)

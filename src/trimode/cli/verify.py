"""``trimode verify``: compares a bundle with its checkpoint.

Graphs are compared output by output, generations token by token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimode.cli.options import verify as options
from trimode.cli.options.shared import (
    BundlePath,
    Json,
    Raw,
    RunPrecision,
    RunTarget,
    System,
    Thinking,
    Threads,
)
from trimode.cli.parse import need
from trimode.cli.prompt_options import prompt_style
from trimode.errors import BundleError, DependencyError, DeviceError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from trimode.compiler.verify.run import VerifyRequest
    from trimode.formats.verification import GraphParity, OutputRecord, TokenParity, Verification
    from trimode.runtime.model import TriModeModel


def verify(
    bundle: BundlePath,
    *,
    against: options.Against,
    precision: RunPrecision = None,
    target: RunTarget = None,
    calibration: options.Calibration = None,
    prompts_file: options.PromptsFile = None,
    raw: Raw = False,
    system: System = None,
    enable_thinking: Thinking = None,
    seed: options.Seed = 0,
    drafter: options.Drafter = None,
    sampler: options.Sampler = None,
    long: options.Long = None,
    max_new_tokens: options.MaxNewTokens = 64,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle with its checkpoint in PyTorch; exit code 1 if they differ."""
    need("the reference", "verify", "torch", "polygraphy", "onnxruntime")
    from trimode.compiler.verify.run import VerifyRequest

    request = VerifyRequest(
        checkpoint=against,
        precision=precision,
        target=target,
        calibration=calibration,
        prompts_file=prompts_file,
        seed=seed,
        long=long,
        max_new_tokens=max_new_tokens,
        threads=threads,
        as_json=as_json,
        drafter=drafter,
        sampler=sampler,
        style=prompt_style(raw, system, enable_thinking),
    )
    if not run_verify(bundle, request):
        raise typer.Exit(1)


def run_verify(bundle: Path, request: VerifyRequest) -> bool:
    """Verify, write ``verification.json``, print what was found; returns whether all of it passed.

    Raises:
        UsageError: an option is out of range, the bundle has no such precision or target, or
            another calibration; or the checkpoint is of another shape.
        CheckpointError: the checkpoint or the calibration cannot be read.
        BundleError, DeviceError, DependencyError: the target cannot run here. An earlier
            ``verification.json`` stays as it is.
    """
    from trimode.cli.console import RichProgress
    from trimode.cli.output import print_json
    from trimode.compiler.verify.run import check_calibration, check_shape, verify
    from trimode.formats.verification import check_verification_place, write_verification
    from trimode.graphs.checkpoint import open_checkpoint

    _check_request(request)
    model = _open_target(bundle, request)
    check_verification_place(bundle)
    check_calibration(model, request)
    checkpoint = open_checkpoint(request.checkpoint, request.drafter)
    check_shape(checkpoint, model.bundle.manifest)
    with RichProgress() as progress:
        verification = verify(model, checkpoint, request, progress)
    path = write_verification(verification, bundle)
    if request.as_json:
        print_json(verification, indent=1)
    else:
        _show(verification, request)
    sys.stderr.write(f"wrote {path}\n")
    return verification.passed


def _check_request(request: VerifyRequest) -> None:
    from trimode.cli.prompt_options import check_prompt_options

    if request.max_new_tokens < 1:
        raise UsageError(
            f"expected --max-new-tokens of at least 1, found {request.max_new_tokens}",
            "64 is usual",
        )
    if request.seed < 0:
        raise UsageError(
            f"expected --seed of at least 0, found {request.seed}",
            "any whole number from 0 on will do",
        )
    check_prompt_options(request.prompts_file, request.style)


def _open_target(bundle: Path, request: VerifyRequest) -> TriModeModel:
    from trimode.runtime.model import TriModeModel
    from trimode.runtime.sessions.select import PORTABLE

    try:
        model = TriModeModel.from_pretrained(
            bundle, precision=request.precision, target=request.target, num_threads=request.threads
        )
    except (BundleError, DeviceError, DependencyError) as error:
        raise type(error)(f"nothing was verified: {error.message}", error.hint) from error
    names = model.bundle.chosen.targets
    if model.target == PORTABLE and request.target != PORTABLE and names:
        # Generating may fall back to the portable graphs; saying that a GPU's engines are right
        # because these are may not.
        raise DeviceError(
            "nothing was verified: expected one of the bundle's targets to run here "
            f"({', '.join(names)}), found that none does",
            "verify on the machine with the GPU, or pass --target portable for the portable "
            "graphs alone",
        )
    return model


def _show(verification: Verification, request: VerifyRequest) -> None:
    """The figures as two tables, and what they come to."""
    from trimode.cli.tables import table_console

    console = table_console()
    source = (
        "the bundle's source" if verification.checkpoint.is_source else "NOT the bundle's source"
    )
    what = (
        f"{verification.precision} on {verification.target} ({verification.backend}, "
        f"{verification.compute_dtype})"
    )
    console.print(f"{what} against {request.checkpoint}, {source}")
    for line in _quantized_lines(verification):
        console.print(line)
    console.print(_graph_table(verification.graphs))
    console.print(_token_table(verification.tokens))
    if (sampler := verification.sampler) is not None:
        figures = (
            f"{sampler.num_scores} scores, largest error "
            f"{_number(sampler.max_error) or 'no number'}, allowed "
            f"{_number(sampler.tolerance)}"
        )
        console.print(f"learned sampler against {sampler.name}: {figures}  {_word(sampler.passed)}")
    for note in verification.notes:
        console.print(f"note: {note}")
    graphs, tokens = len(verification.graphs), len(verification.tokens)
    records = (
        *verification.graphs,
        *verification.tokens,
        verification.weights,
        verification.scales,
        verification.sampler,
    )
    num_failed = sum(not record.passed for record in records if record is not None)
    console.print(
        f"{'passed' if verification.passed else 'FAILED'}: {graphs} graph comparisons and "
        f"{tokens} generations, {num_failed} failed"
    )


def _quantized_lines(verification: Verification) -> Iterator[str]:
    """What is said of quantized weights, their scales and quantized inputs."""
    weights, scales = verification.weights, verification.scales
    if weights is not None:
        differing = "".join(
            f"; {count} differ in {layer}" for layer, count in weights.differs.items()
        )
        yield (
            f"quantized weights: {weights.num_compared} numbers in {weights.num_layers} "
            f"layers, bit for bit{differing}  {_word(weights.passed)}"
        )
    if scales is not None:
        differing = "".join(f"; {name} differs" for name in scales.differs)
        yield (
            f"scales against {scales.calibration}: {scales.num_layers} layers{differing}  "
            f"{_word(scales.passed)}"
        )
    codes = [record.codes for record in verification.graphs if record.codes is not None]
    if codes:
        refused = {
            layer: sum(record.refused.get(layer, 0) for record in codes)
            for record in codes
            for layer in record.refused
        }
        unexplained = "".join(
            f"; {count} unexplained in {layer}" for layer, count in refused.items()
        )
        counts = (
            f"{sum(record.num_compared for record in codes)}, "
            f"{sum(record.num_other for record in codes)} on the other side of a border"
        )
        yield (
            f"quantized inputs of the portable graphs: {counts}{unexplained}  {_word(not refused)}"
        )


def _graph_table(records: Sequence[GraphParity]) -> Table:
    """A line an output; portable graphs are marked."""
    from rich.table import Table

    table = Table(
        "graph",
        "of",
        "in cache",
        "rows",
        "drafter",
        "output",
        "max error",
        "allowed",
        "mean error",
        "allowed",
        "same id",
        "",
        title="graphs against the torch trunk",
        title_justify="left",
        box=None,
        header_style="bold",
    )
    for record in records:
        same = " ".join(f"{ids.num_equal}/{ids.num_compared}" for ids in record.ids)
        for index, output in enumerate(record.outputs):
            where = (
                record.graph,
                record.subject,
                ",".join(map(str, record.positions)),
                str(record.rows),
                _switch(record.use_drafter),
            )
            # The first line of a comparison speaks for its ids too.
            passed = output.passed if index else output.passed and _ids_passed(record)
            table.add_row(
                *where, output.name, *_figures(output), "" if index else same, _word(passed)
            )
    return table


def _token_table(records: Sequence[TokenParity]) -> Table:
    from rich.table import Table

    table = Table(
        "mode",
        "drafter",
        "against",
        "prompt",
        "same tokens",
        "parts at",
        "preferred by",
        "allowed",
        "nfe",
        "other nfe",
        "",
        title="tokens",
        title_justify="left",
        box=None,
        header_style="bold",
    )
    for record in records:
        table.add_row(
            record.mode.replace("_", "-"),
            _switch(record.use_drafter),
            record.against,
            f"{record.prompt_length} tokens",
            f"{record.num_equal}/{record.num_tokens}",
            _number(record.first_divergence),
            _number(record.preference),
            _number(record.tolerance),
            str(record.nfe),
            str(record.other_nfe),
            _word(record.passed),
        )
    return table


def _figures(output: OutputRecord) -> tuple[str, ...]:
    return tuple(
        _number(value)
        for value in (output.max_error, output.tolerance, output.mean_error, output.mean_tolerance)
    )


def _ids_passed(record: GraphParity) -> bool:
    return (
        all(ids.passed for ids in record.ids)
        and record.has_accepted_length is not False
        and (record.codes is None or record.codes.passed)
    )


def _switch(use_drafter: bool | None) -> str:
    return "" if use_drafter is None else "on" if use_drafter else "off"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.2g}"


def _word(passed: bool) -> str:
    return "ok" if passed else "[bold red]FAILED[/bold red]"

"""``trimode verify``: a bundle against the checkpoint it came from, graph by graph and token by token."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

import trimode
from trimode.calib.torch_session import TorchSession, load_trunk
from trimode.compiler.console import RichProgress
from trimode.compiler.output import print_json
from trimode.compiler.parity.borders import NUM_DITHERED, DitheredSession, Guide, guide_inputs
from trimode.compiler.parity.graph_parity import SHORT_POSITION, compare_portable, compare_target, count_comparisons
from trimode.compiler.parity.quantized import load_quantized_trunk
from trimode.compiler.parity.report import (
    BoundsRecord,
    CheckpointRecord,
    GraphParity,
    OutputRecord,
    ScalesParity,
    Subject,
    TokenParity,
    Verification,
    WeightsParity,
    check_verification_place,
    write_verification,
)
from trimode.compiler.parity.runners import CachedText
from trimode.compiler.parity.sampler_parity import compare_sampler, read_trained
from trimode.compiler.parity.token_parity import TokenPrompt, compare_tokens, count_generations
from trimode.compiler.parity.tolerance import Tolerance, tolerance_for
from trimode.compiler.progress import Advance, Progress
from trimode.compiler.prompt_options import check_prompt_options
from trimode.errors import BundleError, DependencyError, DeviceError, UsageError
from trimode.graphs.calibration import QuantizedPrecision
from trimode.graphs.checkpoint import Checkpoint, open_checkpoint
from trimode.graphs.contract import DType
from trimode.graphs.source import SAFETENSORS_NAMES, SourceDigest
from trimode.graphs.trunk import TriModeTrunk
from trimode.runtime.backends import PORTABLE
from trimode.runtime.bundle import sha256_of
from trimode.runtime.manifest import MANIFEST, Manifest
from trimode.runtime.model import TriModeModel
from trimode.runtime.prompts import USUAL_STYLE, PromptStyle, encode_prompts, read_prompts_file
from trimode.runtime.session import Ids
from trimode.texts import name_of

AFFORDABLE_FLOPS = 2e13
"""What the default long position may cost the reference: some minutes on few cores."""
DEFAULT_LONG_POSITION = 1024
LONGEST_PORTABLE = 2048
"""Most tokens in the cache that is handed to a portable graph, whole, as an input."""
Record = TypeVar("Record")
LIBRARIES = ("torch", "onnxruntime", "polygraphy", "numpy")


@dataclass(frozen=True)
class VerifyRequest:
    """The options of the command, as given."""

    checkpoint: Path
    precision: str | None = None
    target: str | None = None
    calibration: Path | None = None
    prompts_file: Path | None = None
    seed: int = 0
    long: int | None = None
    max_new_tokens: int = 64
    threads: int | None = None
    as_json: bool = False
    drafter: Path | None = None
    sampler: Path | None = None
    style: PromptStyle = USUAL_STYLE


def run_verify(bundle: Path, request: VerifyRequest) -> bool:
    """Verify, write ``verification.json``, print what was found; returns whether all of it passed.

    Raises:
        UsageError: an option is out of range, the bundle has no such precision or target, or another calibration; or the checkpoint is of
            another shape.
        CheckpointError: the checkpoint or the calibration cannot be read.
        BundleError, DeviceError, DependencyError: the target cannot run here. An earlier ``verification.json`` stays as it is.
    """
    _check_request(request)
    model = _open_target(bundle, request)
    check_verification_place(bundle)
    _check_calibration(model, request)
    checkpoint = open_checkpoint(request.checkpoint, request.drafter)
    _check_shape(checkpoint, model.bundle.manifest)
    with RichProgress() as progress:
        verification = verify(model, checkpoint, request, progress)
    path = write_verification(verification, bundle)
    if request.as_json:
        print_json(verification, indent=1)
    else:
        _show(verification, request)
    sys.stderr.write(f"wrote {path}\n")
    return verification.passed


def verify(model: TriModeModel, checkpoint: Checkpoint, request: VerifyRequest, progress: Progress) -> Verification:
    """Compare the model's target, and the bundle's portable graphs, with the trunk of ``checkpoint``."""
    manifest, info = model.bundle.manifest, model.model
    trained = None if request.sampler is None else read_trained(request.sampler, manifest.sampler)
    position = long_position(checkpoint, manifest, request.long)
    text = np.random.default_rng(request.seed).integers(0, info.vocab_size, position + info.max_block_length)
    prompts = _prompts(model, request, text, position)
    advance = progress.stage("read checkpoint", 1)
    digest = SourceDigest(checkpoint)
    loaded = _load_reference(model, checkpoint, digest, request.calibration)
    advance(1)
    place = _place(model)
    bounds: dict[Subject, Tolerance] = {
        "target": tolerance_for(place.compute_dtype, info.num_hidden_layers),
        "portable": tolerance_for("float32", info.num_hidden_layers),
    }
    roles = tuple(manifest.contracts)
    reference = _Reference(loaded.trunk, bounds["target"].relative, request.seed)
    graphs, notes = _compare_graphs(model, reference, text, position, bounds, request.seed, progress)
    advance = progress.stage("compare tokens", count_generations(info, len(prompts), roles))
    tokens = _counted(
        compare_tokens(reference.session, model.session, info, prompts, request.max_new_tokens, bounds["target"], reference.dithered, roles), advance
    )
    sha256 = digest.hexdigest()
    if not _is_exact(checkpoint, manifest.dtype):
        notes.append(f"the reference's weights are rounded to {manifest.dtype}, as the bundle's are")
    if loaded.weights is not None and loaded.scales is None:
        notes.append("the scales were taken as the bundle has them: --calibration FOLDER compares them with those it was built by")
    sampler = None if trained is None else compare_sampler(model.scorer, trained, info, request.seed)
    if manifest.sampler is not None and sampler is None:
        notes.append("the learned sampler was not compared: --sampler FOLDER compares it with the network that it was built from")
    others = [name for name in model.bundle.chosen.targets if name != model.target]
    if others:
        notes.append(f"other targets of the bundle were not verified: {', '.join(others)} (--target NAME, where it runs)")
    original = checkpoint.config.rope.original_max_position_embeddings or None
    if original is not None and position < original:
        notes.append(f"positions from {original} on, the rope's original length, were not reached: --long {original} would")
    return Verification(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        passed=all(record.passed for record in (*graphs, *tokens, loaded.weights, loaded.scales, sampler) if record is not None),
        precision=model.bundle.precision, target=model.target, backend=place.backend, device=place.device, compute_dtype=place.compute_dtype,
        manifest_sha256=sha256_of(model.bundle.path / MANIFEST),
        checkpoint=CheckpointRecord(name=name_of(checkpoint.path), sha256=sha256, is_source=sha256 == manifest.source.sha256),
        seed=request.seed, long_position=position, original_length=original,
        weight_dtype=manifest.dtype,
        bounds={subject: BoundsRecord(dtype=bound.dtype, relative=bound.relative) for subject, bound in bounds.items()},
        weights=loaded.weights, scales=loaded.scales, sampler=sampler,
        graphs=tuple(graphs), tokens=tuple(tokens), notes=tuple(notes), versions=_versions(),
    )  # fmt: skip


def long_position(checkpoint: Checkpoint, manifest: Manifest, wanted: int | None) -> int:
    """Where the long comparisons stand: twice the rope's original length and a block, as far as the bundle reaches and the reference is quick.

    Raises:
        UsageError: ``wanted`` is out of range.
    """
    limit = max(1, manifest.model.max_length - manifest.model.block_size)
    if wanted is not None:
        if not 1 <= wanted <= limit:
            raise UsageError(f"expected --long from 1 to {limit}, found {wanted}", "a block has to fit behind it; a longer bundle needs --max-length")
        return wanted
    original = checkpoint.config.rope.original_max_position_embeddings
    goal = 2 * original + manifest.model.block_size if original else DEFAULT_LONG_POSITION
    affordable = int(AFFORDABLE_FLOPS / (2 * manifest.source.num_parameters))
    return max(1, min(goal, affordable, limit))


def _check_request(request: VerifyRequest) -> None:
    if request.max_new_tokens < 1:
        raise UsageError(f"expected --max-new-tokens of at least 1, found {request.max_new_tokens}", "64 is usual")
    if request.seed < 0:
        raise UsageError(f"expected --seed of at least 0, found {request.seed}", "any whole number from 0 on will do")
    check_prompt_options(request.prompts_file, request.style)


def _check_calibration(model: TriModeModel, request: VerifyRequest) -> None:
    record = model.bundle.chosen.calibration
    if request.calibration is not None and (record is None or record.scales_sha256 is None):
        raise UsageError(f"expected --calibration with a precision that was built by one, found {model.bundle.precision}",
                         "leave --calibration out")  # fmt: skip


class _Loaded(NamedTuple):
    """The reference's trunk, and what loading it has found about quantized weights."""

    trunk: TriModeTrunk
    weights: WeightsParity | None = None
    scales: ScalesParity | None = None


def _load_reference(model: TriModeModel, checkpoint: Checkpoint, digest: SourceDigest, calibration: Path | None) -> _Loaded:
    bundle = model.bundle
    for precision in get_args(QuantizedPrecision):
        if bundle.precision == precision:
            return _Loaded(*load_quantized_trunk(bundle, precision, checkpoint, digest, calibration))
    return _Loaded(load_trunk(checkpoint, model.model.num_positions, bundle.manifest.dtype, digest))


class _Reference:
    """The trunk as sessions: as it is, and where it quantizes inputs also dithered within the target's bound."""

    def __init__(self, trunk: TriModeTrunk, relative: float, seed: int) -> None:
        self.session = TorchSession(trunk)
        self.guide: Guide | None = guide_inputs(trunk)
        guide = self.guide
        self.dithered = [DitheredSession(trunk, guide, relative, seed + number) for number in range(NUM_DITHERED)] if guide else []


class _Place(NamedTuple):
    """Where a target runs, and what it computes in."""

    backend: str
    device: str
    compute_dtype: DType


def _place(model: TriModeModel) -> _Place:
    if model.target == PORTABLE:
        return _Place("onnxruntime", "cpu", "float32")
    record = model.bundle.chosen.targets[model.target]
    return _Place(record.backend, record.device, record.compute_dtype)


def _open_target(bundle: Path, request: VerifyRequest) -> TriModeModel:
    try:
        model = TriModeModel.from_pretrained(bundle, precision=request.precision, target=request.target, num_threads=request.threads)
    except (BundleError, DeviceError, DependencyError) as error:
        raise type(error)(f"nothing was verified: {error.message}", error.hint) from error
    names = model.bundle.chosen.targets
    if model.target == PORTABLE and request.target != PORTABLE and names:
        # Generating may fall back to the portable graphs; saying that a GPU's engines are right because these are may not.
        raise DeviceError(f"nothing was verified: expected one of the bundle's targets to run here ({', '.join(names)}), found that none does",
                          "verify on the machine with the GPU, or pass --target portable for the portable graphs alone")  # fmt: skip
    return model


def _check_shape(checkpoint: Checkpoint, manifest: Manifest) -> None:
    config, model = checkpoint.config, manifest.model
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "mask_token_id")
    pairs = [(name, getattr(model, name), getattr(config, name)) for name in names]
    for name, expected, found in (*pairs, ("a drafter", model.has_drafter, checkpoint.drafter is not None)):
        if expected != found:
            raise UsageError(f"{checkpoint.path}: expected a checkpoint like the bundle's, {name} {expected}, found {found}",
                             f"the bundle was built from {manifest.source.name}")  # fmt: skip


def _prompts(model: TriModeModel, request: VerifyRequest, text: Ids, position: int) -> list[TokenPrompt]:
    """Those of the file, each until the model ends it; else a short and a long one of random tokens, which nothing ends."""
    if request.prompts_file is None:
        lengths = sorted({min(SHORT_POSITION, position), position})
        return [TokenPrompt(text[:length].tolist(), ()) for length in lengths]
    found = read_prompts_file(request.prompts_file, request.style)
    return [TokenPrompt(ids) for ids in encode_prompts(request.prompts_file, found, lambda: model.codec, model.model)]


def _is_exact(checkpoint: Checkpoint, stored: DType) -> bool:
    return stored == "float32" or all(entry.dtype == SAFETENSORS_NAMES[stored] for entry in checkpoint.tensors.values())


def _compare_graphs(
    model: TriModeModel, reference: _Reference, text: Ids, position: int, bounds: dict[Subject, Tolerance], seed: int, progress: Progress
) -> tuple[list[GraphParity], list[str]]:
    """The target's graphs and the portable ones, and notes about what was left out."""
    info = model.model
    positions = sorted({0, min(SHORT_POSITION, position), position})
    roles = tuple(model.bundle.manifest.contracts)
    advance = progress.stage("compare target", count_comparisons(model.session, info, positions, roles))
    read, other, *dithered = (CachedText(session, text) for session in (reference.session, model.session, *reference.dithered))
    records = _counted(compare_target(read, other, info, positions, bounds["target"], seed, dithered, roles), advance)
    if importlib.util.find_spec("onnxruntime") is None:
        return records, ["the portable graphs were not compared: ONNX Runtime is not installed (pip install 'trimode[ort]')"]
    files = model.bundle.chosen.graphs
    at = min(position, LONGEST_PORTABLE)
    advance = progress.stage("compare portable", len(files) + info.has_drafter)
    again = CachedText(reference.session, text)
    records += _counted(compare_portable(again, model.bundle.path, files, info, at, bounds["portable"], seed, reference.guide), advance)
    return records, []


def _counted(records: Iterator[Record], advance: Advance) -> list[Record]:
    collected = []
    for record in records:
        collected.append(record)
        advance(1)
    return collected


def _versions() -> dict[str, str]:
    found = {"trimode": trimode.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _show(verification: Verification, request: VerifyRequest) -> None:
    """The figures as two tables, and what they come to."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # in a file or a pipe, lines are not broken at 80 columns
    source = "the bundle's source" if verification.checkpoint.is_source else "NOT the bundle's source"
    what = f"{verification.precision} on {verification.target} ({verification.backend}, {verification.compute_dtype})"
    console.print(f"{what} against {request.checkpoint}, {source}")
    for line in _quantized_lines(verification):
        console.print(line)
    console.print(_graph_table(verification.graphs))
    console.print(_token_table(verification.tokens))
    if (sampler := verification.sampler) is not None:
        figures = f"{sampler.num_scores} scores, largest error {_number(sampler.max_error) or 'no number'}, allowed {_number(sampler.tolerance)}"
        console.print(f"learned sampler against {sampler.name}: {figures}  {_word(sampler.passed)}")
    for note in verification.notes:
        console.print(f"note: {note}")
    graphs, tokens = len(verification.graphs), len(verification.tokens)
    records = (*verification.graphs, *verification.tokens, verification.weights, verification.scales, verification.sampler)
    num_failed = sum(not record.passed for record in records if record is not None)
    console.print(f"{'passed' if verification.passed else 'FAILED'}: {graphs} graph comparisons and {tokens} generations, {num_failed} failed")


def _quantized_lines(verification: Verification) -> Iterator[str]:
    """What is said of quantized weights, their scales and quantized inputs."""
    weights, scales = verification.weights, verification.scales
    if weights is not None:
        differing = "".join(f"; {count} differ in {layer}" for layer, count in weights.differs.items())
        yield f"quantized weights: {weights.num_compared} numbers in {weights.num_layers} layers, bit for bit{differing}  {_word(weights.passed)}"
    if scales is not None:
        differing = "".join(f"; {name} differs" for name in scales.differs)
        yield f"scales against {scales.calibration}: {scales.num_layers} layers{differing}  {_word(scales.passed)}"
    codes = [record.codes for record in verification.graphs if record.codes is not None]
    if codes:
        refused = {layer: sum(record.refused.get(layer, 0) for record in codes) for record in codes for layer in record.refused}
        unexplained = "".join(f"; {count} unexplained in {layer}" for layer, count in refused.items())
        counts = f"{sum(record.num_compared for record in codes)}, {sum(record.num_other for record in codes)} on the other side of a border"
        yield f"quantized inputs of the portable graphs: {counts}{unexplained}  {_word(not refused)}"


def _graph_table(records: Sequence[GraphParity]) -> Table:
    """A line an output; portable graphs are marked."""
    table = Table("graph", "of", "in cache", "rows", "drafter", "output", "max error", "allowed", "mean error", "allowed", "same id", "",
                  title="graphs against the torch trunk", title_justify="left", box=None, header_style="bold")  # fmt: skip
    for record in records:
        same = " ".join(f"{ids.num_equal}/{ids.num_compared}" for ids in record.ids)
        for index, output in enumerate(record.outputs):
            where = (record.graph, record.subject, ",".join(map(str, record.positions)), str(record.rows), _switch(record.use_drafter))
            # The first line of a comparison speaks for its ids too.
            passed = output.passed if index else output.passed and _ids_passed(record)
            table.add_row(*where, output.name, *_figures(output), "" if index else same, _word(passed))
    return table


def _token_table(records: Sequence[TokenParity]) -> Table:
    table = Table("mode", "drafter", "against", "prompt", "same tokens", "parts at", "preferred by", "allowed", "nfe", "other nfe", "",
                  title="tokens", title_justify="left", box=None, header_style="bold")  # fmt: skip
    for record in records:
        table.add_row(
            record.mode.replace("_", "-"), _switch(record.use_drafter), record.against, f"{record.prompt_length} tokens",
            f"{record.num_equal}/{record.num_tokens}", _number(record.first_divergence), _number(record.preference), _number(record.tolerance),
            str(record.nfe), str(record.other_nfe), _word(record.passed),
        )  # fmt: skip
    return table


def _figures(output: OutputRecord) -> tuple[str, ...]:
    return tuple(_number(value) for value in (output.max_error, output.tolerance, output.mean_error, output.mean_tolerance))


def _ids_passed(record: GraphParity) -> bool:
    return all(ids.passed for ids in record.ids) and record.has_accepted_length is not False and (record.codes is None or record.codes.passed)


def _switch(use_drafter: bool | None) -> str:
    return "" if use_drafter is None else "on" if use_drafter else "off"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.2g}"


def _word(passed: bool) -> str:
    return "ok" if passed else "[bold red]FAILED[/bold red]"

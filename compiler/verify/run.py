"""Compares a bundle with its checkpoint, graph by graph and token by token."""

from __future__ import annotations

import datetime
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

import numpy as np

import trimode
from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.compiler.verify.graphs import (
    SHORT_POSITION,
    compare_portable,
    compare_target,
    count_comparisons,
)
from trimode.compiler.verify.rounding import NUM_DITHERED, DitheredSession, Guide, guide_inputs
from trimode.compiler.verify.runners import CachedText
from trimode.compiler.verify.sampler import compare_sampler, read_trained
from trimode.compiler.verify.tokens import TokenPrompt, compare_tokens, count_generations
from trimode.compiler.verify.tolerance import Tolerance, tolerance_for
from trimode.compiler.verify.weights import load_quantized_trunk
from trimode.errors import UsageError
from trimode.formats.calibration import QuantizedPrecision
from trimode.formats.contract import DType
from trimode.formats.files import sha256_of
from trimode.formats.manifest import MANIFEST, Manifest
from trimode.formats.safetensors import SAFETENSORS_NAMES
from trimode.formats.texts import name_of
from trimode.formats.verification import (
    BoundsRecord,
    CheckpointRecord,
    GraphParity,
    ScalesParity,
    Subject,
    Verification,
    WeightsParity,
)
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.identity import SourceDigest
from trimode.progress import Advance, Progress
from trimode.runtime.model import TriModeModel
from trimode.runtime.sessions.base import Ids
from trimode.runtime.sessions.select import PORTABLE
from trimode.runtime.text.prompts import USUAL_STYLE, PromptStyle, encode_prompts, read_prompts_file

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


def verify(
    model: TriModeModel, checkpoint: Checkpoint, request: VerifyRequest, progress: Progress
) -> Verification:
    """Compare the model's target, and the bundle's portable graphs, with the trunk of
    ``checkpoint``.
    """
    manifest, info = model.bundle.manifest, model.model
    trained = None if request.sampler is None else read_trained(request.sampler, manifest.sampler)
    position = long_position(checkpoint, manifest, request.long)
    text = np.random.default_rng(request.seed).integers(
        0, info.vocab_size, position + info.max_block_length
    )
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
    graphs, notes = _compare_graphs(
        model, reference, text, position, bounds, request.seed, progress
    )
    advance = progress.stage("compare tokens", count_generations(info, len(prompts), roles))
    tokens = _counted(
        compare_tokens(
            reference.session,
            model.session,
            info,
            prompts,
            request.max_new_tokens,
            bounds["target"],
            reference.dithered,
            roles,
        ),
        advance,
    )
    sha256 = digest.hexdigest()
    if not _is_exact(checkpoint, manifest.dtype):
        notes.append(
            f"the reference's weights are rounded to {manifest.dtype}, as the bundle's are"
        )
    if loaded.weights is not None and loaded.scales is None:
        notes.append(
            "the scales were taken as the bundle has them: --calibration FOLDER compares them with those it was built by"
        )
    sampler = (
        None if trained is None else compare_sampler(model.scorer, trained, info, request.seed)
    )
    if manifest.sampler is not None and sampler is None:
        notes.append(
            "the learned sampler was not compared: --sampler FOLDER compares it with the network that it was built from"
        )
    others = [name for name in model.bundle.chosen.targets if name != model.target]
    if others:
        notes.append(
            f"other targets of the bundle were not verified: {', '.join(others)} (--target NAME, where it runs)"
        )
    original = checkpoint.config.rope.original_max_position_embeddings or None
    if original is not None and position < original:
        notes.append(
            f"positions from {original} on, the rope's original length, were not reached: --long {original} would"
        )
    return Verification(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        passed=all(
            record.passed
            for record in (*graphs, *tokens, loaded.weights, loaded.scales, sampler)
            if record is not None
        ),
        precision=model.bundle.precision,
        target=model.target,
        backend=place.backend,
        device=place.device,
        compute_dtype=place.compute_dtype,
        manifest_sha256=sha256_of(model.bundle.path / MANIFEST),
        checkpoint=CheckpointRecord(
            name=name_of(checkpoint.path), sha256=sha256, is_source=sha256 == manifest.source.sha256
        ),
        seed=request.seed,
        long_position=position,
        original_length=original,
        weight_dtype=manifest.dtype,
        bounds={
            subject: BoundsRecord(dtype=bound.dtype, relative=bound.relative)
            for subject, bound in bounds.items()
        },
        weights=loaded.weights,
        scales=loaded.scales,
        sampler=sampler,
        graphs=tuple(graphs),
        tokens=tuple(tokens),
        notes=tuple(notes),
        versions=_versions(),
    )


def long_position(checkpoint: Checkpoint, manifest: Manifest, wanted: int | None) -> int:
    """Where the long comparisons stand: twice the rope's original length and a block, as far as the
    bundle reaches and the reference is quick.

    Raises:
        UsageError: ``wanted`` is out of range.
    """
    limit = max(1, manifest.model.max_length - manifest.model.block_size)
    if wanted is not None:
        if not 1 <= wanted <= limit:
            raise UsageError(
                f"expected --long from 1 to {limit}, found {wanted}",
                "a block has to fit behind it; a longer bundle needs --max-length",
            )
        return wanted
    original = checkpoint.config.rope.original_max_position_embeddings
    goal = 2 * original + manifest.model.block_size if original else DEFAULT_LONG_POSITION
    affordable = int(AFFORDABLE_FLOPS / (2 * manifest.source.num_parameters))
    return max(1, min(goal, affordable, limit))


def check_calibration(model: TriModeModel, request: VerifyRequest) -> None:
    """Raise :class:`UsageError` where a calibration is given for a precision that has none."""
    record = model.bundle.chosen.calibration
    if request.calibration is not None and (record is None or record.scales_sha256 is None):
        raise UsageError(
            f"expected --calibration with a precision that was built by one, found {model.bundle.precision}",
            "leave --calibration out",
        )


class _Loaded(NamedTuple):
    """The reference's trunk, and what loading it has found about quantized weights."""

    trunk: TriModeTrunk
    weights: WeightsParity | None = None
    scales: ScalesParity | None = None


def _load_reference(
    model: TriModeModel, checkpoint: Checkpoint, digest: SourceDigest, calibration: Path | None
) -> _Loaded:
    bundle = model.bundle
    for precision in get_args(QuantizedPrecision):
        if bundle.precision == precision:
            return _Loaded(
                *load_quantized_trunk(bundle, precision, checkpoint, digest, calibration)
            )
    return _Loaded(load_trunk(checkpoint, model.model.num_positions, bundle.manifest.dtype, digest))


class _Reference:
    """The trunk as sessions: as it is, and where it quantizes inputs also dithered within the
    target's bound.
    """

    def __init__(self, trunk: TriModeTrunk, relative: float, seed: int) -> None:
        self.session = TorchSession(trunk)
        self.guide: Guide | None = guide_inputs(trunk)
        guide = self.guide
        self.dithered = (
            [
                DitheredSession(trunk, guide, relative, seed + number)
                for number in range(NUM_DITHERED)
            ]
            if guide
            else []
        )


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


def check_shape(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Raise :class:`UsageError` where the checkpoint is of another shape than the bundle's."""
    config, model = checkpoint.config, manifest.model
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "mask_token_id",
    )
    pairs = [(name, getattr(model, name), getattr(config, name)) for name in names]
    for name, expected, found in (
        *pairs,
        ("a drafter", model.has_drafter, checkpoint.drafter is not None),
    ):
        if expected != found:
            raise UsageError(
                f"{checkpoint.path}: expected a checkpoint like the bundle's, {name} {expected}, found {found}",
                f"the bundle was built from {manifest.source.name}",
            )


def _prompts(
    model: TriModeModel, request: VerifyRequest, text: Ids, position: int
) -> list[TokenPrompt]:
    """Those of the file, each until the model ends it; else a short and a long one of random
    tokens, which nothing ends.
    """
    if request.prompts_file is None:
        lengths = sorted({min(SHORT_POSITION, position), position})
        return [TokenPrompt(text[:length].tolist(), ()) for length in lengths]
    found = read_prompts_file(request.prompts_file, request.style)
    return [
        TokenPrompt(ids)
        for ids in encode_prompts(request.prompts_file, found, lambda: model.codec, model.model)
    ]


def _is_exact(checkpoint: Checkpoint, stored: DType) -> bool:
    return stored == "float32" or all(
        entry.dtype == SAFETENSORS_NAMES[stored] for entry in checkpoint.tensors.values()
    )


def _compare_graphs(
    model: TriModeModel,
    reference: _Reference,
    text: Ids,
    position: int,
    bounds: dict[Subject, Tolerance],
    seed: int,
    progress: Progress,
) -> tuple[list[GraphParity], list[str]]:
    """The target's graphs and the portable ones, and notes about what was left out."""
    info = model.model
    positions = sorted({0, min(SHORT_POSITION, position), position})
    roles = tuple(model.bundle.manifest.contracts)
    advance = progress.stage(
        "compare target", count_comparisons(model.session, info, positions, roles)
    )
    read, other, *dithered = (
        CachedText(session, text)
        for session in (reference.session, model.session, *reference.dithered)
    )
    records = _counted(
        compare_target(read, other, info, positions, bounds["target"], seed, dithered, roles),
        advance,
    )
    if importlib.util.find_spec("onnxruntime") is None:
        return records, [
            "the portable graphs were not compared: ONNX Runtime is not installed (pip install 'trimode[ort]')"
        ]
    files = model.bundle.chosen.graphs
    at = min(position, LONGEST_PORTABLE)
    advance = progress.stage("compare portable", len(files) + info.has_drafter)
    again = CachedText(reference.session, text)
    records += _counted(
        compare_portable(
            again, model.bundle.path, files, info, at, bounds["portable"], seed, reference.guide
        ),
        advance,
    )
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

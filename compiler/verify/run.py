"""Compares a bundle with its checkpoint, graph by graph and token by token."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

import trimode
from trimode.compiler.verify.graphs import (
    SHORT_POSITION,
    compare_portable,
    compare_target,
    count_comparisons,
)
from trimode.compiler.verify.notes import notes_about
from trimode.compiler.verify.reference import LoadedTrunk, Reference, load_reference
from trimode.compiler.verify.runners import CachedText
from trimode.compiler.verify.sampler import compare_sampler, read_trained
from trimode.compiler.verify.tokens import TokenPrompt, compare_tokens, count_generations
from trimode.compiler.verify.tolerance import Tolerance, tolerance_for
from trimode.errors import UsageError
from trimode.formats.contract import DType
from trimode.formats.files import sha256_of
from trimode.formats.manifest import MANIFEST, Manifest
from trimode.formats.texts import name_of
from trimode.formats.verification import (
    BoundsRecord,
    CheckpointRecord,
    GraphParity,
    SamplerParity,
    Subject,
    TokenParity,
    Verification,
)
from trimode.formats.versions import PYTHON, versions
from trimode.graphs.checkpoint import Checkpoint
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
LIBRARIES = (PYTHON, "torch", "onnxruntime", "polygraphy", "numpy")


@dataclass(frozen=True)
class VerifyRequest:
    """Holds the options of the command, as given."""

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


class _Findings(NamedTuple):
    """Holds what the comparisons found."""

    position: int
    bounds: dict[Subject, Tolerance]
    loaded: LoadedTrunk
    graphs: list[GraphParity]
    tokens: list[TokenParity]
    sampler: SamplerParity | None
    notes: list[str]

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        loaded = self.loaded
        records = (*self.graphs, *self.tokens, loaded.weights, loaded.scales, self.sampler)
        return all(record.passed for record in records if record is not None)


def verify(
    model: TriModeModel, checkpoint: Checkpoint, request: VerifyRequest, progress: Progress
) -> Verification:
    """Compare the model's target, and the bundle's portable graphs, with its checkpoint.

    Raises:
        UsageError: an option is out of range.
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
    loaded = load_reference(model, checkpoint, digest.read, request.calibration)
    advance(1)
    bounds: dict[Subject, Tolerance] = {
        "target": tolerance_for(_place(model).compute_dtype, info.num_hidden_layers),
        "portable": tolerance_for("float32", info.num_hidden_layers),
    }
    reference = Reference(loaded.trunk, bounds["target"].relative, request.seed)
    graphs, notes = _compare_graphs(
        model, reference, text, position, bounds, request.seed, progress
    )
    tokens = _compare_tokens(
        model, reference, prompts, request.max_new_tokens, bounds["target"], progress
    )
    sampler = (
        None if trained is None else compare_sampler(model.scorer, trained, info, request.seed)
    )
    notes += notes_about(model, checkpoint, loaded, sampler, position)
    found = _Findings(position, bounds, loaded, graphs, tokens, sampler, notes)
    return _describe(model, checkpoint, digest.hexdigest(), request.seed, found)


def _describe(
    model: TriModeModel, checkpoint: Checkpoint, sha256: str, seed: int, found: _Findings
) -> Verification:
    """The record of a verification; ``sha256`` is the checkpoint's."""
    manifest, place = model.bundle.manifest, _place(model)
    return Verification(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        passed=found.passed,
        precision=model.bundle.precision,
        target=model.target,
        backend=place.backend,
        device=place.device,
        compute_dtype=place.compute_dtype,
        manifest_sha256=sha256_of(model.bundle.path / MANIFEST),
        checkpoint=CheckpointRecord(
            name=name_of(checkpoint.path), sha256=sha256, is_source=sha256 == manifest.source.sha256
        ),
        seed=seed,
        long_position=found.position,
        original_length=checkpoint.config.rope.original_max_position_embeddings or None,
        weight_dtype=manifest.dtype,
        bounds={
            subject: BoundsRecord(dtype=bound.dtype, relative=bound.relative)
            for subject, bound in found.bounds.items()
        },
        weights=found.loaded.weights,
        scales=found.loaded.scales,
        sampler=found.sampler,
        graphs=tuple(found.graphs),
        tokens=tuple(found.tokens),
        notes=tuple(found.notes),
        versions={"trimode": trimode.__version__, **versions(LIBRARIES)},
    )


def long_position(checkpoint: Checkpoint, manifest: Manifest, wanted: int | None) -> int:
    """Choose the position of the long comparisons.

    By default, twice the rope's original length and a block, as far as the bundle reaches and the
    reference is quick.

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
            "expected --calibration with a precision that was built by one,"
            f" found {model.bundle.precision}",
            "leave --calibration out",
        )


class _Place(NamedTuple):
    """Names where a target runs, and the type it computes in."""

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
                f"{checkpoint.path}: expected a checkpoint like the bundle's, {name} {expected},"
                f" found {found}",
                f"the bundle was built from {manifest.source.name}",
            )


def _prompts(
    model: TriModeModel, request: VerifyRequest, text: Ids, position: int
) -> list[TokenPrompt]:
    """Read the file's prompts, else draw a short and a long one.

    Nothing ends the texts of random tokens.
    """
    if request.prompts_file is None:
        lengths = sorted({min(SHORT_POSITION, position), position})
        return [TokenPrompt(text[:length].tolist(), ()) for length in lengths]
    found = read_prompts_file(request.prompts_file, request.style)
    return [
        TokenPrompt(ids)
        for ids in encode_prompts(request.prompts_file, found, lambda: model.codec, model.model)
    ]


def _compare_graphs(
    model: TriModeModel,
    reference: Reference,
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
    read, other, *perturbed = (
        CachedText(session, text)
        for session in (reference.session, model.session, *reference.perturbed)
    )
    bound = bounds["target"]
    compared = compare_target(
        read, other, info, positions, bound, seed, perturbed=perturbed, roles=roles
    )
    records = _counted(compared, advance)
    if importlib.util.find_spec("onnxruntime") is None:
        return records, [
            "the portable graphs were not compared: ONNX Runtime is not installed"
            " (pip install 'trimode[ort]')"
        ]
    return records + _compare_portable(
        model, reference, text, position, bounds["portable"], seed, progress
    ), []


def _compare_portable(
    model: TriModeModel,
    reference: Reference,
    text: Ids,
    position: int,
    bound: Tolerance,
    seed: int,
    progress: Progress,
) -> list[GraphParity]:
    bundle, info = model.bundle, model.model
    files = bundle.chosen.graphs
    advance = progress.stage("compare portable", len(files) + info.has_drafter)
    compared = compare_portable(
        CachedText(reference.session, text),
        bundle.path,
        files,
        info,
        min(position, LONGEST_PORTABLE),
        bound,
        seed=seed,
        guide=reference.guide,
    )
    return _counted(compared, advance)


def _compare_tokens(
    model: TriModeModel,
    reference: Reference,
    prompts: list[TokenPrompt],
    max_new_tokens: int,
    bound: Tolerance,
    progress: Progress,
) -> list[TokenParity]:
    info, roles = model.model, tuple(model.bundle.manifest.contracts)
    advance = progress.stage("compare tokens", count_generations(info, len(prompts), roles))
    compared = compare_tokens(
        reference.session,
        model.session,
        info,
        prompts,
        max_new_tokens,
        bound,
        perturbed=reference.perturbed,
        roles=roles,
    )
    return _counted(compared, advance)


def _counted(records: Iterator[Record], advance: Advance) -> list[Record]:
    collected = []
    for record in records:
        collected.append(record)
        advance(1)
    return collected

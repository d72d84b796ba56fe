"""Compares a bundle with its checkpoint."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

import trimode
from trimode.compiler.verify.checks import (
    check_calibration,
    check_numbers,
    check_shape,
    long_position,
)
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
from trimode.formats.contract import DType, ModelInfo
from trimode.formats.files import sha256_of
from trimode.formats.manifest import MANIFEST
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
from trimode.progress import Advance, Progress, Silent
from trimode.runtime.model import TriModeModel
from trimode.runtime.sessions.base import Ids
from trimode.runtime.sessions.select import PORTABLE
from trimode.runtime.text.prompts import USUAL_STYLE, PromptStyle, encode_prompts, read_prompts_file

LONGEST_PORTABLE = 2048
"""Most tokens in the cache that is handed to a portable graph, whole, as an input."""
Record = TypeVar("Record")
LIBRARIES = (PYTHON, "torch", "onnxruntime", "polygraphy", "numpy")


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
    model: TriModeModel,
    checkpoint: Checkpoint,
    *,
    calibration: Path | None = None,
    sampler: Path | None = None,
    prompts_file: Path | None = None,
    style: PromptStyle = USUAL_STYLE,
    seed: int = 0,
    long: int | None = None,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
) -> Verification:
    """Compare the model's target, and the bundle's portable graphs, with its checkpoint.

    Args:
        model: The bundle, opened for one target.
        checkpoint: Checkpoint that it was built from, with the drafter that it was built with.
        calibration: Folder of the scales to compare the bundle's with; None = the bundle's are
            taken as they are.
        sampler: Folder of the learned sampler that it was built with; None = none is compared.
        prompts_file: File of prompts; None = random tokens.
        style: Way in which the file's prompts reach the model.
        seed: Seed for random tokens.
        long: Position of the long comparisons; None = past the rope's original length, where the
            reference can afford it.
        max_new_tokens: Most tokens of each generation.
        progress: Listener that is told about stages; None is silent.

    Raises:
        UsageError: a number is out of range, the checkpoint is of another shape, or the calibration
            or the sampler is not the bundle's.
        CheckpointError: the checkpoint, the calibration or the sampler cannot be read.
        BundleError: a scale of the bundle is no positive number.
    """
    progress, manifest = progress or Silent(), model.bundle.manifest
    check_numbers(seed, max_new_tokens)
    check_calibration(model, calibration)
    check_shape(checkpoint, manifest)
    trained = None if sampler is None else read_trained(sampler, manifest.sampler)
    position = long_position(checkpoint, manifest, long)
    text = _random_text(model.model, position, seed)
    prompts = (
        _random_prompts(text, position)
        if prompts_file is None
        else _prompts(model, prompts_file, style)
    )
    advance = progress.stage("read checkpoint", 1)
    digest = SourceDigest(checkpoint)
    loaded = load_reference(model, checkpoint, digest.read, calibration)
    advance(1)
    comparison = _Comparison(model, loaded, text, position, seed, progress)
    graphs, notes = comparison.graphs()
    tokens = comparison.tokens(prompts, max_new_tokens)
    scored = None if trained is None else compare_sampler(model.scorer, trained, model.model, seed)
    notes += notes_about(model, checkpoint, loaded, scored, position)
    found = _Findings(position, comparison.bounds, loaded, graphs, tokens, scored, notes)
    return _describe(model, checkpoint, digest.hexdigest(), seed, found)


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


class _Place(NamedTuple):
    """Names where a target runs, and the type it computes in."""

    backend: str
    device: str
    compute_dtype: DType
    rounds_inputs: bool = False


def _place(model: TriModeModel) -> _Place:
    if model.target == PORTABLE:
        return _Place("onnxruntime", "cpu", "float32")
    record = model.bundle.chosen.targets[model.target]
    return _Place(record.backend, record.device, record.compute_dtype, record.int4_inputs == "int8")


def _random_text(model: ModelInfo, position: int, seed: int) -> Ids:
    """Draw the tokens of the comparisons, ``(n,)`` int64.

    They are one block more than the longest cache.
    """
    rng = np.random.default_rng(seed)
    return rng.integers(0, model.vocab_size, position + model.max_block_length)


def _random_prompts(text: Ids, position: int) -> list[TokenPrompt]:
    """A short and a long prompt; nothing ends their texts."""
    lengths = sorted({min(SHORT_POSITION, position), position})
    return [TokenPrompt(text[:length].tolist(), ()) for length in lengths]


def _prompts(model: TriModeModel, file: Path, style: PromptStyle) -> list[TokenPrompt]:
    found = read_prompts_file(file, style)
    encoded = encode_prompts(file, found, lambda: model.codec, model.model)
    return [TokenPrompt(ids) for ids in encoded]


class _Comparison:
    """Compares a bundle with the trunk: graphs, then tokens."""

    def __init__(
        self,
        model: TriModeModel,
        loaded: LoadedTrunk,
        text: Ids,
        position: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self._model, self._text, self._position = model, text, position
        self._seed, self._progress = seed, progress
        self._graph_names = tuple(model.bundle.manifest.contracts)
        num_layers = model.model.num_hidden_layers
        self.bounds: dict[Subject, Tolerance] = {
            "target": tolerance_for(_place(model).compute_dtype, num_layers),
            "portable": tolerance_for("float32", num_layers),
        }
        self._reference = Reference(
            loaded.trunk,
            self.bounds["target"].relative,
            seed,
            rounds_inputs=_place(model).rounds_inputs,
        )

    def graphs(self) -> tuple[list[GraphParity], list[str]]:
        """Compare the target's graphs and the portable ones.

        Returns:
            Records, and notes about what was left out.
        """
        records = self._target()
        if importlib.util.find_spec("onnxruntime") is None:
            return records, [
                "the portable graphs were not compared: ONNX Runtime is not installed"
                " (pip install 'trimode[ort]')"
            ]
        return records + self._portable(), []

    def tokens(self, prompts: list[TokenPrompt], max_new_tokens: int) -> list[TokenParity]:
        """Every mode's tokens after each prompt."""
        info = self._model.model
        count = count_generations(info, len(prompts), self._graph_names)
        advance = self._progress.stage("compare tokens", count)
        compared = compare_tokens(
            self._reference.session,
            self._model.session,
            info,
            prompts,
            max_new_tokens,
            self.bounds["target"],
            perturbed=self._reference.perturbed,
            graph_names=self._graph_names,
        )
        return _counted(compared, advance)

    def _target(self) -> list[GraphParity]:
        model, reference = self._model, self._reference
        positions = sorted({0, min(SHORT_POSITION, self._position), self._position})
        count = count_comparisons(model.session, model.model, positions, self._graph_names)
        advance = self._progress.stage("compare target", count)
        compared = compare_target(
            CachedText(reference.session, self._text),
            CachedText(model.session, self._text),
            model.model,
            positions,
            self.bounds["target"],
            self._seed,
            perturbed=[CachedText(session, self._text) for session in reference.perturbed],
            graph_names=self._graph_names,
        )
        return _counted(compared, advance)

    def _portable(self) -> list[GraphParity]:
        bundle, info = self._model.bundle, self._model.model
        files = bundle.chosen.graphs
        advance = self._progress.stage("compare portable", len(files) + info.has_drafter)
        with self._reference.portable() as guide:
            compared = compare_portable(
                CachedText(self._reference.session, self._text),
                bundle.path,
                files,
                info,
                min(self._position, LONGEST_PORTABLE),
                self.bounds["portable"],
                seed=self._seed,
                guide=guide,
            )
            return _counted(compared, advance)


def _counted(records: Iterator[Record], advance: Advance) -> list[Record]:
    collected = []
    for record in records:
        collected.append(record)
        advance(1)
    return collected

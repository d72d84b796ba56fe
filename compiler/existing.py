"""Decides whether a bundle that is there already may be added to, and what it lacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trimode.compiler.plan import BuildPlan
from trimode.compiler.progress import Progress
from trimode.errors import BundleError, UsageError
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.source import SourceDigest, stamp_of
from trimode.runtime.bundle import open_bundle
from trimode.runtime.manifest import MANIFEST, Manifest

_FORCE = "pass --force to replace it, or choose another output"


def read_existing(output: Path) -> Manifest | None:
    """The manifest of the bundle at ``output``, whose files are there in their sizes; None where there is no bundle.

    Raises:
        UsageError: it is damaged, or of another schema.
    """
    if not (output / MANIFEST).is_file():
        return None
    try:
        return open_bundle(output, verify=False).manifest
    except BundleError as error:
        raise UsageError(f"{output}: expected a bundle that can be added to, found: {error.message}", _FORCE) from error


def without_built(plan: BuildPlan, base: Manifest) -> BuildPlan:
    """What is left of a plan when the bundle has some of its targets, exactly as planned, already."""
    left = {name: record for name, record in plan.records.items() if base.targets.get(name) != record}
    return replace(plan, records=left, targets={name: plan.targets[name] for name in left})


def check_same(base: Manifest, output: Path, plan: BuildPlan, progress: Progress) -> None:
    """Refuse to mix: the bundle must hold this checkpoint, in this precision, for these lengths.

    Raises:
        UsageError: it does not.
    """
    if base.precision != plan.precision:
        found = f"{output}: expected a bundle in {plan.precision}, found one in {base.precision}, which all its targets share"
        raise UsageError(found, _FORCE)
    if plan.quantization is not None and plan.quantization.record != base.calibration:
        asked, held = plan.quantization.record, base.calibration
        found = f"{output}: expected a bundle with the scales of {asked.name} ({asked.algorithm}), found those of {held.name if held else 'none'}"
        raise UsageError(found, _FORCE)
    if not _same_source(base, plan.checkpoint, progress):
        drafter = f" with the drafter {plan.checkpoint.adapter}" if plan.checkpoint.adapter else ""
        found = f"{output}: expected a bundle of {plan.checkpoint.path}{drafter}, found one of other weights ({base.source.name})"
        raise UsageError(found, _FORCE)
    for name, found in base.model.model_dump().items():
        expected = getattr(plan.model, name)
        if found != expected:
            raise UsageError(f"{output}: expected a bundle with {name} {expected}, found {found}", _FORCE)


def drop_targets(base: Manifest, names: list[str]) -> Manifest:
    """The manifest without these targets and the files that only they use."""
    kept = {name: record for name, record in base.targets.items() if name not in names}
    gone = {engine.file for name in names if name in base.targets for engine in base.targets[name].graphs.values()}
    gone -= {engine.file for record in kept.values() for engine in record.graphs.values()} | {graph.file for graph in base.graphs.values()}
    return base.model_copy(update={"targets": kept, "files": {name: record for name, record in base.files.items() if name not in gone}})


def _same_source(base: Manifest, checkpoint: Checkpoint, progress: Progress) -> bool:
    """By the stamp; where that differs (a copied or touched checkpoint) by reading every byte."""
    if base.source.stamp == stamp_of(checkpoint):
        return True
    digest = SourceDigest(checkpoint)
    advance = progress.stage("compare weights", sum(entry.num_bytes for entry in checkpoint.tensors.values()))
    for count in digest.read_all():
        advance(count)
    return digest.hexdigest() == base.source.sha256

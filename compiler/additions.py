"""Decides whether and how an existing bundle may be added to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trimode.compiler.plan import BuildPlan
from trimode.errors import BundleError, UsageError
from trimode.formats.manifest import MANIFEST, Manifest, PrecisionName
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.identity import digest_of, stamp_of
from trimode.progress import Progress
from trimode.runtime.bundle.open import files_of, open_bundle

_FORCE = "pass `force` to replace it, or choose another output"


def read_existing(output: Path) -> Manifest | None:
    """Read the manifest of the bundle at ``output``; None where there is none.

    Its files must be there in their sizes.

    Raises:
        UsageError: it is damaged, or of another schema.
    """
    if not (output / MANIFEST).is_file():
        return None
    try:
        return open_bundle(output, verify=False).manifest
    except BundleError as error:
        raise UsageError(
            f"{output}: expected a bundle that can be added to, found: {error.message}", _FORCE
        ) from error


def without_built(plan: BuildPlan, base: Manifest) -> BuildPlan:
    """Leave out of a plan the targets that the bundle has exactly as planned."""
    there = base.precisions[plan.precision].targets if plan.precision in base.precisions else {}
    built = {name: record.without_plans() for name, record in there.items()}
    left = {name: record for name, record in plan.records.items() if built.get(name) != record}
    return replace(plan, records=left, targets={name: plan.targets[name] for name in left})


def check_same(base: Manifest, output: Path, plan: BuildPlan, progress: Progress) -> None:
    """Refuse to add what does not belong to the bundle.

    The bundle must hold this checkpoint, for these lengths. Where it has this precision, it must be
    by the same calibration.

    Raises:
        UsageError: it does not.
        CheckpointError: the calibration of a precision that is to be added, or the sampler, is of
            another checkpoint.
    """
    there = base.precisions.get(plan.precision)
    if (
        there is not None
        and plan.quantization is not None
        and plan.quantization.record != there.calibration
    ):
        asked, held = plan.quantization.record, there.calibration
        raise UsageError(
            f"{output}: expected a bundle with the scales of {asked.name} ({asked.algorithm}),"
            f" found those of {held.name if held else 'none'}",
            _FORCE,
        )
    if not _same_source(base, plan.checkpoint, progress):
        drafter = f" with the drafter {plan.checkpoint.adapter}" if plan.checkpoint.adapter else ""
        raise UsageError(
            f"{output}: expected a bundle of {plan.checkpoint.path}{drafter},"
            f" found one of other weights ({base.source.name})",
            _FORCE,
        )
    for name, found in base.model.model_dump().items():
        expected = getattr(plan.model, name)
        if found != expected:
            raise UsageError(
                f"{output}: expected a bundle with {name} {expected}, found {found}", _FORCE
            )
    is_calibrated = (
        there is None
        and plan.quantization is not None
        and plan.quantization.source_sha256 is not None
    )
    if not is_calibrated and plan.sampler is None:
        return
    digest = _base_digest(base, plan.checkpoint, progress)
    if is_calibrated and plan.quantization is not None:
        plan.quantization.check_source(digest)
    if plan.sampler is not None:
        plan.sampler.check_source(digest)


def drop_targets(base: Manifest, precision: PrecisionName, names: list[str]) -> Manifest:
    """Drop targets of a precision, and the files that only they use."""
    if precision not in base.precisions:
        return base
    record = base.precisions[precision]
    rest = record.model_copy(
        update={
            "targets": {
                name: target for name, target in record.targets.items() if name not in names
            }
        }
    )
    gone = files_of(record) - files_of(rest)
    files = {name: file for name, file in base.files.items() if name not in gone}
    return base.model_copy(
        update={"precisions": {**base.precisions, precision: rest}, "files": files}
    )


def _same_source(base: Manifest, checkpoint: Checkpoint, progress: Progress) -> bool:
    """Compare stamps; where they differ, read every byte.

    A copied or touched checkpoint has another stamp.
    """
    if base.source.stamp == stamp_of(checkpoint):
        return True
    advance = progress.stage("compare weights", checkpoint.num_bytes)
    return digest_of(checkpoint, advance).hexdigest() == base.source.sha256


def _base_digest(base: Manifest, checkpoint: Checkpoint, progress: Progress) -> str:
    """Digest of the checkpoint without its adapter.

    Calibrations belong to this digest. The manifest has that of the whole.
    """
    if checkpoint.drafter is None:
        return base.source.sha256
    advance = progress.stage("compare digests", checkpoint.num_bytes)
    return digest_of(checkpoint, advance).base_hexdigest()

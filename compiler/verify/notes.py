"""Notes what a verification left out."""

from __future__ import annotations

from collections.abc import Iterator

from trimode.compiler.verify.reference import LoadedTrunk
from trimode.formats.contract import DType
from trimode.formats.safetensors import SAFETENSORS_NAMES
from trimode.formats.verification import SamplerParity
from trimode.graphs.checkpoint import Checkpoint
from trimode.runtime.model import TriModeModel


def notes_about(
    model: TriModeModel,
    checkpoint: Checkpoint,
    loaded: LoadedTrunk,
    sampler: SamplerParity | None,
    position: int,
) -> Iterator[str]:
    """Name what was not compared, in the order of the report.

    Args:
        model: The bundle.
        checkpoint: Checkpoint of the bundle.
        loaded: The reference.
        sampler: Comparison of the learned sampler; None where there was none.
        position: Longest position of the comparisons.
    """
    manifest = model.bundle.manifest
    if not _is_exact(checkpoint, manifest.dtype):
        yield f"the reference's weights are rounded to {manifest.dtype}, as the bundle's are"
    if loaded.weights is not None and loaded.scales is None:
        yield (
            "the scales were taken as the bundle has them: `calibration` FOLDER compares them with"
            " those it was built by"
        )
    if manifest.sampler is not None and sampler is None:
        yield (
            "the learned sampler was not compared: `sampler` FOLDER compares it with the network"
            " that it was built from"
        )
    others = [name for name in model.bundle.chosen.targets if name != model.target]
    if others:
        yield (
            f"other targets of the bundle were not verified: {', '.join(others)}"
            " (`target` NAME, where it runs)"
        )
    original = checkpoint.config.rope.original_max_position_embeddings
    if original and position < original:
        yield (
            f"positions from {original} on, the rope's original length, were not reached:"
            f" `long` {original} would"
        )


def _is_exact(checkpoint: Checkpoint, stored: DType) -> bool:
    return stored == "float32" or all(
        entry.dtype == SAFETENSORS_NAMES[stored] for entry in checkpoint.tensors.values()
    )

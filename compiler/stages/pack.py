"""Lays out the weight pack, and starts and ends its writing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from trimode.compiler.pack.layout import PackedTensor, PackLayout, plan_pack, read_shared_tensors
from trimode.compiler.pack.writer import PackWriter
from trimode.compiler.plan import BuildPlan
from trimode.compiler.stages.state import BuildState
from trimode.formats.manifest import Manifest
from trimode.graphs.identity import SourceDigest


def lay_out_pack(
    plan: BuildPlan, held: Mapping[str, PackedTensor] = MappingProxyType({})
) -> tuple[PackLayout, SourceDigest]:
    """Lay out the pack of a precision; tensors of ``held`` lie in other packs."""
    return plan_pack(
        plan.checkpoint,
        plan.model.num_positions,
        plan.dtype,
        plan.quantization,
        file=plan.names.pack,
        held=held,
    )


def lay_out_beside(
    base: Manifest, plan: BuildPlan, output: Path, folder: Path
) -> tuple[PackLayout, list[Path]]:
    """Lay out the pack of one more precision of a bundle.

    Args:
        base: Manifest of the bundle.
        plan: Plan with the precision that is added.
        output: Folder of the bundle.
        folder: Folder that the new pack is written to.

    Returns:
        The layout, and the packs that the precision uses, its own first.
    """
    names = dict.fromkeys(name for record in base.precisions.values() for name in record.packs)
    layout, _ = lay_out_pack(plan, read_shared_tensors(output / name for name in names))
    used = {tensor.file for tensor in layout.tensors.values()}
    others = [output / name for name in names if name in used]
    return layout, [folder / plan.names.pack, *others]


def start_weights(state: BuildState) -> None:
    """Begin to copy the checkpoint into one pack.

    Writing waits for the disk while the next stages keep the processor busy.
    """
    assert state.layout is not None
    state.writer = PackWriter(
        state.layout, state.packs[0], state.progress.stage("write weights", state.layout.num_bytes)
    )


def finish_weights(state: BuildState) -> None:
    """Wait until the pack is written."""
    state.record(state.packs[0].name, state.pack_sha256(state.packs[0]))

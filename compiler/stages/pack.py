"""Lays out the weight pack, and starts and ends its writing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from trimode.compiler.pack.layout import PackedTensor, PackLayout, plan_pack, read_shared_tensors
from trimode.compiler.plan import BuildPlan
from trimode.compiler.stages.state import WithPack
from trimode.formats.manifest import Manifest
from trimode.graphs.checkpoint import Read


def lay_out_pack(
    plan: BuildPlan, read: Read, held: Mapping[str, PackedTensor] = MappingProxyType({})
) -> PackLayout:
    """Lay out the pack of a precision.

    Args:
        plan: Plan of the build.
        read: Function that reads the checkpoint's tensors.
        held: Tensors that lie in other packs.
    """
    return plan_pack(
        plan.checkpoint,
        plan.model.num_positions,
        plan.dtype,
        plan.quantization,
        file=plan.names.pack,
        held=held,
        read=read,
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
    held = read_shared_tensors(output / name for name in names)
    layout = lay_out_pack(plan, plan.checkpoint.read, held)
    used = {tensor.file for tensor in layout.tensors.values()}
    others = [output / name for name in names if name in used]
    return layout, [folder / plan.names.pack, *others]


def start_weights(state: WithPack) -> None:
    """Begin to copy the checkpoint into one pack.

    Writing waits for the disk while the next stages keep the processor busy.
    """
    state.writer.start(state.progress.stage("write weights", state.writer.num_bytes))


def check_weights(state: WithPack) -> None:
    """Raise what has gone wrong with the weights by now, before more work is done."""
    state.check_weights()


def finish_weights(state: WithPack) -> None:
    """Wait until the pack is written."""
    state.record(state.packs[0].name, state.pack_sha256(state.packs[0]))

"""Starts and ends the writing of the weight pack."""

from __future__ import annotations

from trimode.compiler.pack.writer import PackWriter
from trimode.compiler.stages.state import BuildState


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

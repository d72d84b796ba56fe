from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import SHAPES, config_of, write_checkpoint
from reference import Reference

from trimode.compiler.pipeline import build_bundle
from trimode.runtime import TriModeModel

# The models are tiny: a second thread only waits for the first.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Built:
    """A random checkpoint, its bundle opened, and the independent model of the same weights."""

    checkpoint: Path
    bundle: Path
    model: TriModeModel
    reference: Reference


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Build a named shape, once a session."""
    done: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in done:
            changes, dtype, rank, shards = SHAPES[name]
            folder = tmp_path_factory.mktemp(name)
            checkpoint = write_checkpoint(folder / "checkpoint", config_of(**changes), dtype=dtype, rank=rank, shards=shards)
            build_bundle(checkpoint, folder / "bundle")
            model = TriModeModel.from_pretrained(folder / "bundle", num_threads=1)
            done[name] = Built(checkpoint, folder / "bundle", model, Reference(checkpoint))
        return done[name]

    return build

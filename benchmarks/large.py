"""Bundles of published sizes with few layers, for what their engines' plans say.

Weights are zeros, so the checkpoint takes no disk; the packs of its bundles do.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

import trimode
from benchmarks.build_scale import write_sparse_checkpoint
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.formats.calibration import SCHEMA_VERSION, Calibration, save_calibration
from trimode.formats.contract import GraphName
from trimode.formats.manifest import Manifest
from trimode.formats.plans import PlanRecord
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.identity import SourceDigest

RANK = 128
"""Rank of the published drafters."""
ScaleKind = Literal["tensor", "row"]


@contextmanager
def sparse_checkpoint(size: str, num_layers: int | None) -> Iterator[Path]:
    """A checkpoint of zeros with a drafter, in a folder of its own for what is made from it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        write_sparse_checkpoint(folder, size, num_layers=num_layers, rank=RANK)
        yield folder


def write_scales(folder: Path, checkpoint: Path, precision: Any, kind: ScaleKind) -> Path:
    """A calibration: any scales, one for each weight or one for each of its rows."""
    opened = open_checkpoint(checkpoint)
    digest = SourceDigest(opened)
    for _ in digest.read_all():
        pass
    scales = {}
    for name, entry in opened.tensors.items():
        if name.endswith("_proj.weight") and ".lora_" not in name:
            layer = name.removesuffix(".weight")
            shape = () if kind == "tensor" else entry.shape[:1]
            scales[f"{layer}.weight_amax"] = np.full(shape, 2, np.float32)
            scales[f"{layer}.input_amax"] = np.array(3, np.float32)
    record = Calibration(
        schema_version=SCHEMA_VERSION,
        trimode_version=trimode.__version__,
        precision=precision,
        algorithm="max",
        block_size=None,
        source_name=checkpoint.name,
        source_sha256=digest.base_hexdigest(),
        scales_sha256="",
        data=None,
        layers={},
        libraries={},
    )
    save_calibration(folder, record, scales)
    return folder


def calibration_for(
    checkpoint: Path, precision: str, kind: ScaleKind | None
) -> Path | Literal["rtn"] | None:
    """What quantizes: nothing, rounding to nearest, or scales of a kind."""
    if precision == "bf16":
        return None
    if kind is None:
        return "rtn"
    return write_scales(checkpoint.with_name(f"scales-{kind}"), checkpoint, precision, kind)


def plans_of(
    checkpoint: Path, options: BuildOptions
) -> tuple[Manifest, dict[str, dict[GraphName, tuple[PlanRecord, ...]]]]:
    """Build, and delete the bundle; its manifest, and the plans by target and graph."""
    bundle = checkpoint.with_name("bundle")
    try:
        result = build_bundle(checkpoint, bundle, options)
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
    plans = {
        name: {graph_name: engine.plans for graph_name, engine in record.graphs.items()}
        for name, record in result.record.targets.items()
    }
    missing = [name for name, by_graph in plans.items() if not all(by_graph.values())]
    if missing:
        raise RuntimeError(f"expected plans that are understood, found none for {missing}")
    return result.manifest, plans

"""Holds what the stages of a build hand on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from trimode.compiler.pack.layout import PackedTensor, PackLayout
from trimode.compiler.pack.writer import PackWriter
from trimode.compiler.plan import BuildPlan
from trimode.compiler.store.cache import ContentCache
from trimode.formats.contract import Role
from trimode.formats.files import sha256_of
from trimode.formats.manifest import FileRecord, Manifest
from trimode.graphs.identity import SourceDigest
from trimode.progress import Progress

Graphs = dict[Role, ir.Model]
Packs = dict[Path, str]
"""Weight packs of a precision, its own first, and the sha256 of each."""


@dataclass
class BuildState:
    """Holds what the stages hand on.

    Attributes:
        folder: Folder that files are written to; it becomes the bundle, or part of it.
        packs: Paths of the precision's weight packs, its own first; outside ``folder`` where the
            bundle has them already.
        tensors: Places of the tensors in the packs.
        layout: Layout of the pack that is written; None where the precision is there already.
        source: Digest of the checkpoint, complete when the pack is written; None for a bundle that
            exists already, which was compared with it.
        base: Manifest of the bundle that exists already.
    """

    plan: BuildPlan
    progress: Progress
    cache: ContentCache | None
    folder: Path
    packs: list[Path]
    tensors: dict[str, PackedTensor]
    layout: PackLayout | None = None
    source: SourceDigest | None = None
    base: Manifest | None = None
    graphs: Graphs = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    writer: PackWriter | None = None
    num_cached: int = 0
    manifest: Manifest | None = None

    def record(self, name: str, sha256: str | None = None) -> None:
        """Enter a written file into the manifest's list."""
        path = self.folder / name
        self.files[name] = FileRecord(
            sha256=sha256 or sha256_of(path), num_bytes=path.stat().st_size
        )

    def pack_sha256(self, path: Path) -> str:
        """Digest of a weight pack, once it is written."""
        if self.base is not None and path.name in self.base.files:
            return self.base.files[path.name].sha256
        assert self.writer is not None
        return self.writer.result()

    def check_weights(self) -> None:
        """Raise what has gone wrong with the weights by now.

        That is what writing the pack raised, or a calibration or sampler of another checkpoint.
        """
        if self.writer is None or not self.writer.check() or self.source is None:
            return
        if self.plan.quantization is not None:
            self.plan.quantization.check_source(self.source.base_hexdigest())
        if self.plan.sampler is not None:
            self.plan.sampler.check_source(self.source.base_hexdigest())

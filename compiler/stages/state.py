"""Holds what stages pass on, in a class per kind of build."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from trimode.compiler.pack.layout import PackedTensor
from trimode.compiler.pack.writer import PackWriter
from trimode.compiler.plan import BuildPlan
from trimode.compiler.store.cache import ContentCache
from trimode.formats.contract import GraphName
from trimode.formats.files import sha256_of
from trimode.formats.manifest import FileRecord, Manifest
from trimode.graphs.identity import SourceDigest
from trimode.progress import Progress

Graphs = dict[GraphName, ir.Model]


@dataclass(kw_only=True)
class BuildState(ABC):
    """Holds what every build has.

    Attributes:
        plan: Plan of the build.
        progress: Listener that is told about stages.
        cache: Cache of graphs and engines; None keeps none.
        folder: Folder that files are written to; it becomes the bundle, or part of it.
        packs: Paths of the precision's weight packs, its own first; outside ``folder`` where the
            bundle has them already.
        tensors: Places of the tensors in the packs.
        graphs: Traced graphs.
        files: Files that have been written.
        num_cached: Number of engines that came from the cache.
        manifest: Manifest of the bundle, which the last stage makes.
    """

    plan: BuildPlan
    progress: Progress
    cache: ContentCache | None
    folder: Path
    packs: list[Path]
    tensors: dict[str, PackedTensor]
    graphs: Graphs = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    num_cached: int = 0
    manifest: Manifest = field(init=False)

    def record(self, name: str, sha256: str | None = None) -> None:
        """Enter a written file into the manifest's list."""
        path = self.folder / name
        self.files[name] = FileRecord(
            sha256=sha256 or sha256_of(path), num_bytes=path.stat().st_size
        )

    @abstractmethod
    def pack_sha256(self, path: Path) -> str:
        """Digest of a weight pack; waits until it is written."""

    def wait_for_weights(self) -> None:  # noqa: B027  (most builds write no pack)
        """Wait until all packs are written."""

    def stop(self) -> None:  # noqa: B027
        """Give up what has been begun; nothing happens where all is done."""


@dataclass(kw_only=True)
class NewBundle(BuildState):
    """Builds a bundle of one precision.

    Attributes:
        writer: Writer of the weight pack.
        source: Digest of the checkpoint, complete when the pack is written.
    """

    writer: PackWriter
    source: SourceDigest

    def pack_sha256(self, path: Path) -> str:  # noqa: ARG002  (there is one)
        return self.writer.result()

    def wait_for_weights(self) -> None:
        self.writer.result()

    def stop(self) -> None:
        self.writer.stop()

    def check_weights(self) -> None:
        """Raise what has gone wrong with the weights by now.

        That is what writing the pack raised, or a calibration or sampler of another checkpoint.
        """
        if not self.writer.check():
            return
        for origin in (self.plan.quantization, self.plan.sampler):
            if origin is not None:
                origin.check_source(self.source.base_hexdigest())


@dataclass(kw_only=True)
class Addition(BuildState):
    """Adds targets or a sampler to a bundle.

    The bundle was compared with the checkpoint before.

    Attributes:
        base: Manifest of the bundle.
    """

    base: Manifest

    def pack_sha256(self, path: Path) -> str:
        return self.base.files[path.name].sha256


@dataclass(kw_only=True)
class AddedPrecision(Addition):
    """Adds a precision, with a pack of what the other packs lack.

    Attributes:
        writer: Writer of the pack.
    """

    writer: PackWriter

    def pack_sha256(self, path: Path) -> str:
        return self.writer.result() if path == self.packs[0] else super().pack_sha256(path)

    def wait_for_weights(self) -> None:
        self.writer.result()

    def stop(self) -> None:
        self.writer.stop()

    def check_weights(self) -> None:
        """Raise what writing the pack has raised by now."""
        self.writer.check()


WithPack = NewBundle | AddedPrecision
"""The builds that write a pack."""

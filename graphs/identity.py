"""Identifies a checkpoint by digests and a stamp.

The digests are of its bytes, the stamp of its files. The stamp tells without reading them that
nothing was touched.

There are two digests. That of the *whole* covers the drafter's adapter and says what a bundle was
built from. That of the *base* leaves the adapter out: scales of quantized weights, and adapters,
belong to the base, so that one calibration serves every drafter that is trained later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from trimode.graphs.checkpoint import Checkpoint, is_adapter_tensor


class SourceDigest:
    """Digests a checkpoint's tensors while somebody reads them.

    So nothing is read twice.

    Args:
        checkpoint: Opened checkpoint, whose :meth:`Checkpoint.read` is wrapped.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._whole = hashlib.sha256((checkpoint.path / "config.json").read_bytes())
        self._base = self._whole  # another one from the adapter's first tensor on

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a tensor's bytes as :meth:`Checkpoint.read` does.

        Tensors must be read once each, in the checkpoint's order.

        Raises:
            CheckpointError: the file has gone or become shorter since it was opened.
        """
        entry = self._checkpoint.tensors[name]
        if is_adapter_tensor(name) and self._base is self._whole:
            self._begin_adapter()
        self._whole.update(f"{name} {entry.dtype} {entry.shape}".encode())
        for raw in self._checkpoint.read(name):
            self._whole.update(raw)
            yield raw

    def read_all(self) -> Iterator[int]:
        """Read every tensor for the digest alone.

        Yields:
            Size of each piece, in bytes.
        """
        for name in self._checkpoint.tensors:
            for raw in self.read(name):
                yield len(raw)

    def hexdigest(self) -> str:
        """The digest of what has been read."""
        return self._whole.hexdigest()

    def base_hexdigest(self) -> str:
        """Return the same without the drafter's adapter.

        It is equal for one checkpoint with any adapter, or none.
        """
        return self._base.hexdigest()

    def _begin_adapter(self) -> None:
        assert self._checkpoint.drafter is not None
        self._base = self._whole.copy()
        # what the tensors do not tell; the graphs hold it
        self._whole.update(f"alpha {self._checkpoint.drafter.alpha}".encode())


def digest_of(checkpoint: Checkpoint, on_bytes: Callable[[int], object]) -> SourceDigest:
    """Read a whole checkpoint for its digests alone.

    Args:
        checkpoint: Opened checkpoint.
        on_bytes: Listener that is told the size of every piece that is read.

    Raises:
        CheckpointError: a file has gone or become shorter since it was opened.
    """
    digest = SourceDigest(checkpoint)
    for count in digest.read_all():
        on_bytes(count)
    return digest


def stamp_of(checkpoint: Checkpoint) -> str:
    """Digest over name, size and modification time of the checkpoint's files."""
    files = [
        checkpoint.path / "config.json",
        *sorted({entry.file for entry in checkpoint.tensors.values()}),
    ]
    if checkpoint.adapter is not None:
        files.append(checkpoint.adapter / "adapter_config.json")
    facts = [
        (_name_of(file, checkpoint), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _name_of(file: Path, checkpoint: Checkpoint) -> str:
    """Name a file relative to the checkpoint, which may be moved.

    A file of an adapter from elsewhere is named in full.
    """
    return str(
        file.relative_to(checkpoint.path)
        if file.is_relative_to(checkpoint.path)
        else file.resolve()
    )

"""Identifies a checkpoint by digests of its bytes, and by a stamp of its files.

The stamp tells without reading them that nothing was touched.

There are two digests. That of the *whole* covers the drafter's adapter and says what a bundle was
built from. That of the *base* leaves the adapter out: scales of quantized weights, and adapters,
belong to the base, so that one calibration serves every drafter that is trained later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from trimode.errors import BuildError
from trimode.formats.contract import DType
from trimode.formats.finite import FiniteCheck, first_not_finite
from trimode.formats.safetensors import SAFETENSORS_NAMES, to_float32
from trimode.graphs.checkpoint import Checkpoint, is_adapter_tensor

NUMPY_DTYPES: dict[DType, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class SourceDigest:
    """Digests a checkpoint's tensors while they are copied, so nothing is read twice."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._drafter = checkpoint.drafter
        self._whole = hashlib.sha256((checkpoint.path / "config.json").read_bytes())
        self._base = self._whole  # another one from the adapter's first tensor on

    def read(self, name: str, dtype: DType) -> Iterator[bytes]:
        """Yield a tensor's bytes in ``dtype``.

        Tensors must be read once each, in the checkpoint's order.

        Raises:
            CheckpointError: a weight is NaN or infinite.
            BuildError: a weight is too large for ``dtype``.
        """
        entry = self._tensors[name]
        finite = FiniteCheck(name, entry.shape, entry.dtype)
        for raw in map(finite.pass_by, self._raw(name)):
            yield (
                raw
                if entry.dtype == SAFETENSORS_NAMES[dtype]
                else _converted(raw, entry.dtype, dtype, name)
            )

    def read_all(self) -> Iterator[int]:
        """Read every tensor for the digest alone; yields the number of bytes of each piece."""
        for name in self._tensors:
            for raw in self._raw(name):
                yield len(raw)

    def hexdigest(self) -> str:
        """The digest of what has been read."""
        return self._whole.hexdigest()

    def base_hexdigest(self) -> str:
        """Return the same without the drafter's adapter.

        It is equal for one checkpoint with any adapter, or none.
        """
        return self._base.hexdigest()

    def _raw(self, name: str) -> Iterator[bytes]:
        entry = self._tensors[name]
        if is_adapter_tensor(name) and self._base is self._whole:
            assert self._drafter is not None
            self._base = self._whole.copy()
            # what the tensors do not tell; the graphs hold it
            self._whole.update(f"alpha {self._drafter.alpha}".encode())
        self._whole.update(f"{name} {entry.dtype} {entry.shape}".encode())
        for raw in entry.chunks():
            self._whole.update(raw)
            yield raw


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
    """Name a file relative to the checkpoint, so that it may be moved.

    A file of an adapter from elsewhere is named in full.
    """
    return str(
        file.relative_to(checkpoint.path)
        if file.is_relative_to(checkpoint.path)
        else file.resolve()
    )


_LARGEST: dict[DType, tuple[str, str, str]] = {
    "float16": ("65504", "fp16", "pass --precision bf16 or fp32"),
    "bfloat16": ("3.38953e+38", "bf16", "pass --precision fp32"),
}
"""The largest number of a type, its name among precisions, and what to do about a weight beyond
it.
"""


def _converted(raw: bytes, source: str, dtype: DType, name: str) -> bytes:
    """Finite numbers in another type.

    Raises:
        BuildError: one is too large for it.
    """
    wide = to_float32(raw, source)
    with np.errstate(over="ignore"):  # looked for below
        narrow = wide.astype(NUMPY_DTYPES[dtype])
    converted = narrow.tobytes()
    if dtype in _LARGEST and first_not_finite(converted, SAFETENSORS_NAMES[dtype]) is not None:
        most, precision, hint = _LARGEST[dtype]
        found = f"{float(np.abs(wide).max()):.6g}"
        raise BuildError(
            f"{name}: expected weights up to {most}, the largest of {precision}, found {found}",
            hint,
        )
    return converted

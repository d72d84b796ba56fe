"""A trained sampler on its way into a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from trimode.compiler.cache import ContentCache, key_of
from trimode.compiler.fingerprint import tracing_fingerprint
from trimode.errors import CheckpointError, UsageError
from trimode.graphs.contract import ModelInfo
from trimode.graphs.finite import first_not_finite
from trimode.graphs.sampler_file import WEIGHTS, SamplerFile, check_sampler_source, load_sampler_record
from trimode.hints import TRAIN_SAMPLER
from trimode.runtime.manifest import Manifest, SamplerRecord
from trimode.texts import name_of, reason_of

_FLOATS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
SAMPLER_FILE = "sampler.onnx"


@dataclass(frozen=True)
class SamplerSource:
    """A trained sampler: its folder and what it says of itself."""

    folder: Path
    record: SamplerFile

    def describe(self) -> SamplerRecord:
        """The manifest's entry."""
        record = self.record
        return SamplerRecord(
            file=SAMPLER_FILE, name=name_of(self.folder), sha256=record.sampler_sha256, num_parameters=record.num_parameters,
            block_lengths=record.block_lengths, threshold=record.threshold,
        )  # fmt: skip

    def check_source(self, sha256: str) -> None:
        """Raise :class:`CheckpointError` unless it was trained for the checkpoint with this digest, any adapter left out."""
        check_sampler_source(str(self.folder), self.record.source_sha256, sha256)


def plan_sampler(folder: Path | None, model: ModelInfo, base: Manifest | None) -> SamplerSource | None:
    """What is to be written for ``--sampler``; None where nothing is asked for, or the bundle that is added to has the same.

    Raises:
        UsageError: the bundle has another.
        CheckpointError: it cannot be read, is of another vocabulary, or a weight is NaN or infinite.
    """
    if folder is None:
        return None
    source = SamplerSource(folder, load_sampler_record(folder))
    for name in ("vocab_size", "mask_token_id"):
        found, expected = getattr(source.record, name), getattr(model, name)
        if found != expected:
            raise CheckpointError(
                f"{folder}: expected a sampler with {name} {expected}, found {found}",
                TRAIN_SAMPLER,
            )
    _check_weights(folder / WEIGHTS)
    if base is None or base.sampler is None:
        return source
    if base.sampler.sha256 != source.record.sampler_sha256:
        raise UsageError(f"expected a bundle without a sampler or with that of {folder}, found one with {base.sampler.name}",
                         "pass --force to replace the bundle, or choose another output")  # fmt: skip
    return None


def _check_weights(file: Path) -> None:
    try:
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: expected a safetensors file, found: {reason_of(error)}", TRAIN_SAMPLER) from error
    for name, values in tensors.items():
        dtype = _FLOATS.get(values.dtype)
        found = dtype and first_not_finite(values.tobytes(), dtype)
        if found:
            raise CheckpointError(f"{file}: expected finite weights, found {name} with {found.at(values.shape)}", TRAIN_SAMPLER)


def write_sampler(source: SamplerSource, path: Path, kept: ContentCache | None) -> None:
    """Export the network, weights inside, or take it from the cache where it has been exported before.

    Raises:
        CheckpointError: its weights are not of the sizes that its record names.
    """
    if kept is None:
        _export(source, path)
    else:
        kept.fetch(_key_of_export(source.record), path, lambda entry: _export(source, entry))


def _key_of_export(record: SamplerFile) -> str:
    """Digest of everything that the graph depends on: weights, sizes, and the code that exports."""
    return key_of(
        kind="sampler",
        weights=record.sampler_sha256,
        shape=record.shape.model_dump(mode="json"),
        vocab_size=record.vocab_size,
        sources=tracing_fingerprint(),
    )


def _export(source: SamplerSource, path: Path) -> None:
    import onnx_ir as ir

    from trimode.graphs.sampler_trace import load_sampler, trace_sampler  # brings PyTorch

    graph = trace_sampler(load_sampler(source.folder, source.record))
    path.write_bytes(ir.serde.serialize_model(graph).SerializeToString())

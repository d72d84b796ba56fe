"""Puts the learned sampler and the tokenizer's files into the bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

from trimode.compiler.plan import SAMPLER_FILE, SamplerSource
from trimode.compiler.stages.graphs import check_graph
from trimode.compiler.stages.state import BuildState
from trimode.compiler.store.cache import ContentCache, key_of
from trimode.compiler.store.fingerprint import tracing_fingerprint
from trimode.formats.sampler import SamplerFile
from trimode.runtime.text.files import text_files

CONFIG_FILES = ("config.json", "generation_config.json")


def export_sampler(state: BuildState) -> None:
    """Write the learned sampler's graph, where there is one to write."""
    if state.plan.sampler is None:
        return
    advance = state.progress.stage("export sampler", 1)
    write_sampler(state.plan.sampler, state.folder / SAMPLER_FILE, state.cache)
    check_graph(state.folder / SAMPLER_FILE)
    state.record(SAMPLER_FILE)
    advance(1)


def copy_tokenizer(state: BuildState) -> None:
    """Copy the files that turn text into tokens.

    A checkpoint without them gives a bundle that takes token ids only.
    """
    source = state.plan.checkpoint.path
    names = [*(name for name in CONFIG_FILES if (source / name).is_file()), *text_files(source)]
    advance = state.progress.stage("copy tokenizer", len(names))
    for name in names:
        (state.folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, state.folder / name)
        state.record(name)
        advance(1)


def write_sampler(source: SamplerSource, path: Path, kept: ContentCache | None) -> None:
    """Export the network with its weights, or copy it from the cache.

    Raises:
        CheckpointError: its weights are not of the sizes that its record names.
    """
    if kept is None:
        _export(source, path)
    else:
        kept.fetch(_key_of_export(source.record), path, lambda entry: _export(source, entry))


def _key_of_export(record: SamplerFile) -> str:
    """Digest of the weights, the sizes and the code that exports."""
    return key_of(
        kind="sampler",
        weights=record.sampler_sha256,
        shape=record.shape.model_dump(mode="json"),
        vocab_size=record.vocab_size,
        sources=tracing_fingerprint(),
    )


def _export(source: SamplerSource, path: Path) -> None:
    import onnx_ir as ir

    from trimode.graphs.sampler.trace import load_sampler, trace_sampler  # brings PyTorch

    graph = trace_sampler(load_sampler(source.folder, source.record))
    path.write_bytes(ir.serde.serialize_model(graph).SerializeToString())

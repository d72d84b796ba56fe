"""checkpoint -> bundle, as a flat list of stages. Start reading here.

A stage takes the state of the build and adds to it; the bundle appears under its name only when the last one is done.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

import trimode
from trimode.compiler.graphfile import check_graph, save_graph
from trimode.compiler.staging import check_destination, check_space, staged_folder
from trimode.compiler.weights import PackLayout, SourceDigest, plan_pack, write_pack
from trimode.errors import UsageError
from trimode.graphs.checkpoint import Checkpoint, open_checkpoint
from trimode.graphs.contract import ROLES, ModelInfo, Role, graph_contract
from trimode.graphs.trace import trace_role
from trimode.runtime.bundle import sha256_of
from trimode.runtime.manifest import MANIFEST, SCHEMA_VERSION, WEIGHTS, FileRecord, GraphRecord, Manifest, SourceRecord

DEFAULT_MAX_LENGTH = 32768
MAX_BLOCK_LENGTH = 64
LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
COPIED_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TARGETS = ("cpu",)
PRECISIONS = ("fp32",)


@dataclass(frozen=True)
class BuildOptions:
    """What a user can choose.

    Attributes:
        target: ``cpu`` (ONNX Runtime).
        precision: ``fp32``.
        max_length: most tokens of prompt and answer together; None = the model's limit, at most 32768.
        force: replace an existing bundle.
    """

    target: str = "cpu"
    precision: str = "fp32"
    max_length: int | None = None
    force: bool = False


class Progress(Protocol):
    """Told what happens, so that the pipeline itself draws nothing."""

    def stage(self, name: str, total: int) -> None:
        """A stage begins that will make ``total`` steps (bytes for the weights, graphs for tracing)."""

    def advance(self, steps: int) -> None:
        """The current stage made ``steps`` more."""


class Silent:
    """A :class:`Progress` that shows nothing."""

    def stage(self, name: str, total: int) -> None:
        """See :class:`Progress`."""

    def advance(self, steps: int) -> None:
        """See :class:`Progress`."""


@dataclass
class BuildState:
    """What the stages hand on."""

    options: BuildOptions
    checkpoint: Checkpoint
    folder: Path
    progress: Progress
    model: ModelInfo
    layout: PackLayout
    source: SourceDigest
    graphs: dict[Role, ir.Model] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    manifest: Manifest | None = None

    def record(self, name: str, sha256: str | None = None) -> None:
        """Enter a written file into the manifest's list."""
        path = self.folder / name
        self.files[name] = FileRecord(sha256=sha256 or sha256_of(path), num_bytes=path.stat().st_size)


def build_bundle(checkpoint: Path, output: Path, options: BuildOptions | None = None, progress: Progress | None = None) -> Manifest:
    """Build a bundle.

    Args:
        checkpoint: folder of a Hugging Face checkpoint.
        output: folder to create.
        options: see :class:`BuildOptions`.
        progress: told about stages; None = silent.

    Raises:
        UsageError: an option is out of range, or ``output`` exists.
        CheckpointError: the checkpoint is incomplete or not of this family.
        BuildError: the bundle could not be written; nothing is left behind.
    """
    options, progress = options or BuildOptions(), progress or Silent()
    _check_options(options)
    check_destination(output, force=options.force)
    opened = open_checkpoint(checkpoint)
    model = describe_model(opened, options)
    layout, source = plan_pack(opened, model.num_positions)
    with staged_folder(output, force=options.force) as folder:
        check_space(output, layout.num_bytes)
        state = BuildState(options, opened, folder, progress, model, layout, source)
        for stage in STAGES:
            stage(state)
        assert state.manifest is not None
        return state.manifest


def trace_graphs(state: BuildState) -> None:
    """One graph per role, under fake tensors."""
    state.progress.stage("trace graphs", len(ROLES))
    for role in ROLES:
        state.graphs[role] = trace_role(role, state.checkpoint.config, state.model, state.checkpoint.drafter)
        state.progress.advance(1)


def write_weights(state: BuildState) -> None:
    """Copy the checkpoint into one pack, chunk by chunk."""
    state.progress.stage("write weights", state.layout.num_bytes)
    state.record(WEIGHTS, write_pack(state.layout, state.folder / WEIGHTS, state.progress.advance))


def write_graphs(state: BuildState) -> None:
    """Save the graphs beside the pack they refer to, and check them."""
    state.progress.stage("write graphs", len(ROLES))
    for role, graph in state.graphs.items():
        path = state.folder / f"{role}.onnx"
        save_graph(graph, state.layout, WEIGHTS, path)
        check_graph(path)
        state.record(path.name)
        state.progress.advance(1)


def copy_tokenizer(state: BuildState) -> None:
    """Copy the files that turn text into tokens; a checkpoint without them gives a bundle that takes token ids only."""
    state.progress.stage("copy tokenizer", len(COPIED_FILES))
    for name in COPIED_FILES:
        if (state.checkpoint.path / name).is_file():
            shutil.copyfile(state.checkpoint.path / name, state.folder / name)
            state.record(name)
        state.progress.advance(1)


def write_manifest(state: BuildState) -> None:
    """Describe it all."""
    state.progress.stage("write manifest", 1)
    state.manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        trimode_version=trimode.__version__,
        precision=state.options.precision,
        targets=(state.options.target,),
        model=state.model,
        source=SourceRecord(
            name=state.checkpoint.path.resolve().name,
            sha256=state.source.hexdigest(),
            num_parameters=sum(t.num_bytes // 4 for name, t in state.layout.tensors.items() if name in state.checkpoint.tensors),
        ),
        graphs={role: GraphRecord(file=f"{role}.onnx", contract=graph_contract(role, state.model)) for role in ROLES},
        weights=WEIGHTS,
        files=state.files,
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
    )
    (state.folder / MANIFEST).write_text(state.manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    state.progress.advance(1)


STAGES: tuple[Callable[[BuildState], None], ...] = (trace_graphs, write_weights, write_graphs, copy_tokenizer, write_manifest)


def describe_model(checkpoint: Checkpoint, options: BuildOptions) -> ModelInfo:
    """The facts that decoding needs, from the checkpoint and the options."""
    config = checkpoint.config
    limit = config.max_position_embeddings
    max_length = min(limit, DEFAULT_MAX_LENGTH) if options.max_length is None else options.max_length
    if not 2 <= max_length <= limit:
        raise UsageError(
            f"expected a maximum length from 2 to {limit} (the model's max_position_embeddings), found {max_length}",
            "choose --max-length in that range",
        )
    return ModelInfo(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mask_token_id=config.mask_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        block_size=min(config.block_size, MAX_BLOCK_LENGTH),
        max_length=max_length,
        max_block_length=MAX_BLOCK_LENGTH,
        has_drafter=checkpoint.drafter is not None,
    )


def _check_options(options: BuildOptions) -> None:
    for name, value, known in (("target", options.target, TARGETS), ("precision", options.precision, PRECISIONS)):
        if value not in known:
            raise UsageError(f"expected --{name} {' or '.join(known)}, found {value!r}", f"this version builds for {' and '.join(known)}")

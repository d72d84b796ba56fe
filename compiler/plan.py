"""What a build will make, decided before any work: the model's facts, the precision, and one record for each target."""

from __future__ import annotations

from dataclasses import dataclass

from trimode.compiler.options import DEFAULT_MAX_LENGTH, MAX_BLOCK_LENGTH, BuildOptions
from trimode.compiler.profiles import DEFAULT_BLOCK_LENGTHS, plan_profiles
from trimode.compiler.targets import Precision, Target, choose_precision, resolve_targets
from trimode.compiler.toolchain import library_of
from trimode.errors import UsageError
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.contract import ROLES, DType, ModelInfo
from trimode.runtime.manifest import EngineRecord, Manifest, TargetRecord

DTYPES: dict[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class BuildPlan:
    """What a build will make.

    Attributes:
        records: the manifest's entry of each target, known in full beforehand.
    """

    options: BuildOptions
    checkpoint: Checkpoint
    model: ModelInfo
    precision: Precision
    targets: dict[str, Target]
    records: dict[str, TargetRecord]

    @property
    def dtype(self) -> DType:
        """Type of the weights in the pack."""
        return DTYPES[self.precision]


def make_plan(checkpoint: Checkpoint, options: BuildOptions, base: Manifest | None = None) -> BuildPlan:
    """Plan a build; ``base`` is the bundle that it adds to, whose choices stand where the options leave them open.

    Raises:
        UsageError: an option is out of range, or a target cannot run the precision.
        DependencyError: the library that compiles for a target is not installed.
    """
    options.check()
    targets = {target.name: target for target in resolve_targets(options.targets)}
    precision = choose_precision(options.precision or (base.precision if base else None), tuple(targets.values()))
    max_length = options.max_length if options.max_length is not None or base is None else base.model.max_length
    model = describe_model(checkpoint, max_length)
    records = {name: plan_target(target, options, model, precision) for name, target in targets.items()}
    return BuildPlan(options, checkpoint, model, precision, targets, records)


def plan_target(target: Target, options: BuildOptions, model: ModelInfo, precision: Precision) -> TargetRecord:
    """The manifest's entry of one target."""
    if target.backend == "onnxruntime":
        return _plan_onnxruntime(target, DTYPES[precision])
    lengths = options.block_lengths or (*DEFAULT_BLOCK_LENGTHS, model.block_size)
    graphs = {
        role: EngineRecord(file=f"engines/{target.name}/{role}.engine", profiles=plan_profiles(role, model, lengths, options.max_batch))
        for role in ROLES
    }
    return TargetRecord(
        backend=target.backend, device="cuda", compute_capability=target.compute_capability, compute_dtype=DTYPES[precision],
        placement=options.weights, capacity=model.num_positions, workspace_mib=options.workspace_mib, library=library_of(target.backend),
        graphs=graphs,
    )  # fmt: skip


def describe_model(checkpoint: Checkpoint, max_length: int | None = None) -> ModelInfo:
    """The facts that decoding needs; ``max_length`` None = the model's limit, at most 32768."""
    config = checkpoint.config
    limit = config.max_position_embeddings
    if max_length is None:
        max_length = min(limit, DEFAULT_MAX_LENGTH)
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


def _plan_onnxruntime(target: Target, dtype: DType) -> TargetRecord:
    """On a CPU everything is computed in float32; a pack of float32 is mapped by the portable graphs, any other is widened once, on loading."""
    portable = target.device == "cpu" and dtype == "float32"
    return TargetRecord(
        backend="onnxruntime", device=target.device, compute_capability=None, compute_dtype="float32" if target.device == "cpu" else dtype,
        placement="external" if portable else "shared", capacity=None, workspace_mib=None, library=library_of("onnxruntime"),
        graphs={role: EngineRecord(file=f"{role}.onnx" if portable else f"engines/{target.name}/{role}.onnx") for role in ROLES},
    )  # fmt: skip

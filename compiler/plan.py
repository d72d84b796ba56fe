"""What a build will make, decided before any work: the model's facts, the precision, and one record for each target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimode.compiler.options import DEFAULT_MAX_LENGTH, BuildOptions
from trimode.compiler.profiles import DEFAULT_BLOCK_LENGTHS, plan_capacity, plan_profiles
from trimode.compiler.quantize.scales import Quantization, load_quantization
from trimode.compiler.sampler import SamplerSource, plan_sampler
from trimode.compiler.targets import Precision, Target, choose_precision, resolve_targets
from trimode.compiler.toolchain import library_of
from trimode.errors import UsageError
from trimode.graphs.calibration import load_record
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.contract import MAX_BLOCK_LENGTH, ROLES, DType, ModelInfo, Role
from trimode.runtime.manifest import EngineRecord, Manifest, PrecisionName, TargetRecord
from trimode.runtime.text_check import check_text

DTYPES: dict[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class FileNames:
    """What the files of a precision are called in the bundle; ``suffix`` is empty for the one that was built first."""

    suffix: str = ""

    @property
    def pack(self) -> str:
        """The weights."""
        return f"weights{self.suffix}.safetensors"

    def graph(self, role: Role) -> str:
        """A portable graph."""
        return f"{role}{self.suffix}.onnx"

    def target(self, name: str) -> str:
        """The folder of a target's engines or graphs."""
        return f"engines/{name}{self.suffix}"


@dataclass(frozen=True)
class BuildPlan:
    """What a build will make.

    Attributes:
        dtype: of the weights that are not quantized; GPUs compute in it.
        roles: graphs of the bundle.
        quantization: of the other weights; None where there are none, or where they are in the bundle that is added to.
        names: of the precision's files.
        records: the manifest's entry of each target, known in full beforehand.
        sampler: the learned sampler to write; None where none is asked for, or where the bundle that is added to has it.
    """

    options: BuildOptions
    checkpoint: Checkpoint
    model: ModelInfo
    roles: tuple[Role, ...]
    precision: PrecisionName
    dtype: DType
    quantization: Quantization | None
    names: FileNames
    targets: dict[str, Target]
    records: dict[str, TargetRecord]
    sampler: SamplerSource | None = None


def make_plan(checkpoint: Checkpoint, options: BuildOptions, base: Manifest | None = None) -> BuildPlan:
    """Plan a build; ``base`` is the bundle that it adds to, whose choices stand where the options leave them open.

    Raises:
        UsageError: an option is out of range, a target cannot run the precision, or the precision or a target cannot compute in the type that
            all precisions of the bundle share.
        CheckpointError: the calibration or the sampler cannot be read, or does not fit the checkpoint.
        DependencyError: the library that compiles for a target is not installed.
        BundleError: the tokenizer or the chat template cannot be used with the model.
    """
    options.check()
    targets = {target.name: target for target in resolve_targets(options.targets)}
    asked = options.precision or _calibrated_precision(options) or (base.first_precision if base else None)
    precision = choose_precision(asked, tuple(targets.values()))
    if base is not None:
        _check_shared_dtype(precision, base)
    quantization = _plan_quantization(checkpoint, options, precision, base)
    dtype = base.dtype if base else _compute_dtype(precision, tuple(targets.values()))
    if precision not in DTYPES:
        _check_compute(dtype, tuple(targets.values()))
    names = FileNames() if base is None or precision == base.first_precision else FileNames(f"-{precision}")
    max_length = options.max_length if options.max_length is not None or base is None else base.model.max_length
    model = describe_model(checkpoint, max_length)
    roles, is_quantized = _plan_roles(options, base), precision not in DTYPES
    records = {name: plan_target(target, options, model, dtype, names, roles, is_quantized=is_quantized) for name, target in targets.items()}
    sampler = plan_sampler(options.sampler, model, base)
    check_text(checkpoint.path, model.vocab_size)
    return BuildPlan(options, checkpoint, model, roles, precision, dtype, quantization, names, targets, records, sampler)


def plan_target(
    target: Target, options: BuildOptions, model: ModelInfo, dtype: DType, names: FileNames, roles: tuple[Role, ...] = ROLES, *,
    is_quantized: bool = False,
) -> TargetRecord:  # fmt: skip
    """The manifest's entry of one target; ``dtype`` is what GPUs compute in."""
    if target.backend == "onnxruntime":
        return _plan_onnxruntime(target, dtype, names, roles, is_quantized=is_quantized)
    lengths = options.block_lengths or (*DEFAULT_BLOCK_LENGTHS, model.block_size)
    if "quadratic" in roles and min(lengths) > model.max_quadratic_length:
        raise UsageError(f"expected, with --quadratic, a block length up to {model.max_quadratic_length}, found {min(lengths)}",
                         "pass a shorter one in --block-lengths, or leave --quadratic out")  # fmt: skip
    capacity = plan_capacity(roles, model, lengths, options.max_batch)
    graphs = {
        role: EngineRecord(
            file=f"{names.target(target.name)}/{role}.engine", profiles=plan_profiles(role, model, lengths, options.max_batch, capacity)
        )
        for role in roles
    }
    return TargetRecord(
        backend=target.backend, device="cuda", compute_capability=target.compute_capability, compute_dtype=dtype,
        placement=options.weights, capacity=capacity, workspace_mib=options.workspace_mib, library=library_of(target.backend),
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


def _plan_roles(options: BuildOptions, base: Manifest | None) -> tuple[Role, ...]:
    """The graphs of the bundle that is added to, or those that are asked for."""
    if base is None:
        return (*ROLES, "quadratic") if options.quadratic else ROLES
    if options.quadratic and "quadratic" not in base.contracts:
        raise UsageError("expected a bundle with the graph of quadratic self-speculation, found one without",
                         "pass --force to build it again with --quadratic, or leave --quadratic out")  # fmt: skip
    return tuple(base.contracts)


def _calibrated_precision(options: BuildOptions) -> str | None:
    return load_record(options.calibration).precision if isinstance(options.calibration, Path) else None


def _plan_quantization(checkpoint: Checkpoint, options: BuildOptions, precision: Precision, base: Manifest | None) -> Quantization | None:
    """The scales; None where nothing is quantized, or the bundle that is added to has them and no others are asked for."""
    if precision not in ("fp8", "int8", "int4", "nvfp4"):
        if options.calibration is not None:
            raise UsageError(f"expected --calibration with --precision fp8, int8, int4 or nvfp4, found {precision}", "leave --calibration out")
        return None
    if base is not None and precision in base.precisions and options.calibration is None:
        return None
    return load_quantization(options.calibration, precision, checkpoint)


def _compute_dtype(precision: Precision, targets: tuple[Target, ...]) -> DType:
    """The type of a dense bundle; of a quantized one, what a dense one for these targets would have."""
    return DTYPES[precision] if precision in DTYPES else DTYPES[choose_precision(None, targets)]


def _check_shared_dtype(precision: PrecisionName, base: Manifest) -> None:
    """Raise :class:`UsageError` where a dense precision has another type than all else in the bundle that it would be added to."""
    dtype = DTYPES.get(precision)
    if dtype not in (None, base.dtype):
        (able,) = (name for name, other in DTYPES.items() if other == base.dtype)
        raise UsageError(f"expected a precision that computes in {base.dtype}, as all of the bundle do, found {precision}",
                         f"add {able}, fp8, int8, int4 or nvfp4 to this bundle, or build {precision} as a bundle of its own")  # fmt: skip


def _check_compute(dtype: DType, targets: tuple[Target, ...]) -> None:
    """Raise :class:`UsageError` where a GPU cannot compute in the type that a quantized bundle has for everything else."""
    for target in targets:
        if target.device == "cuda" and not any(DTYPES.get(precision) == dtype for precision in target.precisions):
            raise UsageError(f"{target.name}: expected a bundle that computes in a type it can run, found one in {dtype}",
                             f"pass --force to build it again for all targets, or build {target.name} as a bundle of its own")  # fmt: skip


def _plan_onnxruntime(target: Target, dtype: DType, names: FileNames, roles: tuple[Role, ...], *, is_quantized: bool) -> TargetRecord:
    """On a CPU everything is computed in float32.

    A pack of float32, or of quantized weights, is mapped by the portable graphs; any other is widened once, on loading.
    """
    portable = target.device == "cpu" and (dtype == "float32" or is_quantized)
    return TargetRecord(
        backend="onnxruntime", device=target.device, compute_capability=None, compute_dtype="float32" if target.device == "cpu" else dtype,
        placement="external" if portable else "shared", capacity=None, workspace_mib=None, library=library_of("onnxruntime"),
        graphs={role: EngineRecord(file=names.graph(role) if portable else f"{names.target(target.name)}/{role}.onnx") for role in roles},
    )  # fmt: skip

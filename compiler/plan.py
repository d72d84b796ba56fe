"""Plans a build before any work.

The plan has the model's facts, the precision, and one record for each target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from trimode.compiler.onnxruntime_target import (
    FileNames,
    Int4Inputs,
    int4_inputs_of,
    plan_onnxruntime,
)
from trimode.compiler.options import BuildOptions
from trimode.compiler.store.fingerprint import lowering_revision
from trimode.compiler.targets import Precision, Target, choose_precision, resolve_targets
from trimode.compiler.tensorrt.capacities import (
    check_one_capacity,
    lengths_of_blocks,
    plan_engines,
    plan_smaller,
)
from trimode.compiler.toolchain import library_of
from trimode.errors import CheckpointError, UsageError
from trimode.formats.calibration import load_record
from trimode.formats.contract import GRAPH_NAMES, DType, GraphName, ModelInfo
from trimode.formats.finite import first_not_finite
from trimode.formats.hints import TRAIN_SAMPLER
from trimode.formats.manifest import (
    EngineRecord,
    Manifest,
    PrecisionName,
    SamplerRecord,
    TargetRecord,
)
from trimode.formats.sampler import WEIGHTS, SamplerFile, check_sampler_source, load_sampler_record
from trimode.formats.texts import name_of, reason_of
from trimode.graphs.checkpoint import Checkpoint, describe_model
from trimode.graphs.numerics.quantization import Quantization, load_quantization
from trimode.runtime.text.check import check_text

DTYPES: dict[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_FLOATS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
SAMPLER_FILE = "sampler.onnx"


@dataclass(frozen=True)
class BuildPlan:
    """Says what a build will make.

    Attributes:
        dtype: Type of the weights that are not quantized; GPUs compute in it.
        graph_names: Graphs of the bundle.
        quantization: Scales of the other weights; None where there are none, or where they are in
            the bundle that is added to.
        names: Names of the precision's files.
        records: The manifest's entry of each target, known in full beforehand.
        sampler: The learned sampler to write; None where none is asked for, or where the bundle
            that is added to has it.
    """

    options: BuildOptions
    checkpoint: Checkpoint
    model: ModelInfo
    graph_names: tuple[GraphName, ...]
    precision: PrecisionName
    dtype: DType
    quantization: Quantization | None
    names: FileNames
    targets: dict[str, Target]
    records: dict[str, TargetRecord]
    sampler: SamplerSource | None = None


def make_plan(
    checkpoint: Checkpoint, options: BuildOptions, base: Manifest | None = None
) -> BuildPlan:
    """Plan a build.

    ``base`` is the bundle that it adds to. Its choices stand where the options leave them open.

    Raises:
        UsageError: an option is out of range, a target cannot run the precision, or the precision
            or a target cannot compute in the type that all precisions of the bundle share.
        CheckpointError: the calibration or the sampler cannot be read, or does not fit the
            checkpoint.
        DependencyError: the library that compiles for a target is not installed.
        BundleError: the tokenizer or the chat template cannot be used with the model.
    """
    options.check()
    targets = {target.name: target for target in resolve_targets(options.targets)}
    asked = (
        options.precision
        or _calibrated_precision(options)
        or (base.first_precision if base else None)
    )
    precision = choose_precision(asked, tuple(targets.values()))
    if base is not None:
        _check_shared_dtype(precision, base)
    quantization = _plan_quantization(checkpoint, options, precision, base)
    dtype = base.dtype if base else _compute_dtype(precision, tuple(targets.values()))
    if precision not in DTYPES:
        _check_compute(dtype, tuple(targets.values()))
    names = (
        FileNames()
        if base is None or precision == base.first_precision
        else FileNames(f"-{precision}")
    )
    max_length = (
        options.max_length
        if options.max_length is not None or base is None
        else base.model.max_length
    )
    model = describe_model(checkpoint, max_length)
    plan = BuildPlan(
        options,
        checkpoint,
        model,
        _plan_graphs(options, base),
        precision,
        dtype,
        quantization,
        names,
        targets,
        records={},
    )
    plan = replace(plan, records=_plan_records(plan, _widens_int8(precision, quantization, base)))
    sampler = plan_sampler(options.sampler, model, base)
    check_text(checkpoint.path, model.vocab_size)
    return replace(plan, sampler=sampler)


def resize(plan: BuildPlan, max_length: int, max_batch: int) -> BuildPlan:
    """Plan a new bundle again for other texts and batches, of one capacity.

    What does not depend on them is not read again.

    Raises:
        UsageError: a size is out of its range.
    """
    options = replace(plan.options, max_length=max_length, max_batch=max_batch, capacities=None)
    options.check()
    resized = replace(plan, options=options, model=describe_model(plan.checkpoint, max_length))
    widens_int8 = _widens_int8(plan.precision, plan.quantization, None)
    return replace(resized, records=_plan_records(resized, widens_int8))


def _plan_records(plan: BuildPlan, widens_int8: bool) -> dict[str, TargetRecord]:
    """Plan each target of a plan that is known but for these."""
    holds_weights = plan.precision == "int4" or widens_int8
    is_rtx = any(target.backend == "tensorrt_rtx" for target in plan.targets.values())
    if is_rtx and holds_weights:
        check_one_capacity(plan.options, plan.precision)
    return {
        name: plan_target(
            target,
            plan.options,
            plan.model,
            plan.dtype,
            plan.names,
            plan.graph_names,
            is_quantized=plan.precision not in DTYPES,
            one_row=not widens_int8,
            joint=holds_weights,
            int4_inputs=int4_inputs_of(target, plan.precision, exact=plan.options.exact),
        )
        for name, target in plan.targets.items()
    }


def plan_target(
    target: Target,
    options: BuildOptions,
    model: ModelInfo,
    dtype: DType,
    names: FileNames,
    graph_names: tuple[GraphName, ...] = GRAPH_NAMES,
    *,
    is_quantized: bool = False,
    one_row: bool = True,
    joint: bool = False,
    int4_inputs: Int4Inputs | None = None,
) -> TargetRecord:
    """The manifest's entry of one target; ``dtype`` is what GPUs compute in.

    ``joint`` makes one engine of ``ar``, ``draft`` and ``verify`` where engines hold weights.
    ``int4_inputs`` is the type of what ONNX Runtime multiplies with int4 weights.
    """
    if target.backend == "onnxruntime":
        record = plan_onnxruntime(target, dtype, names, graph_names, is_quantized=is_quantized)
        return record.model_copy(update={"int4_inputs": int4_inputs})
    shortest = min(lengths_of_blocks(options, model))
    if "quadratic" in graph_names and shortest > model.max_quadratic_length:
        raise UsageError(
            f"expected, with `quadratic`, a block length up to {model.max_quadratic_length},"
            f" found {shortest}",
            "pass a shorter one in `block_lengths`, or leave `quadratic` out",
        )
    folder = names.target(target.name)
    largest = plan_engines(options, model, graph_names, folder, one_row=one_row)
    graphs = largest.graphs
    if joint and target.backend == "tensorrt_rtx" and options.weights == "shared":
        graphs = _joined(graphs, f"{folder}/joint.engine")
    return TargetRecord(
        backend=target.backend,
        device="cuda",
        compute_capability=target.compute_capability,
        compute_dtype=dtype,
        placement=options.weights,
        capacity=largest.capacity,
        workspace_mib=options.workspace_mib,
        library=library_of(target.backend),
        revision=lowering_revision(),
        graphs=graphs,
        smaller=plan_smaller(options, model, graph_names, folder, one_row=one_row),
    )


def _joined(graphs: dict[GraphName, EngineRecord], file: str) -> dict[GraphName, EngineRecord]:
    """Join three graphs in one engine: ``ar``'s profiles, then the others'."""
    first = {"ar": 0, "draft": len(graphs["ar"].profiles), "verify": len(graphs["ar"].profiles)}
    return {
        graph_name: EngineRecord(
            file=file, profiles=engine.profiles, first_profile=first[graph_name]
        )
        if graph_name in first
        else engine
        for graph_name, engine in graphs.items()
    }


def _widens_int8(
    precision: Precision, quantization: Quantization | None, base: Manifest | None
) -> bool:
    """Tell whether int8 weights meet inputs in high precision.

    That is so where the weights are rounded without data.
    """
    if precision != "int8":
        return False
    if quantization is not None:
        return quantization.record.scales_sha256 is None
    there = base.precisions.get(precision) if base else None
    calibration = there.calibration if there else None
    return calibration is not None and calibration.scales_sha256 is None


def _plan_graphs(options: BuildOptions, base: Manifest | None) -> tuple[GraphName, ...]:
    """Take the graphs of the base bundle, or those asked for."""
    if base is None:
        return (*GRAPH_NAMES, "quadratic") if options.quadratic else GRAPH_NAMES
    if options.quadratic and "quadratic" not in base.contracts:
        raise UsageError(
            "expected a bundle with the graph of quadratic self-speculation, found one without",
            "pass `force` to build it again with `quadratic`, or leave `quadratic` out",
        )
    return tuple(base.contracts)


def _calibrated_precision(options: BuildOptions) -> str | None:
    return (
        load_record(options.calibration).precision
        if isinstance(options.calibration, Path)
        else None
    )


def _plan_quantization(
    checkpoint: Checkpoint, options: BuildOptions, precision: Precision, base: Manifest | None
) -> Quantization | None:
    """Read the scales.

    None where nothing is quantized, or the bundle that is added to has them and no others are asked
    for.
    """
    if precision not in ("fp8", "int8", "int4", "nvfp4"):
        if options.calibration is not None:
            raise UsageError(
                "expected `calibration` with `precision` fp8, int8, int4 or nvfp4,"
                f" found {precision}",
                "leave `calibration` out",
            )
        return None
    if base is not None and precision in base.precisions and options.calibration is None:
        return None
    return load_quantization(
        options.calibration, precision, checkpoint, quantizes_head=options.quantize_head
    )


def _compute_dtype(precision: Precision, targets: tuple[Target, ...]) -> DType:
    """Choose the type of all that is not quantized.

    A quantized bundle has the type that a dense one for these targets would have.
    """
    return DTYPES[precision] if precision in DTYPES else DTYPES[choose_precision(None, targets)]


def _check_shared_dtype(precision: PrecisionName, base: Manifest) -> None:
    """Raise :class:`UsageError` where a dense precision has another type.

    All else in the bundle that it would be added to has one type.
    """
    dtype = DTYPES.get(precision)
    if dtype not in (None, base.dtype):
        (able,) = (name for name, other in DTYPES.items() if other == base.dtype)
        raise UsageError(
            f"expected a precision that computes in {base.dtype}, as all of the bundle do,"
            f" found {precision}",
            f"add {able}, fp8, int8, int4 or nvfp4 to this bundle,"
            f" or build {precision} as a bundle of its own",
        )


def _check_compute(dtype: DType, targets: tuple[Target, ...]) -> None:
    """Raise :class:`UsageError` where a GPU lacks the bundle's type.

    A quantized bundle has one type for everything that is not quantized.
    """
    for target in targets:
        if target.device == "cuda" and not any(
            DTYPES.get(precision) == dtype for precision in target.precisions
        ):
            raise UsageError(
                f"{target.name}: expected a bundle that computes in a type it can run,"
                f" found one in {dtype}",
                "pass `force` to build it again for all targets,"
                f" or build {target.name} as a bundle of its own",
            )


@dataclass(frozen=True)
class SamplerSource:
    """Names a trained sampler's folder and holds its record."""

    folder: Path
    record: SamplerFile

    def describe(self) -> SamplerRecord:
        """The manifest's entry."""
        record = self.record
        return SamplerRecord(
            file=SAMPLER_FILE,
            name=name_of(self.folder),
            sha256=record.sampler_sha256,
            num_parameters=record.num_parameters,
            block_lengths=record.block_lengths,
            threshold=record.threshold,
        )

    def check_source(self, sha256: str) -> None:
        """Raise :class:`CheckpointError` unless it belongs to this checkpoint.

        The digest is of the checkpoint without any adapter.
        """
        check_sampler_source(str(self.folder), self.record.source_sha256, sha256)


def plan_sampler(
    folder: Path | None, model: ModelInfo, base: Manifest | None
) -> SamplerSource | None:
    """Plan the learned sampler to write.

    None where nothing is asked for, or the bundle that is added to has the same.

    Raises:
        UsageError: the bundle has another.
        CheckpointError: it cannot be read, is of another vocabulary, or a weight is NaN or
            infinite.
    """
    if folder is None:
        return None
    source = SamplerSource(folder, load_sampler_record(folder))
    for name in ("vocab_size", "mask_token_id"):
        found, expected = getattr(source.record, name), getattr(model, name)
        if found != expected:
            raise CheckpointError(
                f"{folder}: expected a sampler with {name} {expected}, found {found}", TRAIN_SAMPLER
            )
    _check_weights(folder / WEIGHTS)
    if base is None or base.sampler is None:
        return source
    if base.sampler.sha256 != source.record.sampler_sha256:
        raise UsageError(
            f"expected a bundle without a sampler or with that of {folder},"
            f" found one with {base.sampler.name}",
            "pass `force` to replace the bundle, or choose another output",
        )
    return None


def _check_weights(file: Path) -> None:
    try:
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: expected a safetensors file, found: {reason_of(error)}", TRAIN_SAMPLER
        ) from error
    for name, values in tensors.items():
        dtype = _FLOATS.get(values.dtype)
        found = dtype and first_not_finite(values.tobytes(), dtype)
        if found:
            raise CheckpointError(
                f"{file}: expected finite weights, found {name} with {found.at(values.shape)}",
                TRAIN_SAMPLER,
            )

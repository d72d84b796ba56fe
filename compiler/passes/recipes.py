"""Lists the passes of portable graphs and of each target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import onnx_ir as ir

from trimode.compiler.passes.base import lower
from trimode.compiler.passes.choose_before_widening import ChooseBeforeWidening
from trimode.compiler.passes.compute_type import ComputeType
from trimode.compiler.passes.constant_weights import constant_weights
from trimode.compiler.passes.even_rows import EvenRows
from trimode.compiler.passes.mask_slots import MaskSlots
from trimode.compiler.passes.matmul_nbits import AccuracyLevel, MultiplyInt4
from trimode.compiler.passes.narrow_logits import NarrowLogits
from trimode.compiler.passes.nvfp4 import Nvfp4ForTensorRT, Nvfp4InFloat32
from trimode.compiler.passes.quantize_weights import QuantizeWeights, Stored
from trimode.compiler.passes.queries_to_outputs import QueriesToOutputs
from trimode.compiler.passes.rows_alike import RoundRowsAlike
from trimode.compiler.passes.scales_to_constants import ScalesToConstants
from trimode.compiler.passes.static_capacity import StaticCacheCapacity
from trimode.compiler.passes.stored_type import StoredType
from trimode.compiler.passes.valid_slots import ReadValidSlots
from trimode.compiler.passes.weights_to_inputs import WeightsToInputs
from trimode.formats.contract import DType
from trimode.formats.manifest import TargetRecord
from trimode.graphs.numerics.integers import Floats

INT4_ACCURACY_LEVEL: AccuracyLevel = 1
"""How the portable graphs multiply int4 weights: in float32."""


def lower_portable(dtype: DType, graph: ir.Model, pack: Mapping[str, Stored]) -> ir.Model:
    """Apply the passes of the portable graphs.

    They compute in float32 with what the pack holds, but for products with int4 weights.
    """
    return lower(graph, *_over_pack(dtype, pack), MultiplyInt4(INT4_ACCURACY_LEVEL))


def lower_for_cpu(
    record: TargetRecord, dtype: DType, graph: ir.Model, pack: Mapping[str, Stored]
) -> ir.Model:
    """Apply the passes for a CPU's graphs.

    These graphs read the pack as the portable ones do.
    """
    passes: list[ir.passes.InPlacePass] = [*_over_pack(dtype, pack), ReadValidSlots()]
    if record.int4_inputs == "int8":
        return lower(graph, *passes, RoundRowsAlike(), EvenRows(), MultiplyInt4(4))
    return lower(graph, *passes, MultiplyInt4(1))


def _over_pack(dtype: DType, pack: Mapping[str, Stored]) -> Iterator[ir.passes.InPlacePass]:
    """The passes that let a graph read what the pack holds."""
    yield from (QuantizeWeights(pack), Nvfp4InFloat32(pack))
    if dtype != "float32":
        kept = [name for name, stored in pack.items() if stored.dtype == "float32"]
        yield StoredType(dtype, kept)


def constants_of(record: TargetRecord, pack: Mapping[str, Stored]) -> tuple[str, ...]:
    """Return the names of weights and scales that engines hold.

    Those of ``scales`` come in addition. Everything is in a baked engine.
    """
    if record.placement == "baked":
        return tuple(sorted(pack))
    is_rtx = record.backend == "tensorrt_rtx" and record.placement == "shared"
    return constant_weights(pack) if is_rtx else ()


def lower_for(
    record: TargetRecord,
    graph: ir.Model,
    pack: Mapping[str, Stored] = MappingProxyType({}),
    scales: Mapping[str, Floats] = MappingProxyType({}),
) -> ir.Model:
    """Apply the passes that a target asks for.

    ``pack`` tells which weights are quantized, ``scales`` which of their scales become part of a
    graph.
    """
    passes: list[ir.passes.InPlacePass] = []
    if record.capacity is not None:
        passes += [StaticCacheCapacity(record.capacity), MaskSlots()]
    if record.compute_dtype != "float32":
        passes.append(ComputeType(record.compute_dtype))
    passes += [QuantizeWeights(pack), Nvfp4ForTensorRT(pack, scales)]
    if record.device == "cpu":
        passes.append(ReadValidSlots())
    if record.backend != "onnxruntime":
        passes += [ChooseBeforeWidening(), NarrowLogits()]
    if record.backend == "tensorrt_rtx":
        passes.append(QueriesToOutputs())
    if record.backend == "tensorrt_rtx" and record.placement == "shared":
        passes.append(ScalesToConstants(scales))
    if record.placement == "shared":
        passes.append(WeightsToInputs(constants_of(record, pack)))
    return lower(graph, *passes)

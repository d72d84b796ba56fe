"""Lists the passes of portable graphs and of each target."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from trimode.compiler.passes.base import lower
from trimode.compiler.passes.choose_before_widening import ChooseBeforeWidening
from trimode.compiler.passes.compute_type import ComputeType
from trimode.compiler.passes.constant_weights import constant_weights
from trimode.compiler.passes.mask_slots import MaskSlots
from trimode.compiler.passes.matmul_nbits import AccuracyLevel, MultiplyInt4
from trimode.compiler.passes.narrow_logits import NarrowLogits
from trimode.compiler.passes.nvfp4 import Nvfp4ForTensorRT, Nvfp4InFloat32
from trimode.compiler.passes.quantize_weights import QuantizeWeights, Stored
from trimode.compiler.passes.queries_to_outputs import QueriesToOutputs
from trimode.compiler.passes.scales_to_constants import ScalesToConstants
from trimode.compiler.passes.static_capacity import StaticCacheCapacity
from trimode.compiler.passes.stored_type import StoredType
from trimode.compiler.passes.weights_to_inputs import WeightsToInputs
from trimode.formats.contract import DType
from trimode.formats.manifest import TargetRecord
from trimode.graphs.numerics.integers import Floats

INT4_ACCURACY_LEVEL: AccuracyLevel = 1
"""How the portable graphs multiply int4 weights: in float32, so that one row and many round alike;
docs/reference/quantization.md has why.
"""


def lower_portable(dtype: DType, graph: ir.Model, pack: Mapping[str, Stored]) -> ir.Model:
    """Apply the passes of the portable graphs.

    They compute in float32 with what the pack holds, but for products with int4 weights.
    """
    passes: list[ir.passes.InPlacePass] = [QuantizeWeights(pack), Nvfp4InFloat32(pack)]
    if dtype != "float32":
        passes.append(
            StoredType(dtype, [name for name, stored in pack.items() if stored.dtype == "float32"])
        )
    return lower(graph, *passes, MultiplyInt4(INT4_ACCURACY_LEVEL))


def constants_of(record: TargetRecord, pack: Mapping[str, Stored]) -> tuple[str, ...]:
    """Names of the weights and scales that a target's engines hold, beside those of ``scales``.

    Everything is in a baked engine.
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
    if record.backend != "onnxruntime":
        passes += [ChooseBeforeWidening(), NarrowLogits()]
    if record.backend == "tensorrt_rtx":
        passes.append(QueriesToOutputs())
    if record.backend == "tensorrt_rtx" and record.placement == "shared":
        passes.append(ScalesToConstants(scales))
    if record.placement == "shared":
        passes.append(WeightsToInputs(constants_of(record, pack)))
    return lower(graph, *passes)

"""From ModelOpt's quantized modules to the arrays of :mod:`trimode.graphs.calibration`.

ModelOpt keeps an amax of one number as ``()``, of rows as ``(out, 1)``, of blocks as ``(out * in / block, 1)``, rows first; and of a
layer's ``pre_quant_scale`` the factor of the input, having multiplied the weight by its inverse. So shapes change and no value does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from trimode.errors import BuildError
from trimode.graphs.calibration import QuantizedPrecision, Scales


def extract_scales(linears: Mapping[str, nn.Module], precision: QuantizedPrecision) -> Scales:
    """The scales of all layers, by tensor name.

    Raises:
        BuildError: ModelOpt found a scale that is not a positive number.
    """
    scales: Scales = {}
    for name, linear in linears.items():
        layer: Any = linear
        scales[f"{name}.weight_amax"] = _weight_amax(layer, precision)
        if precision != "int4":
            scales[f"{name}.input_amax"] = _array(layer.input_quantizer.amax).reshape(())
        factor = layer.input_quantizer.pre_quant_scale
        if factor is not None:
            scales[f"{name}.pre_quant_scale"] = _array(factor).reshape(layer.in_features)
    for name, values in scales.items():
        if not (np.isfinite(values) & (values > 0)).all():
            raise BuildError(f"{name}: expected positive numbers, found others", "check the layer's weights for NaN and infinity")
    return scales


def _weight_amax(layer: Any, precision: QuantizedPrecision) -> NDArray[np.float32]:
    amax = _array(layer.weight_quantizer.amax)
    if precision == "int4":
        amax = amax.reshape(layer.out_features, -1)
    else:
        amax = amax.reshape(()) if amax.size == 1 and layer.weight_quantizer.axis is None else amax.reshape(layer.out_features)
    return np.where(amax == 0, np.float32(1), amax)  # weights that are all zero: any scale gives them back


def _array(values: Any) -> NDArray[np.float32]:
    result: NDArray[np.float32] = np.ascontiguousarray(values.detach().float().numpy(force=True))
    return result

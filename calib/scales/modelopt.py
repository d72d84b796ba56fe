"""ModelOpt's part of a calibration. Nothing else imports ModelOpt.

It says which quantizers a precision asks for, makes one call, and takes the scales out of
ModelOpt's modules.

ModelOpt keeps an amax of one number as ``()``, of rows as ``(out, 1)``, of blocks as ``(out * in /
block, 1)``, rows first; and of a layer's ``pre_quant_scale`` the factor of the input, having
multiplied the weight by its inverse. So shapes change and no value does.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from trimode.calib.scales.settings import QuantizeSettings
from trimode.errors import BuildError, DependencyError
from trimode.formats.calibration import QuantizedPrecision, Scales

log = logging.getLogger(__name__)

ALGORITHMS: dict[str, Any] = {
    "fp8": "max",
    # inputs have one scale and weights one a row, so the weights can bear more
    "int8": {"method": "smoothquant", "alpha": 1.0},
    "int4": {"method": "awq_lite", "alpha_step": 0.1},
    "nvfp4": "max",
}
_E4M3 = (4, 3)


def load_modelopt() -> ModuleType:
    """Import ``modelopt.torch.quantization``; it takes seconds the first time.

    Raises:
        DependencyError: it is not installed, or something that it imports is not.
    """
    with tamed():
        try:
            return importlib.import_module("modelopt.torch.quantization")
        except ImportError as error:
            missing = error.name or "nvidia-modelopt"
            raise DependencyError(
                f"expected nvidia-modelopt for calibration, found that {missing} is not installed",
                "pip install 'trimode[calib]'",
            ) from error


def run_modelopt(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    block_size: int | None,
    settings: QuantizeSettings,
    forward_loop: Callable[[Any], None],
) -> None:
    """Let ModelOpt replace linear layers by quantized ones, and calibrate them.

    Args:
        model: Model to change in place; SmoothQuant and AWQ also divide the weights by
            ``pre_quant_scale``.
        linears: Modules of the model. ModelOpt changes the class of these objects, which stay the
            same objects.
        block_size: Inputs that share a scale, for int4.
        settings: Precision and its granularity.
        forward_loop: Function that runs all data through the model; AWQ calls it twice.

    Raises:
        BuildError: ModelOpt gives up.
    """
    quantization = load_modelopt()
    paths = {module: path for path, module in model.named_modules()}
    config = {
        "quant_cfg": quantizer_entries(
            [paths[linear] for linear in linears.values()], block_size, settings
        ),
        "algorithm": ALGORITHMS[settings.precision],
    }
    try:
        with tamed():
            quantization.quantize(model, config, forward_loop)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BuildError(
            f"expected ModelOpt to calibrate {len(linears)} layers, "
            f"found that it gave up: {reason}",
            "use another `precision`, or other prompts",
        ) from error


def quantizer_entries(
    paths: list[str], block_size: int | None, settings: QuantizeSettings
) -> list[dict[str, Any]]:
    """Make ModelOpt's ``quant_cfg`` for the modules at these paths alone.

    It is FP8_DEFAULT_CFG, INT8_SMOOTHQUANT_CFG or INT4_AWQ_CFG.

    For nvfp4 it is that of fp8 too. ModelOpt's own quantizer of blocks runs on a GPU alone; but all
    that its calibration takes from data is the largest magnitude of a weight and of its inputs,
    which is what this one takes. The scales of blocks come from the weights themselves.
    """
    weight, data = {
        "fp8": (
            {"num_bits": _E4M3, "axis": 0 if settings.is_per_channel else None},
            {"num_bits": _E4M3, "axis": None},
        ),
        "int8": (
            {"num_bits": 8, "axis": 0, "narrow_range": True},
            {"num_bits": 8, "axis": None, "narrow_range": True},
        ),
        "int4": ({"num_bits": 4, "block_sizes": {-1: block_size, "type": "static"}}, None),
        "nvfp4": ({"num_bits": _E4M3, "axis": None}, {"num_bits": _E4M3, "axis": None}),
    }[settings.precision]
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for path in paths:
        entries.append({"quantizer_name": f"{path}.weight_quantizer", "cfg": weight})
        if data is not None:
            entries.append({"quantizer_name": f"{path}.input_quantizer", "cfg": data})
    return entries


@contextlib.contextmanager
def tamed() -> Iterator[None]:
    """Log what ModelOpt prints, and drop its warnings.

    The warnings are about software that is not used here.
    """
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for line in printed.getvalue().splitlines():
            log.info("modelopt: %s", line)


def extract_scales(linears: Mapping[str, nn.Module], precision: QuantizedPrecision) -> Scales:
    """Take the scales of all layers, by tensor name.

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
            raise BuildError(
                f"{name}: expected positive numbers, found others",
                "check the layer's weights for NaN and infinity",
            )
    return scales


def _weight_amax(layer: Any, precision: QuantizedPrecision) -> NDArray[np.float32]:
    amax = _array(layer.weight_quantizer.amax)
    if precision == "int4":
        amax = amax.reshape(layer.out_features, -1)
    else:
        amax = (
            amax.reshape(())
            if amax.size == 1 and layer.weight_quantizer.axis is None
            else amax.reshape(layer.out_features)
        )
    # weights that are all zero: any scale gives them back
    return np.where(amax == 0, np.float32(1), amax)


def _array(values: Any) -> NDArray[np.float32]:
    result: NDArray[np.float32] = np.ascontiguousarray(values.detach().float().numpy(force=True))
    return result

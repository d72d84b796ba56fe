"""The quantized trunk against sums in float64 over values looked up in a table of all that a type
holds.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from trimode.calib.reference.fake_quant import quantize_trunk
from trimode.errors import CheckpointError
from trimode.formats.calibration import QuantizedPrecision, Scales
from trimode.graphs.decoder.attention import GrowingCacheAttention
from trimode.graphs.decoder.trunk import LowRankLinear, TriModeTrunk
from trimode.graphs.numerics.scales import LayerScales, linear_scales

LAYERS = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.1.self_attn.o_proj",
    "encoder.layers.1.mlp.down_proj",
    "diffusion_head",
)


def held(precision: QuantizedPrecision, *, inputs: bool) -> np.ndarray:
    """Every value of the type, ascending, float64."""
    if precision == "fp8":
        values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return np.unique(values[np.isfinite(values)])
    lowest, highest = {"int8": (-128 if inputs else -127, 127), "int4": (-8, 7)}[precision]
    return np.arange(lowest, highest + 1, dtype=np.float64)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    return table[np.abs(values[..., None] - table).argmin(-1)]


def some_scales(trunk: TriModeTrunk, precision: QuantizedPrecision) -> Scales:
    rng, scales = np.random.default_rng(4), {}
    for name in LAYERS:
        rows, columns = trunk.get_parameter(f"{name}.weight").shape
        shape = {"fp8": (), "int8": (rows,), "int4": (rows, columns // 16)}[precision]
        scales[f"{name}.weight_amax"] = (
            rng.uniform(0.2, 0.6, shape).astype(np.float32).reshape(shape)
        )
        if precision != "int4":
            scales[f"{name}.input_amax"] = np.array(rng.uniform(1, 3), np.float32)
        if precision != "fp8":
            scales[f"{name}.pre_quant_scale"] = rng.uniform(0.5, 2, columns).astype(np.float32)
    return scales


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_the_nearest_values(
    small_trunk: TriModeTrunk, precision: QuantizedPrecision, name: str
) -> None:
    layers = linear_scales(some_scales(small_trunk, precision), precision)
    scales = layers[name]
    weight = small_trunk.get_parameter(f"{name}.weight").detach().numpy().astype(np.float64)
    branch = small_trunk.get_submodule(name)
    quantize_trunk(small_trunk, precision, layers)
    x = np.random.default_rng(1).normal(size=(7, weight.shape[1])).astype(np.float32)

    factor = (
        np.ones(weight.shape[1])
        if scales.pre_quant is None
        else scales.pre_quant.astype(np.float64)
    )
    step = np.asarray(scales.weight, np.float64)
    step = (
        np.repeat(step, weight.shape[1] // step.shape[1], 1)
        if step.ndim == 2
        else step[:, None]
        if step.ndim
        else step
    )
    seen = x * factor
    if scales.input is not None:
        seen = nearest(seen / float(scales.input), held(precision, inputs=True)) * float(
            scales.input
        )
    expected = seen @ (nearest(weight / factor / step, held(precision, inputs=False)) * step).T

    layer = small_trunk.get_submodule(name)
    assert np.abs(layer(torch.from_numpy(x)).detach().numpy() - expected).max() < 1e-4
    if isinstance(branch, LowRankLinear):
        assert branch.lora_A is not None
        assert branch.lora_B is not None
        down, up = (
            part.weight.detach().numpy().astype(np.float64)
            for part in (branch.lora_A, branch.lora_B)
        )
        drafted = expected + x @ down.T @ up.T * branch.scaling * 0.5
        assert np.abs(layer(torch.from_numpy(x), 0.5).detach().numpy() - drafted).max() < 1e-4


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_gradients_pass_where_an_input_is_not_cut(
    small_trunk: TriModeTrunk, precision: QuantizedPrecision
) -> None:
    name = LAYERS[1]
    quantize_trunk(
        small_trunk,
        precision,
        {name: LayerScales(np.array(0.01, np.float32), np.array(0.005, np.float32))},
    )
    layer = small_trunk.get_submodule(name)
    limit = 0.005 * (448 if precision == "fp8" else 127)
    x = torch.linspace(-2 * limit, 2 * limit, layer.weight.shape[1])[None].requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad is not None
    expected = torch.where(x.detach().abs() < limit, layer.weight.sum(0), 0)
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_blocks_pass_where_an_input_is_in_range(small_trunk: TriModeTrunk) -> None:
    """Also through a block's largest number, which its scale may round down."""
    name = LAYERS[0]
    quantize_trunk(
        small_trunk,
        "nvfp4",
        {name: LayerScales(np.array(1e-3, np.float32), np.array(1 / 2688, np.float32))},
    )
    layer = small_trunk.get_submodule(name)
    x = torch.linspace(-2, 2, layer.weight.shape[1])[None].requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad, torch.where(x.detach().abs() < 1, layer.weight.sum(0), 0), atol=1e-5, rtol=1e-5
    )


def test_layers_that_are_not_named_stay_as_they_are(small_trunk: TriModeTrunk) -> None:
    before = {name: tensor.clone() for name, tensor in small_trunk.state_dict().items()}
    scales = some_scales(small_trunk, "int4")
    layers = linear_scales(scales, "int4", leave_out=[LAYERS[0], LAYERS[3]])
    assert list(layers) == sorted([LAYERS[1], LAYERS[2]])
    quantize_trunk(small_trunk, "int4", layers)
    after = small_trunk.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{LAYERS[1]}.weight", f"{LAYERS[2]}.weight"}
    assert before.keys() == after.keys()
    with torch.no_grad():
        small_trunk(torch.arange(6)[None], torch.arange(6)[None], GrowingCacheAttention(), 1.0)


def test_scales_are_rounded_as_a_pack_rounds_them(small_trunk: TriModeTrunk) -> None:
    scales = some_scales(small_trunk, "int8")
    rounded = linear_scales(scales, "int8", "bfloat16")[LAYERS[0]]
    amax = scales[f"{LAYERS[0]}.weight_amax"]
    np.testing.assert_array_equal(
        rounded.weight, (amax / np.float32(127)).astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    assert rounded.pre_quant is not None
    np.testing.assert_array_equal(
        rounded.pre_quant,
        scales[f"{LAYERS[0]}.pre_quant_scale"].astype(ml_dtypes.bfloat16).astype(np.float32),
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "encoder.layers.9.mlp.up_proj",
            (),
            "linear layer encoder.layers.9.mlp.up_proj, found none",
        ),
        ("encoder.norm", (), "linear layer encoder.norm, found none"),
        (
            LAYERS[0],
            (3,),
            r"scales for a weight of \[\d+, 48\], found weight scales of shape \[3\]",
        ),
    ],
)
def test_scales_of_another_model(
    small_trunk: TriModeTrunk, name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        quantize_trunk(small_trunk, "int8", {name: LayerScales(np.ones(shape, np.float32))})

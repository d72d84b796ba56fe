"""A build refuses numbers that no model computes with, and names them; what is zero stays zero."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import config_of, write_checkpoint
from safetensors.torch import load_file, save_file

from trimode.compiler.options import BuildOptions
from trimode.compiler.pack.integer_stream import WeightStream
from trimode.compiler.pipeline import build_bundle
from trimode.errors import BuildError, CheckpointError, TrimodeError
from trimode.formats.calibration import QuantizedPrecision
from trimode.graphs.numerics import nvfp4
from trimode.graphs.numerics.integers import largest_magnitudes, round_trip, scale_of
from trimode.graphs.numerics.scales import LayerScales
from trimode.runtime import TriModeModel

LAYER = "encoder.layers.0.mlp.up_proj"
NAME = f"{LAYER}.weight"
NORM = "encoder.norm.weight"
LORA = "base_model.model.encoder.layers.0.self_attn.o_proj.lora_A.weight"
RTN: dict[str, Any] = {"calibration": "rtn"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_of(
        num_hidden_layers=1,
        intermediate_size=128,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return write_checkpoint(tmp_path_factory.mktemp("c") / "checkpoint", config, rank=2)


def changed(
    whole: Path,
    folder: Path,
    name: str,
    value: float,
    dtype: torch.dtype | None = None,
    place: Any = (1, 3),
) -> Path:
    """A copy in which one number is another."""
    shutil.copytree(whole, folder)
    file = folder / (
        "linear_spec_lora/adapter_model.safetensors" if ".lora_" in name else "model.safetensors"
    )
    tensors = {
        key: tensor if dtype is None else tensor.to(dtype)
        for key, tensor in load_file(file).items()
    }
    tensors[name][place] = value
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"precision": "fp32"}),
        (torch.bfloat16, {"precision": "bf16"}),
        (torch.float16, {"precision": "fp32"}),
        (torch.bfloat16, {"precision": "int8", **RTN}),
        (torch.float32, {"precision": "int4", **RTN}),
        (torch.bfloat16, {"precision": "nvfp4", **RTN}),
    ],
    ids=["fp32", "bf16", "fp16", "int8", "int4", "nvfp4"],
)
def test_a_weight_that_is_no_number_is_named(
    whole: Path, tmp_path: Path, dtype: torch.dtype, options: dict[str, Any], value: float
) -> None:
    broken = changed(whole, tmp_path / "checkpoint", NAME, value, dtype)
    with pytest.raises(
        CheckpointError,
        match=r"up_proj\.weight: expected finite weights, found (NaN|inf|-inf) at \[1, 3\]",
    ):
        build_bundle(broken, tmp_path / "bundle", BuildOptions(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("name", "place"), [(NORM, 5), (LORA, (0, 2)), ("encoder.embed_tokens.weight", (108, 1))]
)
def test_so_is_one_of_a_norm_an_adapter_an_embedding(
    whole: Path, tmp_path: Path, name: str, place: Any
) -> None:
    broken = changed(whole, tmp_path / "checkpoint", name, float("nan"), place=place)
    with pytest.raises(CheckpointError, match="expected finite weights, found NaN at") as raised:
        build_bundle(broken, tmp_path / "bundle")
    assert name.removeprefix("base_model.model.") in raised.value.message


def test_an_addition_is_no_exception(whole: Path, tmp_path: Path) -> None:
    build_bundle(whole, tmp_path / "bundle")
    broken = changed(whole, tmp_path / "checkpoint", NAME, float("nan"))
    with pytest.raises(TrimodeError):
        build_bundle(broken, tmp_path / "bundle", BuildOptions(precision="int8", **RTN))
    assert TriModeModel.from_pretrained(tmp_path / "bundle").ar_generate(
        [[20, 30]], max_new_tokens=2
    )[0].shape == (1, 4)


def test_a_weight_beyond_fp16(whole: Path, tmp_path: Path) -> None:
    """Dense or quantized: 1e5 is infinite in the type that the graphs compute in."""
    large = changed(whole, tmp_path / "checkpoint", NAME, 1e5)
    with pytest.raises(
        BuildError, match=r"up_proj\.weight: expected weights up to 65504.*found 100000"
    ) as raised:
        build_bundle(large, tmp_path / "bundle", BuildOptions(precision="fp16"))
    assert "bf16" in raised.value.hint


def test_a_float32_weight_beyond_bf16(whole: Path, tmp_path: Path) -> None:
    large = changed(whole, tmp_path / "checkpoint", NAME, float(np.finfo(np.float32).max))
    with pytest.raises(BuildError, match=r"up_proj\.weight: expected weights up to 3\.38953e\+38"):
        build_bundle(large, tmp_path / "bundle", BuildOptions(precision="bf16"))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_weight_beyond_fp16(precision: QuantizedPrecision) -> None:
    weight = np.full((2, 16), 60000, np.float32)

    def bytes_for(values: np.ndarray, stored: Any) -> bytes:
        given = LayerScales(None, block_size=16 if precision == "int4" else None)
        read = lambda: iter([values.tobytes()])  # noqa: E731
        return b"".join(
            WeightStream(
                "a.layer", values.shape, read, scales=given, precision=precision, stored=stored
            ).weight()
        )

    bytes_for(weight, "float16")
    weight[1, 3] = 1e5
    bytes_for(weight, "bfloat16")
    with pytest.raises(
        BuildError, match=r"a\.layer: expected weights up to 65504, the largest of fp16, found 1000"
    ):
        bytes_for(weight, "float16")


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("precision", ["fp8", "int8", "int4", "nvfp4"])
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-42, 1e-38])
def test_rows_of_zeros_and_nearly_zeros_come_back_as_numbers(
    precision: QuantizedPrecision, stored: Any, tiny: float
) -> None:
    """All of the weight, a row, a block; beside numbers of usual size and alone."""
    rng = np.random.default_rng(3)
    for usual in (0.0, 1.0, 1e-40):
        weight = (rng.normal(size=(4, 64)) * usual).astype(np.float32)
        weight[1] = tiny
        weight[2, 16:32] = tiny
        weight[3, 32:48] = 0
        scale = scale_of(largest_magnitudes(weight, precision, 16), precision, stored)
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
        found = round_trip(weight, scale, precision)
        assert np.isfinite(found).all()
        assert not found[weight == 0].any()
        assert np.abs(found).max() <= 1.1 * np.abs(weight).max() + 1e-6


def test_a_block_scale_that_rounds_to_zero_divides_nothing() -> None:
    """The smallest block scale times a global scale that is nearly zero is zero in float32."""
    weight = np.zeros((1, 32), np.float32)
    weight[0, 0], weight[0, 16] = 1e-41, 1e-45
    scale = scale_of(largest_magnitudes(weight, "nvfp4", None), "nvfp4", "float32")
    codes, scales = nvfp4.encode(weight, scale)
    assert np.isfinite(nvfp4.decode(codes, scales, scale)).all()
    assert not nvfp4.decode(codes, scales, scale)[weight == 0].any()


@pytest.mark.parametrize("precision", ["int8", "int4", "nvfp4"])
def test_a_model_with_a_layer_of_zeros_generates(
    whole: Path, tmp_path: Path, precision: Any
) -> None:
    empty = changed(whole, tmp_path / "checkpoint", NAME, 0.0, place=...)
    build_bundle(empty, tmp_path / "bundle", BuildOptions(precision=precision, calibration="rtn"))
    model = TriModeModel.from_pretrained(tmp_path / "bundle", num_threads=1)
    result = model.stream([[20, 30]], "ar", max_new_tokens=4, logprobs=2, eos_token_ids=()).finish()
    assert result.logprobs is not None
    assert all(
        np.isfinite(one.logprob or 0) and np.isfinite([value for _, value in one.top]).all()
        for one in result.logprobs
    )


def test_scales_that_make_a_weight_infinite() -> None:
    weight = np.full((1, 4), 1e38, np.float32)
    given = LayerScales.from_amax(
        "int8", np.array(1, np.float32), pre_quant=np.full(4, 1e-3, np.float32)
    )
    stream = WeightStream(
        "a.layer",
        (1, 4),
        lambda: iter([weight.tobytes()]),
        scales=given,
        precision="int8",
        stored="float32",
    )
    with pytest.raises(BuildError, match=r"a\.layer: expected weights that stay finite"):
        b"".join(stream.weight())
    fine = replace(given, pre_quant=np.ones(4, np.float32))
    b"".join(
        WeightStream(
            "a.layer",
            (1, 4),
            lambda: iter([weight.tobytes()]),
            scales=fine,
            precision="int8",
            stored="float32",
        ).weight()
    )


def test_an_input_scale_that_does_not_fit_names_its_layer() -> None:
    given = LayerScales.from_amax("int8", np.array(1, np.float32), np.array(1e30, np.float32))
    stream = WeightStream(
        "a.layer",
        (1, 4),
        lambda: iter([np.ones(4, np.float32).tobytes()]),
        scales=given,
        precision="int8",
        stored="float16",
    )
    b"".join(stream.weight())
    with pytest.raises(BuildError, match=r"a\.layer: expected scales that fit float16"):
        b"".join(stream.scale("input_scale"))

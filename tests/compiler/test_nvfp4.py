"""NVFP4 bundles: the arithmetic bit for bit, the graphs against references of the same numbers,
engines for real, and what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from checkpoints import config_of, raw_weight, write_checkpoint

from trimode.calib.reference.fake_quant import in_blocks, quantize_trunk
from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.calib.scales.modelopt import load_modelopt
from trimode.cli.inspect import describe
from trimode.compiler.options import BuildOptions
from trimode.compiler.pack.nvfp4_stream import Nvfp4Stream
from trimode.compiler.pipeline import build_bundle
from trimode.errors import BuildError, BundleError, CheckpointError, UsageError
from trimode.formats.calibration import SCHEMA_VERSION, Calibration, Scales, save_calibration
from trimode.formats.contract import GRAPH_NAMES, GraphName
from trimode.graphs.checkpoint import describe_model, open_checkpoint
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.identity import SourceDigest
from trimode.graphs.numerics.integers import round_trip, scale_of
from trimode.graphs.numerics.nvfp4 import PAIRS, VALUES, decode, encode
from trimode.graphs.numerics.scales import LayerScales, linear_scales
from trimode.runtime.bundle.open import Bundle, open_bundle
from trimode.runtime.bundle.weights import WeightPack
from trimode.runtime.sessions.ort.library import load_graph, session_options
from trimode.runtime.sessions.ort.session import OrtSession

CONFIG = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = np.arange(12)[None] * 7 % 109
LAYER, OTHER = "encoder.layers.0.mlp.up_proj", "encoder.layers.0.mlp.down_proj"
PACK = "weights.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("c") / "it", config_of(**CONFIG), rank=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def layers_of(checkpoint: Path) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name in open_checkpoint(checkpoint).tensors
        if name.endswith("_proj.weight")
    ]


def calibrate(
    checkpoint: Path, folder: Path, *, weights: float = 1, inputs: float = 1, **changes: Any
) -> Path:
    """Scales of every layer but the head; ``weights`` and ``inputs`` are factors of their
    magnitudes.
    """
    digest, rng, scales = SourceDigest(open_checkpoint(checkpoint)), np.random.default_rng(3), {}
    for layer in layers_of(checkpoint):
        scales[f"{layer}.weight_amax"] = np.asarray(
            np.abs(raw_weight(checkpoint, f"{layer}.weight")).max() * np.float32(weights),
            np.float32,
        )
        scales[f"{layer}.input_amax"] = np.array(rng.uniform(2, 5) * inputs, np.float32)
    list(digest.read_all())
    record = Calibration(
        schema_version=SCHEMA_VERSION,
        trimode_version="0",
        precision="nvfp4",
        algorithm="by hand",
        block_size=16,
        source_name="it",
        source_sha256=digest.base_hexdigest(),
        scales_sha256="",
        data=None,
        layers={},
        libraries={},
    )
    save_calibration(
        folder,
        record.model_copy(update=changes.pop("record", {})),
        scales | changes.pop("scales", {}),
    )
    return folder


# The arithmetic


def some_weights() -> np.ndarray:
    """Blocks of every kind: ordinary, all zero, far below the rest, on borders between codes,
    negative zeros, and rows of other magnitudes.
    """
    rng = np.random.default_rng(0)
    values = rng.standard_normal((37, 96)).astype(np.float32) * np.exp(
        rng.uniform(-6, 3, (37, 1))
    ).astype(np.float32)
    values[3] = 0
    values[5, :16] *= np.float32(1e-9)
    values[6, ::3] = -0.0
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], np.float32)
    values[7, :16] = np.concatenate([ties, -ties])
    values[8, :16] = np.concatenate(
        [np.nextafter(ties, np.float32(9)), np.nextafter(-ties, np.float32(9))]
    )
    values[9, :16] = np.float32(448 * 6) * np.linspace(-1, 1, 16, dtype=np.float32)  # the largest
    return values


def test_weights_are_those_of_modelopt() -> None:
    """Codes, block scales and the global scale, bit for bit."""
    load_modelopt()  # which silences what its import warns of
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    values = some_weights()
    expected, blocks, whole = NVFP4QTensor.quantize(torch.from_numpy(values.copy()), 16)
    # float32, whatever the pack's type is
    scale = scale_of(np.asarray(np.abs(values).max(), np.float32), "nvfp4", "bfloat16")
    assert scale == whole.numpy() == 1
    for factor in (1, 1.37, 2.0**-20):
        scaled = values * np.float32(factor)
        scale = scale_of(np.abs(scaled).max(), "nvfp4", "float32")
        expected, blocks, whole = NVFP4QTensor.quantize(torch.from_numpy(scaled.copy()), 16)
        codes, scales = encode(scaled, scale)
        assert scale.tobytes() == whole.numpy().tobytes()
        assert scales.tobytes() == blocks.view(torch.uint8).numpy().tobytes()
        assert codes.tobytes() == expected._quantized_data.numpy().tobytes()
        wide = expected.dequantize(
            torch.float32, scale=blocks, double_scale=whole, block_sizes={-1: 16}
        )
        np.testing.assert_array_equal(decode(codes, scales, scale), wide.numpy())


def test_every_value_is_the_nearest() -> None:
    """A search through all that a block can hold, for a global scale that some blocks are too large
    for.
    """
    values, scale = some_weights(), np.array(0.013, np.float32)
    found = round_trip(values, scale, "nvfp4").astype(np.float64)
    e4m3 = np.arange(1, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    magnitudes = np.unique(np.abs(VALUES)).astype(np.float64)
    for row, out in zip(values.reshape(-1, 16), found.reshape(-1, 16), strict=True):
        wanted = np.abs(row).max() / (6 * float(scale)) or 1.0
        block = e4m3[np.abs(e4m3 - wanted).argmin()] * float(scale)
        steps = np.minimum(np.abs(row) / block, 6)
        distance = np.abs(steps[:, None] - magnitudes)
        assert (np.abs(np.abs(out / block) - steps) <= distance.min(-1) + 1e-6).all()
        assert (np.isclose(np.abs(out / block)[:, None], magnitudes, rtol=1e-6).any(-1)).all()
        assert (out * row >= 0).all()


def test_a_byte_is_two_numbers_the_first_in_the_low_bits() -> None:
    values = np.tile(VALUES, (1, 2))
    codes, scales = encode(values, np.array(1, np.float32))
    packed = onnx.numpy_helper.from_array(values.astype(ml_dtypes.float4_e2m1fn))
    negative_zero = np.array([0, 0, 0, 0, 8, 0, 0, 0] * 2, np.uint8)  # weights have one zero
    assert (codes[0] | negative_zero).tobytes() == packed.raw_data
    assert scales.view(ml_dtypes.float8_e4m3fn).tolist() == [[1, 1]]
    assert PAIRS[0x2B].tolist() == [-1.5, 1]


def test_weights_that_are_no_numbers() -> None:
    with pytest.raises(BuildError, match="expected finite weights, found NaN"):
        encode(np.full((1, 16), np.nan, np.float32), np.array(1, np.float32))
    stream = stream_of(np.full((2, 16), np.inf, np.float32), LayerScales(None, block_size=16), 64)
    with pytest.raises(BuildError, match=r"a\.layer: expected scales that fit float32"):
        list(stream.weight())


def stream_of(weight: np.ndarray, given: LayerScales, piece: int) -> Nvfp4Stream:
    raw = weight.tobytes()

    def read() -> Iterator[bytes]:
        return (raw[i : i + piece] for i in range(0, len(raw), piece))

    return Nvfp4Stream("a.layer", weight.shape, read, read, given)


@pytest.mark.parametrize("piece", [4, 52, 1 << 20])
@pytest.mark.parametrize("is_given", [True, False])
def test_a_weight_is_quantized_in_pieces_of_any_size(piece: int, is_given: bool) -> None:
    weight = some_weights()
    amax = np.array(700, np.float32) if is_given else np.abs(weight).max()
    given = (
        LayerScales.from_amax("nvfp4", amax, np.array(3, np.float32), block_size=16)
        if is_given
        else LayerScales(None, block_size=16)
    )
    stream = stream_of(weight, given, piece)
    scale = scale_of(amax, "nvfp4", "float32")
    codes, scales = encode(weight, scale)
    assert b"".join(stream.weight()) == codes.tobytes()
    assert b"".join(stream.scale("weight_scale")) == scales.tobytes()
    assert b"".join(stream.scale("weight_scale_2")) == scale.tobytes()
    shapes = {kind: shape for kind, (_, shape) in stream.scales.items()}
    assert shapes == {"weight_scale": (37, 6), "weight_scale_2": ()} | (
        {"input_scale": ()} if is_given else {}
    )
    if is_given:
        assert (
            b"".join(stream.scale("input_scale"))
            == np.float32(np.float32(3) / np.float32(2688)).tobytes()
        )


def slow_input(x: np.ndarray, scale: float) -> np.ndarray:
    """NVFP4 of inputs, one block after the other, in float64."""
    e4m3 = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    magnitudes = np.abs(VALUES[:8]).astype(np.float64)
    out = np.empty(x.size)
    for i, block in enumerate(x.astype(np.float64).reshape(-1, 16)):
        step = e4m3[np.abs(e4m3 - np.abs(block).max() / (6 * scale)).argmin()] * scale
        codes = (
            np.zeros(16)
            if step == 0
            else magnitudes[np.abs(np.abs(block)[:, None] / step - magnitudes).argmin(-1)]
        )
        out[16 * i : 16 * i + 16] = np.sign(block) * codes * step
    return out.reshape(x.shape)


def test_inputs_in_blocks() -> None:
    """Blocks of all magnitudes: within the calibrated range, above it, so small that their scale is
    zero, and zero.
    """
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((9, 5, 48)) * np.exp(rng.uniform(-14, 3, (9, 5, 1)))).astype(
        np.float32
    )
    x[0] = 0
    scale = np.float32(4 / 2688)
    found = in_blocks(torch.from_numpy(x), torch.tensor(float(scale))).numpy()
    np.testing.assert_allclose(found, slow_input(x, float(scale)), rtol=1e-6)
    assert np.isfinite(found).all()
    assert (found[0] == 0).all()
    assert np.abs(found).max() <= 4 * 1.000001 < np.abs(x).max()
    assert (found == 0).all(-1).sum() > 5


# The graphs


def run_graphs(
    bundle: Bundle, target: str | None = None
) -> dict[GraphName, tuple[np.ndarray, ...]]:
    """Each graph over a cache that has something in it."""
    session = OrtSession(bundle, bundle.chosen.targets[target] if target else None, num_threads=1)
    cache = session.new_cache()
    session.run("ar", cache, IDS, 0)
    return {
        graph_name: tuple(
            np.array(x) for x in session.run(graph_name, cache, IDS[:, ::-1] + 1, 5, 1.0)
        )
        for graph_name in GRAPH_NAMES
    }


def torch_graphs(trunk: TriModeTrunk) -> dict[GraphName, tuple[np.ndarray, ...]]:
    session = TorchSession(trunk)
    cache = session.new_cache()
    session.run("ar", cache, IDS, 0)
    found: dict[GraphName, tuple[np.ndarray, ...]] = {}
    for graph_name in GRAPH_NAMES:
        again = type(cache).of([(k.clone(), v.clone()) for k, v in cache.layers])
        found[graph_name] = session.run(graph_name, again, IDS[:, ::-1] + 1, 5, 1.0)
    return found


def largest_difference(
    found: dict[GraphName, tuple[np.ndarray, ...]],
    expected: dict[GraphName, tuple[np.ndarray, ...]],
) -> float:
    pairs = [
        pair
        for graph_name in GRAPH_NAMES
        for pair in zip(found[graph_name], expected[graph_name], strict=True)
        if pair[0].dtype == np.float32
    ]
    return max(float(np.abs(one - other).max()) for one, other in pairs)


@pytest.mark.parametrize("targets", [("cpu",), ("cpu", "sm120")])
def test_rounded_weights_run_as_their_values(
    checkpoint: Path, tmp_path: Path, cache: Path, targets: tuple[str, ...]
) -> None:
    """Weights that the pack's bytes stand for, read here byte by byte, in the torch trunk."""
    result = build_bundle(
        checkpoint,
        tmp_path / "b",
        BuildOptions(
            targets, precision="nvfp4", calibration="rtn", block_lengths=(8,), cache=cache
        ),
    )
    bundle = open_bundle(tmp_path / "b")
    assert result.record.targets["cpu"].placement == "external"
    opened, pack = open_checkpoint(checkpoint), WeightPack(tmp_path / "b" / PACK)
    trunk = load_trunk(opened, describe_model(opened).num_positions, result.manifest.dtype)
    for layer in layers_of(checkpoint):
        entry = pack.entries[f"{layer}.weight"]
        codes = pack.raw(f"{layer}.weight").reshape(entry.shape[0], -1)
        numbers = np.stack([VALUES[codes & 15], VALUES[codes >> 4]], -1).reshape(entry.shape)
        blocks = (
            pack.raw(f"{layer}.weight_scale")
            .view(ml_dtypes.float8_e4m3fn)
            .astype(np.float32)
            .reshape(entry.shape[0], -1)
        )
        weight = numbers * np.repeat(blocks * pack.widened(f"{layer}.weight_scale_2"), 16, 1)
        exact = raw_weight(checkpoint, f"{layer}.weight")
        # half the distance of 4 and 6, of the largest, and a scale's rounding
        assert np.abs(weight - exact).max() <= np.abs(exact).max() / 5
        trunk.get_parameter(f"{layer}.weight").data = torch.from_numpy(weight)
    assert largest_difference(run_graphs(bundle), torch_graphs(trunk)) < 1e-4
    assert largest_difference(run_graphs(bundle, "cpu"), run_graphs(bundle)) == 0
    assert "rounded to nearest, blocks of 16" in "\n".join(describe(bundle.manifest))


def test_calibrated_graphs_against_torch(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    folder = calibrate(checkpoint, tmp_path / "cal", inputs=0.5)
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(calibration=folder, cache=cache))
    opened = open_checkpoint(checkpoint)
    trunk = load_trunk(opened, describe_model(opened).num_positions)
    scales: Scales = {}
    for layer in layers_of(checkpoint):
        scales[f"{layer}.weight_amax"] = np.asarray(
            np.abs(raw_weight(checkpoint, f"{layer}.weight")).max()
        )
    rng = np.random.default_rng(3)
    scales |= {
        f"{layer}.input_amax": np.array(rng.uniform(2, 5) * 0.5, np.float32)
        for layer in layers_of(checkpoint)
    }
    quantize_trunk(trunk, "nvfp4", linear_scales(scales, "nvfp4", "bfloat16"))
    found, expected = run_graphs(open_bundle(tmp_path / "b")), torch_graphs(trunk)
    # A value on the border between two codes may fall to either side: one step of one input then,
    # out of many.
    for graph_name in ("ar", "verify"):
        assert np.isclose(found[graph_name][-1], expected[graph_name][-1], atol=1e-3).mean() > 0.9  # type: ignore[index]
    dense = torch_graphs(load_trunk(opened, describe_model(opened).num_positions))
    assert largest_difference(found, expected) < 0.1 * largest_difference(found, dense)


def test_weights_stay_as_they_lie(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    """ONNX Runtime looks numbers up in every forward: it does not compute them once, when it loads
    a graph, and keep them eight times as large.
    """
    build_bundle(
        checkpoint,
        tmp_path / "b",
        BuildOptions(
            ("cpu", "sm120"), precision="nvfp4", calibration="rtn", block_lengths=(8,), cache=cache
        ),
    )
    options = session_options(0, 1, dequantizes=True)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    load_graph(tmp_path / "b" / "ar.onnx", options, ["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    found = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {found[f"{layer}.weight"] for layer in layers_of(checkpoint)} == {onnx.TensorProto.UINT8}
    assert (
        sum(node.op_type == "Gather" and node.input[0] == "pairs.float4e2m1" for node in graph.node)
        == 7
    )


# Engines


def test_rounded_weights_compile(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    options = BuildOptions(
        ("sm120", "dgx-spark"),
        precision="nvfp4",
        calibration="rtn",
        block_lengths=(8,),
        cache=cache,
    )
    result = build_bundle(checkpoint, tmp_path / "b", options)
    assert {record.compute_dtype for record in result.record.targets.values()} == {"bfloat16"}
    assert sum(name.endswith(".engine") for name in open_bundle(tmp_path / "b").manifest.files) == 6


def test_calibrated_weights_compile(checkpoint: Path, tmp_path: Path) -> None:
    """Weights are inputs; all scales are part of the engines, and of their names in the cache."""
    folder, cache = calibrate(checkpoint, tmp_path / "cal"), tmp_path / "cache"
    options = BuildOptions(("sm120",), calibration=folder, block_lengths=(8,), cache=cache)
    assert build_bundle(checkpoint, tmp_path / "one", options).num_cached == 0
    assert build_bundle(checkpoint, tmp_path / "again", options).num_cached == 3
    calibrate(checkpoint, folder, weights=1.25)
    assert build_bundle(checkpoint, tmp_path / "two", options).num_cached == 0
    calibrate(checkpoint, folder, inputs=1.25)
    assert build_bundle(checkpoint, tmp_path / "three", options).num_cached == 0
    # Added without the calibration: the scales of inputs come from the pack, and make the same
    # engines.
    build_bundle(
        checkpoint,
        tmp_path / "four",
        BuildOptions(("sm121",), calibration=folder, block_lengths=(8,), cache=cache),
    )
    added = build_bundle(
        checkpoint, tmp_path / "four", BuildOptions(("sm120",), block_lengths=(8,), cache=cache)
    )
    assert (added.built, added.num_cached) == (("sm120",), 3)


def test_baked_weights_compile(checkpoint: Path, tmp_path: Path) -> None:
    folder = calibrate(checkpoint, tmp_path / "cal")
    options = BuildOptions(("sm120",), calibration=folder, block_lengths=(8,), weights="baked")
    result = build_bundle(checkpoint, tmp_path / "b", options)
    assert result.built == ("sm120",)


# The bundle


def test_the_pack_is_safetensors(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    folder = calibrate(checkpoint, tmp_path / "cal")
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(calibration=folder, cache=cache))
    tensors, pack = load_file(tmp_path / "b" / PACK), WeightPack(tmp_path / "b" / PACK)
    held = {
        kind: tensors[f"{LAYER}.{kind}"]
        for kind in ("weight", "weight_scale", "weight_scale_2", "input_scale")
    }
    assert {kind: (tensor.dtype, tuple(tensor.shape)) for kind, tensor in held.items()} == {
        "weight": (torch.uint8, (128, 32)),
        "weight_scale": (torch.float8_e4m3fn, (128, 4)),
        "weight_scale_2": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    }
    entry = pack.entries[f"{LAYER}.weight"]
    assert (entry.dtype, entry.shape, entry.num_bytes) == ("float4e2m1", (128, 64), 4096)
    with safe_open(tmp_path / "b" / PACK, "np") as file:
        assert file.metadata()["U8"].startswith("float4e2m1, two numbers")


def test_a_pack_of_bytes_that_mean_something_else(
    checkpoint: Path, tmp_path: Path, cache: Path
) -> None:
    build_bundle(
        checkpoint, tmp_path / "b", BuildOptions(precision="nvfp4", calibration="rtn", cache=cache)
    )
    data = (tmp_path / "b" / PACK).read_bytes()
    (tmp_path / "other").write_bytes(data.replace(b'"U8":"float4e2m1', b'"U8":"float4e1m2', 1))
    with pytest.raises(BundleError, match="U8 stands for 'float4e1m2'"):
        WeightPack(tmp_path / "other")


def test_beside_int4(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    """Two packs in which the same type of safetensors means two things."""
    for precision in ("int4", "nvfp4"):
        build_bundle(
            checkpoint,
            tmp_path / "b",
            BuildOptions(precision=precision, calibration="rtn", cache=cache),
        )
        build_bundle(
            checkpoint,
            tmp_path / precision,
            BuildOptions(precision=precision, calibration="rtn", cache=cache),
        )
    for precision in ("int4", "nvfp4"):
        assert (
            largest_difference(
                run_graphs(open_bundle(tmp_path / "b", precision)),
                run_graphs(open_bundle(tmp_path / precision)),
            )
            == 0
        )


# Refusals


@pytest.mark.parametrize(
    ("target", "capability"), [("sm89", "8.9"), ("a100", "8.0"), ("t4", "7.5"), ("h100", "9.0")]
)
def test_gpus_before_blackwell_are_refused(
    checkpoint: Path, tmp_path: Path, target: str, capability: str
) -> None:
    options = BuildOptions((target,), precision="nvfp4", calibration="rtn")
    with pytest.raises(
        UsageError,
        match=(
            rf"{target} \({capability}\): expected .*, found nvfp4; .* begin with compute "
            rf"capability 10\.0"
        ),
    ) as refusal:
        build_bundle(checkpoint, tmp_path / "b", options)
    assert "`precision` bf16" in refusal.value.hint or target == "t4"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scales": {f"{LAYER}.weight_amax": np.ones(128, np.float32)}},
            rf"expected {LAYER}\.weight_amax of shape \[\] .*, found \[128\]",
        ),
        (
            {"scales": {f"{LAYER}.pre_quant_scale": np.ones(64, np.float32)}},
            rf"expected {LAYER}\.pre_quant_scale of shape nothing",
        ),
        (
            {"record": {"block_size": 32}},
            r"inputs in blocks of 16, found (64|128) inputs and blocks of 32",
        ),
    ],
)
def test_scales_that_do_not_fit(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = calibrate(checkpoint, tmp_path / "cal", **change)
    with pytest.raises(CheckpointError, match=message):
        build_bundle(checkpoint, tmp_path / "b", BuildOptions(calibration=folder))
    assert [p.name for p in tmp_path.iterdir()] == ["cal"]


def test_inputs_come_in_whole_blocks(tmp_path: Path) -> None:
    odd = write_checkpoint(tmp_path / "odd", config_of(num_hidden_layers=1, hidden_size=40))
    with pytest.raises(
        UsageError,
        match="nvfp4: expected layers whose inputs are multiples of 16, found 40, 80, 96",
    ):
        build_bundle(odd, tmp_path / "b", BuildOptions(precision="nvfp4", calibration="rtn"))


# The job


def test_the_job_finds_the_magnitudes(tmp_path: Path) -> None:
    """Those of the weights are looked up here; those of inputs are the ones that fp8 has, which
    other tests compare with hooks.
    """
    from trimode.calib.scales.settings import QuantizeSettings
    from trimode.cli.calibrate.scales import run_calibrate
    from trimode.formats.calibration import load_calibration
    from trimode.runtime.text.prompts import USUAL_STYLE

    folder = write_checkpoint(tmp_path / "c", config_of(**CONFIG, block_size=8), rank=2)
    (tmp_path / "data.jsonl").write_text(json.dumps({"token_ids": [5, 20, 33, 48]}) + "\n")
    found = {}
    for precision in ("nvfp4", "fp8"):
        settings = QuantizeSettings(precision, max_new_tokens=8)  # type: ignore[arg-type]
        data = tmp_path / "data.jsonl"
        run_calibrate(folder, tmp_path / precision, data, settings, style=USUAL_STYLE)
        found[precision] = load_calibration(tmp_path / precision)
    record, scales = found["nvfp4"]
    assert (record.algorithm, record.block_size) == ("max", 16)
    assert set(scales) == {
        f"{layer}.{kind}" for layer in layers_of(folder) for kind in ("weight_amax", "input_amax")
    }
    for layer in layers_of(folder):
        assert scales[f"{layer}.weight_amax"] == np.abs(raw_weight(folder, f"{layer}.weight")).max()
        assert scales[f"{layer}.input_amax"] == found["fp8"][1][f"{layer}.input_amax"]
        assert 15 < record.layers[layer].weight_snr_db < 25
    build_bundle(folder, tmp_path / "b", BuildOptions(calibration=tmp_path / "nvfp4"))
    run_graphs(open_bundle(tmp_path / "b"))

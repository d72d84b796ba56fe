"""Quantized bundles: the arithmetic bit for bit, the graphs against references of the same weights,
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
import onnx_ir as ir
import pytest
import torch
from checkpoints import config_of, write_checkpoint
from once import TracedOnce
from safetensors.numpy import load_file, save_file
from torch.nn import functional
from typer.testing import CliRunner

from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.cli.inspect import describe
from trimode.cli.main import app
from trimode.compiler.options import BuildOptions
from trimode.compiler.pack.integer_stream import WeightStream
from trimode.compiler.pack.layout import plan_pack
from trimode.compiler.pack.writer import write_pack
from trimode.compiler.passes.base import lower, to_bytes
from trimode.compiler.passes.quantize_weights import QuantizeWeights
from trimode.compiler.passes.recipes import lower_for
from trimode.compiler.passes.scales_to_constants import known_scales, read_scales
from trimode.compiler.pipeline import build_bundle
from trimode.errors import BuildError, CheckpointError, TrimodeError, UsageError
from trimode.formats.calibration import Calibration, QuantizedPrecision, save_calibration
from trimode.formats.contract import GRAPH_NAMES, GraphName
from trimode.formats.manifest import TargetRecord
from trimode.graphs.checkpoint import describe_model, open_checkpoint
from trimode.graphs.identity import SourceDigest
from trimode.graphs.numerics.integers import FORMATS, dequantize, quantize, round_to, scale_of
from trimode.graphs.numerics.quantization import load_quantization
from trimode.graphs.numerics.scales import LayerScales
from trimode.graphs.numerics.stored import NUMPY_DTYPES
from trimode.runtime.bundle.open import Bundle, open_bundle
from trimode.runtime.bundle.weights import WeightPack
from trimode.runtime.sessions.ort.session import OrtSession

PRECISIONS: tuple[QuantizedPrecision, ...] = ("fp8", "int8", "int4")
CONFIG = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = np.arange(12)[None] * 7 % 109


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("c") / "it", config_of(**CONFIG), rank=2)


# The arithmetic


def representable(precision: QuantizedPrecision) -> list[float]:
    """Values of the type, ascending."""
    if precision != "fp8":
        return [float(i) for i in range(*((-127, 128) if precision == "int8" else (-8, 8)))]
    codes = (
        np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64).tolist()
    )
    return [-c for c in reversed(codes[1:])] + codes


def slow(value: np.float32, scale: np.float32, table: list[float], center: int) -> float:
    """The nearest value of the table; of two, the one whose distance from zero, counted in steps,
    is even.
    """
    with np.errstate(over="ignore"):
        x = max(2 * table[0], min(2 * table[-1], float(value / scale)))
    ranked = sorted(range(len(table)), key=lambda i: (abs(table[i] - x), (i - center) % 2))
    return table[ranked[0]]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["tensor", "row", "block"])
def test_every_value_is_the_nearest(precision: QuantizedPrecision, layout: str) -> None:
    rng, table = np.random.default_rng(0), representable(precision)
    center = table.index(0.0)
    grid = np.array(table, np.float32)
    ties = (grid[1:] + grid[:-1]) / 2
    special = [0.0, -0.0, 1e-30, -1e-42, 1e9, -1e9, 3e38]
    values = np.concatenate(
        [
            special,
            grid,
            ties,
            np.nextafter(ties, np.float32(1e9)),
            np.nextafter(ties, np.float32(-1e9)),
            rng.standard_normal(70) * 300,
        ]
    ).astype(np.float32)
    columns = 14
    values = np.resize(values, (-(-values.size // columns), columns))
    rows = values.shape[0]
    shape = {"tensor": (), "row": (rows,), "block": (rows, 7)}[layout]
    scale = np.asarray(rng.choice(np.array([1, 0.25, 2, 0.3, 1.7], np.float32), shape), np.float32)
    wide = np.broadcast_to(
        {"tensor": scale, "row": scale[..., None], "block": np.repeat(scale, 2, -1)}[layout],
        values.shape,
    )
    expected = np.array(
        [
            [slow(v, s, table, center) for v, s in zip(*pair, strict=True)]
            for pair in zip(values, wide, strict=True)
        ],
        np.float32,
    )
    raw = quantize(values, scale, precision)
    assert raw.shape == (rows, columns // 2 if precision == "int4" else columns)
    np.testing.assert_array_equal(dequantize(raw, np.ones(shape, np.float32), precision), expected)
    np.testing.assert_array_equal(dequantize(raw, scale, precision), expected * wide)
    if precision == "fp8":  # negative zero too
        clipped = np.clip(values / wide, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        assert raw.tobytes() == clipped.tobytes()


def test_fp8_of_many_bit_patterns() -> None:
    values = np.arange(0, 1 << 32, 99_991, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = values[np.isfinite(values)][None]
    expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert quantize(values, np.array(1, np.float32), "fp8").tobytes() == expected.tobytes()
    assert quantize(
        np.array([[np.nan, 1]], np.float32), np.array(1, np.float32), "fp8"
    ).tolist() == [[0x7F, 0x38]]


def test_int4_lies_as_onnx_says() -> None:
    values = np.arange(-8, 8).reshape(2, 8)
    raw = quantize(values.astype(np.float32), np.ones(2, np.float32), "int4")
    assert (
        raw.tobytes() == ir.tensor(values.astype(ml_dtypes.int4), dtype=ir.DataType.INT4).tobytes()
    )
    assert raw[0, 0] == 0x98  # -8 low, -7 high


def test_scales_are_rounded_before_they_divide() -> None:
    amax = np.array([0, 1, 1e-30, 3.3], np.float32)
    for stored in ("float32", "float16", "bfloat16"):
        found = scale_of(amax, "int4", stored)
        assert found[0] == 1
        assert (found > 0).all()
        np.testing.assert_array_equal(found, found.astype(NUMPY_DTYPES[stored]).astype(np.float32))
    np.testing.assert_array_equal(scale_of(amax[1:], "fp8", "float32"), amax[1:] / np.float32(448))
    with pytest.raises(BuildError, match="expected scales that fit float16, found 142857"):
        scale_of(np.array(1e6, np.float32), "int4", "float16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("piece", [4, 52, 1 << 20])
def test_a_weight_is_quantized_in_pieces_of_any_size(
    precision: QuantizedPrecision, piece: int
) -> None:
    weight = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    raw = weight.tobytes()
    given = LayerScales(
        None,
        pre_quant=np.linspace(0.5, 2, 6, dtype=np.float32),
        block_size=2 if precision == "int4" else None,
    )

    def read() -> Iterator[bytes]:
        return (raw[i : i + piece] for i in range(0, len(raw), piece))

    stream = WeightStream("it", (7, 6), read, scales=given, precision=precision, stored="bfloat16")
    found = b"".join(stream.weight())
    scaled = weight / round_to(given.pre_quant, "bfloat16")  # type: ignore[arg-type]
    amax = np.abs(scaled).max(1) if precision != "int4" else np.abs(scaled).reshape(7, 3, 2).max(2)
    scale = scale_of(amax, precision, "bfloat16")
    assert found == quantize(scaled, scale, precision).tobytes()
    assert b"".join(stream.scale("weight_scale")) == scale.astype(ml_dtypes.bfloat16).tobytes()
    assert stream.scales == {
        "weight_scale": ("bfloat16", scale.shape),
        "pre_quant_scale": ("bfloat16", (6,)),
    }


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_that_are_no_numbers(precision: QuantizedPrecision) -> None:
    weight = np.array([[1, np.nan]], np.float32)
    given = LayerScales.from_amax(
        precision,
        np.ones((1, 1) if precision == "int4" else (1,), np.float32),
        block_size=2 if precision == "int4" else None,
    )
    stream = WeightStream(
        "a.layer",
        (1, 2),
        lambda: iter([weight.tobytes()]),
        scales=given,
        precision=precision,
        stored="float32",
    )
    with pytest.raises(BuildError, match=r"a\.layer: expected finite weights"):
        list(stream.weight())


# Calibrations made by hand


def linear_weights(checkpoint: Path) -> dict[str, np.ndarray]:
    opened = open_checkpoint(checkpoint)
    return {
        name.removesuffix(".weight"): np.frombuffer(b"".join(entry.chunks()), np.float32).reshape(
            entry.shape
        )
        for name, entry in opened.tensors.items()
        if len(entry.shape) == 2 and "lora" not in name and "embed" not in name
    }


def digest_of(checkpoint: Path) -> str:
    digest = SourceDigest(open_checkpoint(checkpoint))
    list(digest.read_all())
    return digest.base_hexdigest()


def make_scales(
    checkpoint: Path,
    precision: QuantizedPrecision,
    *,
    per_tensor: bool = False,
    block_size: int = 32,
) -> dict[str, np.ndarray]:
    """Every layer and the head, with a scale of its own for each input."""
    rng, scales = np.random.default_rng(3), {}
    for layer, weight in linear_weights(checkpoint).items():
        pre = np.exp(rng.uniform(-0.5, 0.5, weight.shape[1])).astype(np.float32)
        scaled = np.abs(weight / pre)
        if precision == "int4":
            amax = scaled.reshape(weight.shape[0], -1, block_size).max(2)
        else:
            amax = np.asarray(scaled.max() if per_tensor else scaled.max(1))
            scales[f"{layer}.input_amax"] = np.array(rng.uniform(2, 5), np.float32)
        scales |= {f"{layer}.weight_amax": amax, f"{layer}.pre_quant_scale": pre}
    return scales


def calibration_for(
    checkpoint: Path,
    folder: Path,
    precision: QuantizedPrecision,
    scales: dict[str, np.ndarray],
    **changes: Any,
) -> Path:
    record = Calibration(
        schema_version=1,
        trimode_version="0",
        precision=precision,
        algorithm="by hand",
        block_size=32 if precision == "int4" else None,
        source_name="it",
        source_sha256=digest_of(checkpoint),
        scales_sha256="",
        data=None,
        layers={},
        libraries={},
    )
    save_calibration(folder, record.model_copy(update=changes), scales)
    return folder


# Graphs


def run_graphs(
    bundle: Bundle, target: TargetRecord | None = None
) -> dict[GraphName, tuple[np.ndarray, ...]]:
    """Each graph over a cache that has something in it."""
    session = OrtSession(bundle, target, num_threads=1)
    cache = session.new_cache()
    session.run("ar", cache, IDS, 0)
    return {
        graph_name: tuple(
            np.array(x) for x in session.run(graph_name, cache, IDS[:, ::-1] + 1, 5, 1.0)
        )
        for graph_name in bundle.manifest.contracts
    }


def assert_close(
    found: dict[GraphName, tuple[np.ndarray, ...]],
    expected: dict[GraphName, tuple[np.ndarray, ...]],
    tolerance: float,
) -> None:
    for graph_name in found:
        for one, other in zip(found[graph_name], expected[graph_name], strict=True):
            if one.dtype == np.float32:
                np.testing.assert_allclose(one, other, atol=tolerance, rtol=0, err_msg=graph_name)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("targets", [("cpu",), ("cpu", "sm89")])
def test_rounded_weights_run_as_their_values(
    checkpoint: Path,
    tmp_path: Path,
    precision: QuantizedPrecision,
    targets: tuple[str, ...],
) -> None:
    """The quantized graph, and a dense bundle of the numbers that the quantized weights stand
    for.
    """
    # inputs as they are
    options = {"precision": precision, "calibration": "rtn", "block_lengths": (8,), "exact": True}
    result = build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(targets, **options))
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.chosen.calibration is not None
    assert bundle.chosen.calibration.model_dump() == {
        "name": "rtn",
        "algorithm": "rtn",
        "block_size": 64 if precision == "int4" else None,
        "scales_sha256": None,
    }
    stored = result.manifest.dtype
    assert stored == ("float32" if targets == ("cpu",) else "bfloat16")
    assert result.record.targets["cpu"].placement == "external"
    pack = WeightPack(tmp_path / "bundle" / "weights.safetensors")
    dense, rounded = write_checkpoint(tmp_path / "dense", config_of(**CONFIG), rank=2), {}
    weights = load_file(dense / "model.safetensors")
    for name, values in weights.items():
        entry = pack.entries[name]
        assert entry.shape == values.shape
        if entry.dtype == FORMATS[precision].dtype:
            scale = pack.widened(f"{name}_scale")
            weights[name] = rounded[name.removesuffix(".weight")] = dequantize(
                pack.raw(name).reshape(entry.shape[0], -1), scale, precision
            )
            step = np.repeat(
                scale.reshape(values.shape[0], -1),
                values.shape[1] // (scale.size // values.shape[0]),
                1,
            )
            assert (np.abs(weights[name] - values) <= step * 0.51 + 1e-6).all()
        else:
            weights[name] = pack.widened(name)
            assert len(values.shape) == 1 or "embed" in name or "head" in name
    save_file(weights, dense / "model.safetensors")
    if stored == "float32":  # a bundle of these numbers has the same in all other places
        build_bundle(dense, tmp_path / "expected")
        assert_close(
            run_graphs(bundle, result.record.targets["cpu"]),
            run_graphs(open_bundle(tmp_path / "expected")),
            1e-4,
        )
    else:
        reference = torch_graphs(
            checkpoint, rounded, dict.fromkeys(rounded, lambda x: x), "bfloat16"
        )
        assert_close(run_graphs(bundle), reference, 1e-4)


def torch_graphs(
    checkpoint: Path,
    weights: dict[str, np.ndarray],
    inputs: dict[str, Any],
    stored: str = "float32",
) -> dict[GraphName, tuple[np.ndarray, ...]]:
    """The torch trunk with these weights; ``inputs`` are functions of each layer's input."""
    opened = open_checkpoint(checkpoint)
    trunk = load_trunk(opened, describe_model(opened).num_positions, stored)  # type: ignore[arg-type]
    for name, module in trunk.named_modules():
        if name in weights:
            _replace(module, torch.from_numpy(weights[name]), inputs[name])
    session = TorchSession(trunk)
    cache = session.new_cache()
    session.run("ar", cache, IDS, 0)
    found: dict[GraphName, tuple[np.ndarray, ...]] = {}
    for graph_name in (*GRAPH_NAMES, "quadratic"):
        again = type(cache).of([(k.clone(), v.clone()) for k, v in cache.layers])
        found[graph_name] = session.run(graph_name, again, IDS[:, ::-1] + 1, 5, 1.0)
    return found


def _replace(module: Any, weight: torch.Tensor, change: Any) -> None:
    """The product takes the changed input, the adapter's branch the input as it is."""

    def forward(x: torch.Tensor, drafter_scale: Any = None) -> torch.Tensor:
        y = functional.linear(change(x), weight)
        if drafter_scale is None or getattr(module, "lora_A", None) is None:
            return y
        return y + module.lora_B(module.lora_A(x) * (drafter_scale * module.scaling))

    module.forward = forward


def fake_quantized(
    precision: QuantizedPrecision,
    pre: np.ndarray,
    scale: np.ndarray | None,
    accuracy_level: int = 1,
) -> Any:
    """What the Mul, QuantizeLinear and DequantizeLinear of a layer do, in torch, or MatMulNBits
    with its inputs.
    """
    multiplier = torch.from_numpy(pre)
    if scale is None:
        return (
            (lambda x: in_int8_blocks(x * multiplier, 32))
            if accuracy_level == 4
            else lambda x: x * multiplier
        )
    step = torch.tensor(float(scale))
    if precision == "int8":
        return lambda x: torch.clamp(torch.round(x * multiplier / step), -128, 127) * step
    return lambda x: (
        torch.clamp(x * multiplier / step, -448, 448).to(torch.float8_e4m3fn).float() * step
    )


def in_int8_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Each block of a row rounded to int8, by a scale of its own."""
    blocks = x.unflatten(-1, (-1, block))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, torch.round(blocks / step) * step, 0).flatten(-2)


@pytest.mark.parametrize(
    ("precision", "per_tensor", "accuracy_level"),
    [
        ("int8", False, 4),
        ("fp8", False, 4),
        ("fp8", True, 4),
        ("int4", False, 1),
        ("int4", False, 4),
    ],
)
def test_calibrated_graphs_against_torch(
    checkpoint: Path,
    tmp_path: Path,
    precision: QuantizedPrecision,
    per_tensor: bool,
    accuracy_level: int,
) -> None:
    scales = make_scales(checkpoint, precision, per_tensor=per_tensor)
    folder = calibration_for(checkpoint, tmp_path / "cal", precision, scales)
    result = build_bundle(
        checkpoint,
        tmp_path / "bundle",
        BuildOptions(calibration=folder, quadratic=True, exact=accuracy_level == 1),
    )
    assert list(result.manifest.precisions) == [precision]
    assert result.record.calibration is not None
    assert (result.record.calibration.name, result.record.calibration.algorithm) == (
        "cal",
        "by hand",
    )
    weights, inputs = {}, {}
    for layer, weight in linear_weights(checkpoint).items():
        pre = scales[f"{layer}.pre_quant_scale"]
        step = scale_of(scales[f"{layer}.weight_amax"], precision, "float32")
        weights[layer] = dequantize(quantize(weight / pre, step, precision), step, precision)
        amax = scales.get(f"{layer}.input_amax")
        inputs[layer] = fake_quantized(
            precision,
            pre,
            None if amax is None else scale_of(amax, precision, "float32"),
            accuracy_level,
        )
    found, expected = (
        run_graphs(open_bundle(tmp_path / "bundle"), result.record.targets["cpu"]),
        torch_graphs(checkpoint, weights, inputs),
    )
    # A value on the border between two steps may fall to either side: one step of one input then,
    # out of many.
    assert_close(found, expected, 1e-4 if precision == "int4" and accuracy_level == 1 else 0.1)
    for graph_name, logits in (("ar", 1), ("verify", 2), ("quadratic", 2)):
        close = np.isclose(found[graph_name][logits], expected[graph_name][logits], atol=1e-3)  # type: ignore[index]
        assert close.mean() > 0.9
    assert any("by hand" in line and "scales of cal" in line for line in describe(result.manifest))


@pytest.fixture(scope="module")
def graph(checkpoint: Path, traced_once: TracedOnce) -> ir.Model:
    opened = open_checkpoint(checkpoint)
    return traced_once.graph("draft", opened, describe_model(opened))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_pass(
    checkpoint: Path, graph: ir.Model, precision: QuantizedPrecision, dtype: Any
) -> None:
    stored: dict[str, Any] = {}
    for layer, weight in linear_weights(checkpoint).items():
        rows, columns = weight.shape
        stored[f"{layer}.weight"] = LayerTensor(FORMATS[precision].dtype, weight.shape)
        stored[f"{layer}.weight_scale"] = LayerTensor(
            dtype, (rows, columns // 32) if precision == "int4" else (rows,)
        )
        stored[f"{layer}.pre_quant_scale"] = LayerTensor(dtype, (columns,))
        if precision != "int4":
            stored[f"{layer}.input_scale"] = LayerTensor(dtype, ())
    record = TargetRecord(
        # engines of TensorRT-RTX hold int4 weights
        backend="tensorrt" if precision == "int4" else "tensorrt_rtx",
        device="cuda",
        compute_capability="8.9",
        compute_dtype=dtype,
        placement="shared",
        capacity=99,
        workspace_mib=None,
        library="",
        graphs={},
    )
    lowered = lower_for(record, graph, stored)
    onnx.checker.check_model(onnx.load_from_string(to_bytes(lowered)))
    inputs = {v.name: v for v in lowered.graph.inputs}
    kinds = {"float8e4m3fn": "FLOAT8E4M3FN", "float32": "FLOAT"}
    for name, tensor in stored.items():
        assert inputs[name].dtype.name == kinds.get(tensor.dtype, tensor.dtype.upper())
        assert inputs[name].shape.numpy() == tensor.shape
    lora = next(
        n
        for n in lowered.graph
        if any(v and v.name == "encoder.layers.0.self_attn.o_proj.lora_A.weight" for v in n.inputs)
    )
    product = next(
        n
        for n in lowered.graph
        if any(
            v and v.name == "encoder.layers.0.self_attn.o_proj.weight_dequantized" for v in n.inputs
        )
    )
    assert lora.inputs[0].producer().op_type not in ("Mul", "DequantizeLinear")
    assert product.inputs[0].producer().op_type == (
        "Mul" if precision == "int4" else "DequantizeLinear"
    )
    with pytest.raises(BuildError, match="QuantizeWeights"):
        lower(graph, QuantizeWeights(stored), QuantizeWeights(stored))


class LayerTensor:
    def __init__(self, dtype: Any, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape


# Engines


@pytest.mark.parametrize(
    ("precision", "targets", "placement"),
    [
        ("int4", ("sm80", "sm86", "sm89", "sm120", "sm121"), "shared"),
        ("int8", ("t4", "sm86", "sm121"), "shared"),
        ("int4", ("sm86",), "baked"),
    ],
)
def test_rounded_weights_compile(
    checkpoint: Path,
    tmp_path: Path,
    precision: QuantizedPrecision,
    targets: tuple[str, ...],
    placement: Any,
) -> None:
    options = BuildOptions(
        targets, precision=precision, calibration="rtn", block_lengths=(8,), weights=placement
    )
    result = build_bundle(checkpoint, tmp_path / "bundle", options)
    assert {record.compute_dtype for record in result.record.targets.values()} == {
        "float16" if "t4" in targets else "bfloat16"
    }
    manifest = open_bundle(tmp_path / "bundle").manifest
    # Engines that hold weights are one for all graphs, which are told from each other by profiles.
    each = 1 if placement == "shared" else 3
    assert sum(name.endswith(".engine") for name in manifest.files) == each * len(targets)
    held = sum(
        entry.num_bytes
        for name, entry in WeightPack(tmp_path / "bundle" / "weights.safetensors").entries.items()
        if "_proj.weight" in name
    )
    for record in result.record.targets.values():
        for engine in record.graphs.values():
            first, profiles = engine.first_profile, engine.profiles
            assert record.profiles_in(engine.file)[first : first + len(profiles)] == profiles
            assert [plan.rows for plan in engine.plans] == [one.rows[1] for one in profiles]
            if placement == "shared":
                assert engine.constant_bytes == held
    lines = [line for line in describe(manifest) if "on the GPU" in line]
    assert len(lines) == (len(targets) if placement == "shared" else 0)


@pytest.mark.parametrize(
    ("precision", "targets"), [("fp8", ("sm89", "sm120", "sm121")), ("int8", ("sm80",))]
)
def test_calibrated_weights_compile(
    checkpoint: Path, tmp_path: Path, precision: QuantizedPrecision, targets: tuple[str, ...]
) -> None:
    """Scales are constants of the engines: the cache has them for the same scales, not for another
    calibration of the same layers.
    """
    scales = make_scales(checkpoint, precision)
    folder = calibration_for(checkpoint, tmp_path / "cal", precision, scales)
    options = BuildOptions(
        targets, calibration=folder, block_lengths=(8,), cache=tmp_path / "cache"
    )
    assert build_bundle(checkpoint, tmp_path / "one", options).num_cached == 0
    assert build_bundle(checkpoint, tmp_path / "again", options).num_cached == 3 * len(targets)
    calibration_for(
        checkpoint,
        folder,
        precision,
        {name: np.asarray(values * np.float32(1.25)) for name, values in scales.items()},
    )
    assert build_bundle(checkpoint, tmp_path / "two", options).num_cached == 0


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_constant_scales_are_those_of_the_pack(
    checkpoint: Path, graph: ir.Model, tmp_path: Path, precision: QuantizedPrecision
) -> None:
    folder = calibration_for(
        checkpoint, tmp_path / "cal", precision, make_scales(checkpoint, precision)
    )
    opened = open_checkpoint(checkpoint)
    quantization = load_quantization(folder, precision, opened)
    layout = plan_pack(opened, describe_model(opened).num_positions, "bfloat16", quantization)
    write_pack(layout, tmp_path / "weights.safetensors", lambda _: None)
    known, held = (
        known_scales(quantization, "bfloat16"),
        read_scales([tmp_path / "weights.safetensors"]),
    )
    assert known is not None
    assert known.keys() == held.keys()
    record = TargetRecord(
        backend="tensorrt_rtx",
        device="cuda",
        compute_capability="8.9",
        compute_dtype="bfloat16",
        placement="shared",
        capacity=99,
        workspace_mib=None,
        library="",
        graphs={},
    )
    lowered = lower_for(record, graph, layout.tensors, known)
    assert not known.keys() & {value.name for value in lowered.graph.inputs}
    for name, values in known.items():
        np.testing.assert_array_equal(values, held[name])
        np.testing.assert_array_equal(
            lowered.graph.initializers[name].const_value.numpy().astype(np.float32), values
        )
    with pytest.raises(BuildError, match="ScalesToConstants"):
        lower_for(
            record, graph, layout.tensors, {name: values[None] for name, values in known.items()}
        )


def test_the_runtime_knows_the_types() -> None:
    import tensorrt_rtx

    from trimode.runtime.sessions.tensorrt.graph import _DTYPES

    for name in _DTYPES:
        assert hasattr(tensorrt_rtx.DataType, name)


# The bundle


def test_targets_are_added_from_the_pack_alone(checkpoint: Path, tmp_path: Path) -> None:
    folder = calibration_for(checkpoint, tmp_path / "cal", "int8", make_scales(checkpoint, "int8"))
    options = BuildOptions(
        ("sm86",), calibration=folder, block_lengths=(8,), cache=tmp_path / "cache"
    )
    build_bundle(checkpoint, tmp_path / "bundle", options)
    result = build_bundle(
        checkpoint,
        tmp_path / "bundle",
        BuildOptions(("sm86", "sm89", "cpu"), block_lengths=(8,), cache=tmp_path / "cache"),
    )
    assert result.built == ("sm89", "cpu")
    whole = build_bundle(
        checkpoint,
        tmp_path / "whole",
        BuildOptions(
            ("sm86", "sm89", "cpu"),
            calibration=folder,
            block_lengths=(8,),
            cache=tmp_path / "cache",
        ),
    )
    assert whole.num_cached == 6
    run_graphs(open_bundle(tmp_path / "bundle"), result.record.targets["cpu"])
    other = calibration_for(
        checkpoint, tmp_path / "other", "int8", make_scales(checkpoint, "int8", per_tensor=True)
    )
    for options, message in (
        (
            BuildOptions(("sm89",), calibration=other),
            r"expected a bundle with the scales of other \(by hand\), found those of cal",
        ),
        (BuildOptions(("sm89",), precision="int8", calibration="rtn"), r"scales of rtn"),
        (
            BuildOptions(("sm89",), precision="fp16"),
            "expected a precision that computes in bfloat16, as all of the bundle do, found fp16",
        ),
        (
            BuildOptions(("t4",), precision="int8"),
            "t4: expected a bundle that computes in a type it can run, found one in bfloat16",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            build_bundle(checkpoint, tmp_path / "bundle", options)


def test_the_pack_is_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    folder = calibration_for(checkpoint, tmp_path / "cal", "fp8", make_scales(checkpoint, "fp8"))
    for name, options in {
        "fp8": BuildOptions(calibration=folder),
        "int4": BuildOptions(precision="int4", calibration="rtn"),
    }.items():
        build_bundle(checkpoint, tmp_path / name, options)
        from safetensors.torch import load_file as load

        tensors = load(tmp_path / name / "weights.safetensors")
        weight = tensors["encoder.layers.0.mlp.down_proj.weight"]
        assert (weight.dtype, tuple(weight.shape)) == (
            (torch.float8_e4m3fn, (64, 128)) if name == "fp8" else (torch.uint8, (64, 64))
        )
        entry = WeightPack(tmp_path / name / "weights.safetensors").entries[
            "encoder.layers.0.mlp.down_proj.weight"
        ]
        assert (entry.dtype, entry.shape) == (FORMATS[name].dtype, (64, 128))  # type: ignore[index]
        with pytest.raises(ValueError, match="expected float32, float16 or bfloat16"):
            WeightPack(tmp_path / name / "weights.safetensors").widened(
                "encoder.layers.0.mlp.down_proj.weight"
            )


# Refusals


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            BuildOptions(precision="int4"),
            "int4: expected `calibration`, found none",
            "--data PROMPTS.jsonl -o CAL`; or pass `calibration` rtn",
        ),
        (BuildOptions(precision="fp8"), "fp8: expected `calibration`, found none", "-o CAL`"),
        (
            BuildOptions(precision="fp8", calibration="rtn"),
            "expected `precision` int8, int4 or nvfp4, found fp8",
            "trimode calibrate",
        ),
        (
            BuildOptions(precision="bf16", calibration="rtn"),
            "expected `calibration` with `precision` fp8, int8, int4 or nvfp4, found bf16",
            "leave",
        ),
        (
            BuildOptions(("a100",), precision="fp8"),
            r"a100 \(8.0\): expected a precision it can run .*, found fp8",
            "bf16",
        ),
        (
            BuildOptions(("t4",), precision="int4", calibration="rtn"),
            r"t4 \(7.5\): expected a precision .* \(fp16, int8\), found int4",
            "fp16",
        ),
        (
            BuildOptions(precision="int4", calibration=Path("nowhere")),
            "nowhere: expected a calibration",
            "trimode calibrate",
        ),
    ],
)
def test_what_cannot_be_built(
    checkpoint: Path, tmp_path: Path, options: BuildOptions, message: str, hint: str
) -> None:
    with pytest.raises(TrimodeError, match=message) as refusal:
        build_bundle(checkpoint, tmp_path / "bundle", options)
    assert hint in refusal.value.hint
    assert list(tmp_path.iterdir()) == []


def test_int4_wants_whole_blocks(tmp_path: Path) -> None:
    odd = write_checkpoint(tmp_path / "odd", config_of(num_hidden_layers=1, hidden_size=40))
    with pytest.raises(
        UsageError, match="expected layers whose inputs are multiples of 16, found 40, 80, 96"
    ):
        build_bundle(odd, tmp_path / "bundle", BuildOptions(precision="int4", calibration="rtn"))
    build_bundle(odd, tmp_path / "bundle", BuildOptions(precision="int8", calibration="rtn"))
    run_graphs(open_bundle(tmp_path / "bundle"))


LAYER = "encoder.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("precision", "change", "message"),
    [
        (
            "int8",
            {f"{LAYER}.weight_amax": np.ones(5)},
            rf"expected {LAYER}\.weight_amax of shape \[\] or \[128\] .*, found \[5\]",
        ),
        (
            "int8",
            {f"{LAYER}.input_amax": np.ones(64)},
            rf"expected {LAYER}\.input_amax of shape \[\] .*, found \[64\]",
        ),
        ("fp8", {f"{LAYER}.pre_quant_scale": np.ones(128)}, r"pre_quant_scale of shape \[64\]"),
        (
            "int8",
            {f"{LAYER}.weight_amax": None},
            rf"expected {LAYER}\.weight_amax of shape .*, found nothing",
        ),
        ("int4", {f"{LAYER}.weight_amax": np.ones((128, 1))}, r"weight_amax of shape \[128, 2\]"),
        (
            "int4",
            {f"{LAYER}.input_amax": np.ones(())},
            rf"expected {LAYER}\.input_amax of shape nothing",
        ),
        (
            "int8",
            {"encoder.embed_tokens.weight_amax": np.ones(())},
            r"linear layers, found encoder\.embed_tokens\.weight_amax",
        ),
        ("int8", {f"{LAYER}.bias_amax": np.ones(())}, r"linear layers, found .*bias_amax"),
    ],
)
def test_scales_that_do_not_fit(
    checkpoint: Path,
    tmp_path: Path,
    precision: QuantizedPrecision,
    change: dict[str, Any],
    message: str,
) -> None:
    scales = make_scales(checkpoint, precision) | change
    kept = {
        name: np.asarray(values, np.float32)
        for name, values in scales.items()
        if values is not None
    }
    folder = calibration_for(checkpoint, tmp_path / "cal", precision, kept)
    with pytest.raises(CheckpointError, match=message):
        build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(calibration=folder))
    assert [p.name for p in tmp_path.iterdir()] == ["cal"]


def test_calibrations_of_something_else(checkpoint: Path, tmp_path: Path) -> None:
    scales = make_scales(checkpoint, "int8")
    folder = calibration_for(checkpoint, tmp_path / "cal", "int8", scales, source_sha256="0" * 64)
    with pytest.raises(
        CheckpointError,
        match=r"cal: expected a calibration of this checkpoint \(.*\), found one of another \(0000",
    ):
        build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(calibration=folder))
    assert [p.name for p in tmp_path.iterdir()] == ["cal"]
    with pytest.raises(UsageError, match="expected a calibration for fp8, found one for int8"):
        build_bundle(
            checkpoint, tmp_path / "bundle", BuildOptions(precision="fp8", calibration=folder)
        )
    blocks = calibration_for(
        checkpoint, tmp_path / "blocks", "int4", make_scales(checkpoint, "int4"), block_size=48
    )
    with pytest.raises(
        CheckpointError, match="inputs in whole blocks, found 64 inputs and blocks of 48"
    ):
        build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(calibration=blocks))
    with pytest.raises(CheckpointError, match="at least one layer"):
        build_bundle(
            checkpoint,
            tmp_path / "bundle",
            BuildOptions(calibration=calibration_for(checkpoint, tmp_path / "none", "int8", {})),
        )


def test_from_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    command = ["build", str(checkpoint), "-o", str(tmp_path / "bundle"), "--no-cache", "--json"]
    done = CliRunner().invoke(app, [*command, "--precision", "int4", "--calibration", "rtn"])
    assert json.loads(done.stdout)["precision"] == "int4", done.stderr
    assert "rounded to nearest, blocks of 64" in "\n".join(
        describe(open_bundle(tmp_path / "bundle").manifest)
    )

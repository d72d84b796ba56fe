"""`trimode verify` of quantized precisions: it passes on what the compiler makes, and finds scales,
codes and inputs that were tampered with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from checkpoints import config_of, write_checkpoint
from commands import trimode

from trimode.calib.reference.fake_quant import InputQuantizer, quantize_trunk
from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.cli.verify import run_verify
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.compiler.verify.graphs import compare_target
from trimode.compiler.verify.rounding import (
    DitheredSession,
    GraphCodes,
    Guide,
    GuidedQuantizer,
    _spacing,
    guide_inputs,
)
from trimode.compiler.verify.runners import CachedText
from trimode.compiler.verify.tokens import TokenPrompt, compare_tokens
from trimode.compiler.verify.tolerance import tolerance_for
from trimode.errors import BundleError, UsageError
from trimode.formats.calibration import (
    Calibration,
    QuantizedPrecision,
    load_calibration,
    save_calibration,
)
from trimode.formats.contract import GRAPH_NAMES, GraphName
from trimode.formats.files import sha256_of
from trimode.formats.verification import Verification, read_verifications
from trimode.graphs.checkpoint import describe_model, open_checkpoint
from trimode.graphs.identity import SourceDigest
from trimode.graphs.numerics.integers import FORMATS
from trimode.graphs.numerics.scales import LayerScales, linear_scales
from trimode.runtime.bundle.weights import WeightPack

PRECISIONS: tuple[QuantizedPrecision, ...] = ("fp8", "int8", "int4", "nvfp4")
CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LAYER, OTHER = "encoder.layers.1.mlp.up_proj", "encoder.layers.1.mlp.down_proj"
PACK = "weights.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("c") / "it", config_of(**CONFIG), rank=2)


def calibrate(checkpoint: Path, folder: Path, precision: QuantizedPrecision) -> Path:
    """Every layer and the head; fp8 has one scale a weight and none before it, as a calibration
    gives them.
    """
    opened, rng, scales = open_checkpoint(checkpoint), np.random.default_rng(3), {}
    for name, entry in opened.tensors.items():
        if len(entry.shape) != 2 or "lora" in name or "embed" in name:
            continue
        layer, weight = (
            name.removesuffix(".weight"),
            np.frombuffer(b"".join(entry.chunks()), np.float32).reshape(entry.shape),
        )
        if precision in ("int8", "int4"):
            scales[f"{layer}.pre_quant_scale"] = np.exp(
                rng.uniform(-0.5, 0.5, weight.shape[1])
            ).astype(np.float32)
            weight = weight / scales[f"{layer}.pre_quant_scale"]
        blocks = weight.reshape(weight.shape[0], -1, 32) if precision == "int4" else weight
        scales[f"{layer}.weight_amax"] = np.asarray(
            np.abs(blocks).max(None if precision in ("fp8", "nvfp4") else -1)
        )
        if precision != "int4":
            scales[f"{layer}.input_amax"] = np.array(rng.uniform(2, 5), np.float32)
    digest = SourceDigest(opened)
    list(digest.read_all())
    record = Calibration(
        schema_version=1,
        trimode_version="0",
        precision=precision,
        algorithm="by hand",
        block_size={"int4": 32, "nvfp4": 16}.get(precision),
        source_name="it",
        source_sha256=digest.base_hexdigest(),
        scales_sha256="",
        data=None,
        layers={},
        libraries={},
    )
    save_calibration(folder, record, scales)
    return folder


@pytest.fixture(scope="module")
def made(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Bundle and calibration of a precision, once."""
    folder, done = tmp_path_factory.mktemp("made"), set()

    def make(precision: Any) -> tuple[Path, Path]:
        bundle, calibration = folder / precision, folder / f"cal-{precision}"
        if precision not in done:
            calibrate(checkpoint, calibration, precision)
            build_bundle(
                checkpoint,
                bundle,
                BuildOptions(calibration=calibration, cache=folder / "cache", quadratic=True),
            )
            done.add(precision)
        return bundle, calibration

    return make


@pytest.fixture
def copied(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> Callable[[str], tuple[Path, Path]]:
    def copy_of(precision: str) -> tuple[Path, Path]:
        bundle, calibration = made(precision)
        return Path(shutil.copytree(bundle, tmp_path / "bundle")), calibration

    return copy_of


def verify(bundle: Path, checkpoint: Path, **options: Any) -> Verification:
    passed = run_verify(
        bundle, checkpoint, threads=1, **{"max_new_tokens": 6, "long": 20, **options}
    )
    found = read_verifications(bundle).verifications[-1]
    assert found.passed == passed
    return found


def record_again(bundle: Path, name: str) -> None:
    """Let the manifest say that a changed file is what was built."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = {
        "sha256": sha256_of(bundle / name),
        "num_bytes": (bundle / name).stat().st_size,
    }
    file.write_text(json.dumps(manifest))


def change_tensor(
    bundle: Path, name: str, dtype: Any, change: Callable[[np.ndarray], None]
) -> None:
    entry = WeightPack(bundle / PACK).entries[name]
    with (bundle / PACK).open("r+b") as stream:
        stream.seek(entry.offset)
        values = np.frombuffer(stream.read(entry.num_bytes), dtype).copy()
        change(values)
        stream.seek(entry.offset)
        stream.write(values.tobytes())
    record_again(bundle, PACK)


def swap_initializers(bundle: Path, graph: str, one: str, other: str) -> None:
    """Let a portable graph, and that of ``cpu``, read two tensors each where the other lies."""
    for file in (graph, graph.replace(".onnx", ".cpu.onnx")):
        model = onnx.load(bundle / file, load_external_data=False)
        first, second = (
            {e.key: e for e in t.external_data}["offset"]
            for name in (one, other)
            for t in model.graph.initializer
            if t.name == name
        )
        first.value, second.value = second.value, first.value
        (bundle / file).write_bytes(model.SerializeToString())
        record_again(bundle, file)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_passes_on_what_was_built(
    made: Callable[[str], tuple[Path, Path]],
    checkpoint: Path,
    precision: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle, calibration = made(precision)
    found = verify(bundle, checkpoint, calibration=calibration, max_new_tokens=20, long=160)
    assert found.passed
    assert found.precision == precision
    assert found.weights is not None
    assert found.scales is not None
    assert (found.weights.num_layers, found.scales.calibration) == (15, f"cal-{precision}")
    codes = [record.codes for record in found.graphs if record.codes is not None]
    assert len(codes) == (0 if precision == "int4" else 5)
    # 14 layers of up to 96 inputs, the head's of the last row or of all, two sequences of 7 rows;
    # 56 rows in quadratic
    for record in codes:
        assert record.num_compared >= 2 * 7 * 2 * (6 * 64 + 96)
        assert record.num_other < 0.001 * record.num_compared
    assert {record.mode for record in found.tokens} >= {"ar", "quadratic_spec"}
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize("precision", PRECISIONS)
def test_notices_a_scale_of_the_weight(
    copied: Callable[[str], tuple[Path, Path]], checkpoint: Path, precision: str
) -> None:
    bundle, _ = copied(precision)

    def change(values: np.ndarray) -> None:
        values[values.size // 2] *= 1.02  # of a row, of a block in a row, or of all

    change_tensor(
        bundle, f"{LAYER}.weight_scale{'_2' if precision == 'nvfp4' else ''}", np.float32, change
    )
    found = verify(bundle, checkpoint)
    assert not found.passed
    assert found.weights is not None
    assert list(found.weights.differs) == [LAYER]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_notices_one_code(
    copied: Callable[[str], tuple[Path, Path]], checkpoint: Path, precision: str
) -> None:
    bundle, _ = copied(precision)

    def change(values: np.ndarray) -> None:
        values[77] ^= 1  # the lowest bit

    change_tensor(bundle, f"{LAYER}.weight", np.uint8, change)
    found = verify(bundle, checkpoint)
    assert found.weights is not None
    assert found.weights.differs == {LAYER: 1}
    assert not found.passed


@pytest.mark.parametrize(
    ("precision", "graph"), [("fp8", "verify"), ("int8", "verify"), ("int8", "quadratic")]
)
def test_notices_another_input_scale_in_a_graph(
    copied: Callable[[str], tuple[Path, Path]],
    checkpoint: Path,
    precision: str,
    graph: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The graph reads two layers' scales in each other's place."""
    bundle, calibration = copied(precision)
    swap_initializers(bundle, f"{graph}.onnx", f"{LAYER}.input_scale", f"{OTHER}.input_scale")
    found = verify(bundle, checkpoint, calibration=calibration)
    assert not found.passed
    assert found.weights is not None
    assert found.weights.passed
    refused = {layer for record in found.graphs if record.codes for layer in record.codes.refused}
    assert refused >= {LAYER, OTHER}
    assert {
        record.graph for record in found.graphs if record.codes and not record.codes.passed
    } == {graph}
    assert "unexplained in " + LAYER in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_notices_another_factor_in_a_graph(
    copied: Callable[[str], tuple[Path, Path]], checkpoint: Path, precision: str
) -> None:
    bundle, _ = copied(precision)
    swap_initializers(
        bundle,
        "ar.onnx",
        f"{LAYER}.pre_quant_scale",
        "encoder.layers.0.mlp.up_proj.pre_quant_scale",
    )
    found = verify(bundle, checkpoint)
    assert {(record.graph, record.subject) for record in found.graphs if not record.passed} >= {
        ("ar", "target"),
        ("ar", "portable"),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_notices_scales_that_are_not_the_calibrations(
    copied: Callable[[str], tuple[Path, Path]], checkpoint: Path, precision: str
) -> None:
    """A wrong input scale in the pack is wrong for graph and reference alike: only the calibration
    can tell.
    """
    bundle, calibration = copied(precision)
    kind = "weight_scale" if precision == "int4" else "input_scale"

    def change(values: np.ndarray) -> None:
        values[0] *= 1.02

    change_tensor(bundle, f"{LAYER}.{kind}", np.float32, change)
    if kind == "input_scale":
        found = verify(bundle, checkpoint)
        assert found.passed
        assert any("--calibration" in note for note in found.notes)
    found = verify(bundle, checkpoint, calibration=calibration)
    assert not found.passed
    assert found.scales is not None
    assert found.scales.differs == (f"{LAYER}.{kind}",)


def test_rounded_to_nearest_needs_no_calibration_to_compare(
    checkpoint: Path, tmp_path: Path
) -> None:
    """On a pack of bfloat16 beside it, one precision added to the other: each has a result of its
    own.
    """
    for precision in ("bf16", "int4"):
        calibration: Any = "rtn" if precision == "int4" else None
        build_bundle(
            checkpoint,
            tmp_path / "b",
            BuildOptions(precision=precision, calibration=calibration, cache=tmp_path / "cache"),
        )
    found = {
        p: verify(tmp_path / "b", checkpoint, precision=p, target=t)
        for p, t in (("int4", "cpu"), ("bf16", "portable"))
    }
    again = verify(tmp_path / "b", checkpoint, precision="int4", target="portable")
    assert all(one.passed for one in (*found.values(), again))
    assert found["int4"].scales is not None
    assert found["bf16"].weights is None
    assert found["int4"].weight_dtype == "bfloat16"
    verify(tmp_path / "b", checkpoint, precision="int4", target="cpu", seed=2)
    records = read_verifications(tmp_path / "b").verifications
    assert [(r.precision, r.target, r.seed) for r in records] == [
        ("bf16", "portable", 0),
        ("int4", "portable", 0),
        ("int4", "cpu", 2),
    ]
    with pytest.raises(
        UsageError,
        match="expected --calibration with a precision that was built by one, found int4",
    ):
        verify(tmp_path / "b", checkpoint, precision="int4", calibration=tmp_path)


def test_refuses_what_it_cannot_compare(
    copied: Callable[[str], tuple[Path, Path]], made: Any, checkpoint: Path, tmp_path: Path
) -> None:
    bundle, calibration = copied("int8")
    record, scales = load_calibration(calibration)
    scales[f"{LAYER}.input_amax"] = np.asarray(scales[f"{LAYER}.input_amax"] * np.float32(2))
    save_calibration(tmp_path / "other", record, scales)
    with pytest.raises(
        UsageError,
        match=r"expected the calibration that the bundle was built by \(cal-int8\), found another",
    ):
        verify(bundle, checkpoint, calibration=tmp_path / "other")
    change_tensor(bundle, f"{LAYER}.input_scale", np.float32, lambda values: values.fill(np.nan))
    with pytest.raises(BundleError, match=rf"{LAYER}.input_scale: expected positive numbers"):
        verify(bundle, checkpoint)
    done = trimode("verify", bundle, "--against", checkpoint, "--precision", "int4")
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a precision of the bundle (int8), found 'int4'" in done.stderr


# A target whose codes cannot be seen


def quantized(checkpoint: Path, calibration: Path) -> TorchSession:
    """The quantized trunk."""
    record, scales = load_calibration(calibration)
    opened = open_checkpoint(checkpoint)
    trunk = load_trunk(opened, describe_model(opened).num_positions)
    quantize_trunk(trunk, record.precision, linear_scales(scales, record.precision))
    return TorchSession(trunk)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_dithering_bounds_what_borders_do_and_no_more(
    made: Callable[[str], tuple[Path, Path]], checkpoint: Path, precision: str
) -> None:
    _, calibration = made(precision)
    model = describe_model(open_checkpoint(checkpoint))
    tolerance, text = (
        tolerance_for("float32", model.num_hidden_layers),
        np.random.default_rng(0).integers(0, model.vocab_size, 60),
    )
    reference, right = quantized(checkpoint, calibration), quantized(checkpoint, calibration)
    guide, guide_of_right = guide_inputs(reference.trunk), guide_inputs(right.trunk)
    assert guide is not None
    assert guide_of_right is not None
    perturbed = [
        DitheredSession(reference.trunk, guide, tolerance.relative, seed) for seed in (0, 1)
    ]
    # Another correct one, with errors of a tenth of the bound: about what float32 has.
    other = DitheredSession(right.trunk, guide_of_right, tolerance.relative / 10, 77)
    wrong = quantized(checkpoint, calibration)
    with torch.no_grad():
        wrong.trunk.get_submodule(LAYER).weight *= 2

    def compare(
        target: TorchSession,
        spreading: list[DitheredSession],
        graph_names: tuple[GraphName, ...] = GRAPH_NAMES,
    ) -> list[bool]:
        texts = [CachedText(session, text) for session in (reference, target, *spreading)]
        return [
            r.passed
            for r in compare_target(
                *texts[:2],
                model,
                (0, 11, 25),
                tolerance,
                0,
                perturbed=texts[2:],
                graph_names=graph_names,
            )
        ]

    assert all(compare(other, perturbed))
    assert not all(compare(other, []))  # without it a correct target would be refused
    assert sum(compare(wrong, perturbed)) < 18  # of 36
    assert all(compare(other, perturbed, ("quadratic",)))
    assert sum(compare(wrong, perturbed, ("quadratic",))) < 5  # of 9

    prompts = [TokenPrompt(text[:9].tolist(), ())]
    assert all(
        r.passed
        for r in compare_tokens(
            reference, other, model, prompts, 24, tolerance, perturbed=perturbed
        )
    )
    with torch.no_grad():
        wrong.trunk.diffusion_head.weight *= -1
    assert not any(
        r.passed
        for r in compare_tokens(
            reference, wrong, model, prompts, 24, tolerance, perturbed=perturbed
        )
        if r.against == "reference"
    )


def quantizer_of(precision: QuantizedPrecision, scale: float = 0.25) -> InputQuantizer:
    return InputQuantizer(
        precision,
        LayerScales(np.array(1, np.float32), np.array(scale, np.float32)),
        torch.device("cpu"),
    )


def test_the_distance_of_neighbouring_codes() -> None:
    values = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = np.diff(values)
    found = _spacing(torch.from_numpy(values[:-1]), "float8e4m3fn").numpy()
    np.testing.assert_array_equal(found, expected)
    assert _spacing(torch.tensor([-0.4, 100.0]), "int8").tolist() == [1, 1]
    assert _spacing(torch.tensor([-0.4, 1.9, 2.0, -3.9, 4.0, 6.0]), "float4e2m1").tolist() == [
        0.5,
        0.5,
        1,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_codes_that_the_bound_leaves_open(precision: QuantizedPrecision) -> None:
    quantizer, dtype = quantizer_of(precision), FORMATS[precision].dtype
    # between 2 and 3, between 16 and 18
    border, step = (2.5, 1.0) if precision == "int8" else (17.0, 2.0)
    steps = torch.tensor([border - 0.01, border - 0.01, border - 0.01, border + 0.01, border + 0.2])
    chosen = np.array(
        [
            border - step / 2,
            border + step / 2,
            border + 1.5 * step,
            border - step / 2,
            border - step / 2,
        ],
        np.float32,
    )
    codes = GraphCodes({"a": chosen[None]})
    assert codes.choose("a", dtype, steps[None], 0.05).tolist() == [chosen.tolist()]
    assert (codes.num_compared, codes.num_other, codes.refused) == (5, 4, {"a": 2})
    assert not codes.add_to(None).passed
    last = GraphCodes({"a": chosen[1:2, None]})  # of three rows the graph computed the last
    column = steps[:3, None].clone()
    column[2] = steps[1]
    assert last.choose("a", dtype, column, 0.05).tolist()[2] == [chosen[1]]
    assert (last.num_compared, last.refused) == (1, {})
    nan = GraphCodes({"a": np.full((1, 1), np.nan, np.float32)})
    nan.choose("a", dtype, torch.tensor([[1.0]]), 0.05)
    assert nan.refused == {"a": 1}
    nan.choose("b", dtype, torch.zeros(2, 3), 0.05)
    assert nan.refused == {"a": 1, "b": 6}
    x = torch.linspace(-600, 600, 999)[None] * 0.25  # cut at both ends
    guided = GuidedQuantizer("a", quantizer, Guide())
    torch.testing.assert_close(guided(x), quantizer(x), rtol=0, atol=0)

"""`trimode verify`: it passes on what the compiler makes, and it fails when something is wrong."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import SHAPES, config_of, write_checkpoint
from commands import trimode
from conftest import Built
from safetensors.torch import load_file, save_file

from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.cli.verify import run_verify
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.compiler.verify import run as library
from trimode.compiler.verify.graphs import compare_target
from trimode.compiler.verify.runners import CachedText
from trimode.compiler.verify.tokens import TokenPrompt, compare_tokens
from trimode.compiler.verify.tolerance import tolerance_for
from trimode.errors import BundleError, DependencyError, DeviceError, UsageError
from trimode.formats.files import sha256_of
from trimode.formats.verification import VERIFICATION, GraphParity, Verification, read_verifications
from trimode.graphs.checkpoint import describe_model, open_checkpoint
from trimode.runtime import TriModeModel
from trimode.runtime.bundle.open import open_bundle
from trimode.runtime.bundle.weights import WeightPack

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("demo") / "BUNDLE"
    build_bundle(DEMO, bundle)
    return bundle


@pytest.fixture
def copied(built: Callable[[str], Built], tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Checkpoint and bundle of a shape, the test's own."""

    def copy_of(name: str) -> tuple[Path, Path]:
        it = built(name)
        return shutil.copytree(it.checkpoint, tmp_path / "checkpoint"), shutil.copytree(
            it.bundle, tmp_path / "bundle"
        )

    return copy_of


def verify(bundle: Path, checkpoint: Path, **options: Any) -> Verification:
    passed = run_verify(bundle, checkpoint, threads=1, **{"max_new_tokens": 20, **options})
    found = read_verifications(bundle).verifications[-1]
    assert found.passed == passed
    return found


def failed(found: Verification) -> list[GraphParity]:
    return [record for record in found.graphs if not record.passed]


def record_again(bundle: Path, name: str) -> None:
    """Let the manifest say that a changed file is what was built."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = {
        "sha256": sha256_of(bundle / name),
        "num_bytes": (bundle / name).stat().st_size,
    }
    file.write_text(json.dumps(manifest))


def change_graph(bundle: Path, name: str, change: Callable[[onnx.GraphProto], None]) -> None:
    """Change the portable graph, and that of the target ``cpu``."""
    for file in (name, name.replace(".onnx", ".cpu.onnx")):
        model = onnx.load(bundle / file, load_external_data=False)
        change(model.graph)
        (bundle / file).write_bytes(model.SerializeToString())
        record_again(bundle, file)


@pytest.mark.parametrize("shape", SHAPES)
def test_passes_on_what_was_built(
    copied: Callable[[str], tuple[Path, Path]], capsys: pytest.CaptureFixture[str], shape: str
) -> None:
    checkpoint, bundle = copied(shape)
    found = verify(bundle, checkpoint)
    assert found.passed
    assert found.checkpoint.is_source
    assert found.notes == ()
    model = open_bundle(bundle).manifest.model  # verification.json is none of the manifest's files
    long = 2 * 64 + 32 if shape != "plain" else 992
    assert {(r.graph, r.positions) for r in found.graphs if r.subject == "target"} == {
        (graph_name, (p,)) for graph_name in ("ar", "draft", "verify") for p in (0, 11, long)
    }
    assert {r.rows for r in found.graphs} == {1, 7, 32}
    assert {r.use_drafter for r in found.graphs if r.graph == "draft"} == (
        {True, False} if model.has_drafter else {None}
    )
    assert {(r.mode, r.against) for r in found.tokens} == {
        ("ar", "reference"),
        ("diffusion", "reference"),
        ("linear_spec", "reference"),
        ("linear_spec", "ar"),
    }
    assert {r.num_tokens for r in found.tokens} == {20}
    assert any(ids.num_compared > 1 for r in found.graphs for ids in r.ids)
    shown = capsys.readouterr()
    assert "passed: " in shown.out
    assert "source" in shown.out
    assert "verification.json" in shown.err


def test_demo(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Add 478 and 356."}\n{"token_ids": [1, 10, 15, 20]}\n')
    found = verify(demo, DEMO, prompts_file=prompts, as_json=True, max_new_tokens=48)
    assert found.passed
    assert [json.loads(capsys.readouterr().out)] == json.loads((demo / VERIFICATION).read_text())[
        "verifications"
    ]
    assert {record.prompt for record in found.tokens} == {0, 1}


def test_notices_a_slightly_changed_weight(
    copied: Callable[[str], tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, bundle = copied("three_kv_heads")
    weights = load_file(checkpoint / "model.safetensors")
    weights["encoder.layers.1.mlp.up_proj.weight"][3] *= 1.02  # one row of 80, by 2%
    save_file(weights, checkpoint / "model.safetensors")
    found = verify(bundle, checkpoint)
    assert not found.passed
    assert not found.checkpoint.is_source
    assert {(record.graph, record.subject) for record in failed(found)} >= {
        (r, s) for r in ("ar", "verify") for s in ("target", "portable")
    }
    # a long path breaks the line
    assert "NOT the bundle's source" in " ".join(capsys.readouterr().out.split())


def test_the_same_weights_in_another_type_pass(copied: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, bundle = copied("three_kv_heads")
    weights = {
        name: tensor.float() for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    save_file(weights, checkpoint / "model.safetensors")
    found = verify(bundle, checkpoint)
    assert found.passed
    assert not found.checkpoint.is_source


def test_notices_a_graph_that_looks_ahead(copied: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, bundle = copied("three_kv_heads")

    def not_causal(graph: onnx.GraphProto) -> None:
        node = [node for node in graph.node if node.op_type == "Attention"][-1]
        (attribute,) = (a for a in node.attribute if a.name == "is_causal")
        attribute.i = 0

    change_graph(bundle, "verify.onnx", not_causal)
    found = verify(bundle, checkpoint)
    assert {record.graph for record in failed(found)} == {"verify"}
    assert {record.subject for record in failed(found)} == {"target", "portable"}
    assert all(
        record.passed for record in found.graphs if record.graph == "verify" and record.rows == 1
    )
    assert not all(record.passed for record in found.tokens)
    assert all(record.passed for record in found.tokens if record.mode == "ar")


@pytest.mark.parametrize("table", ["rope.cos", "rope.query_scale"])
def test_notices_a_wrong_rope_past_the_original_length(
    copied: Callable[[str], tuple[Path, Path]], table: str
) -> None:
    """Only the long positions show it."""
    checkpoint, bundle = copied("one_kv_head")
    entry = WeightPack(bundle / "weights.safetensors").entries[table]
    values = np.memmap(
        bundle / "weights.safetensors",
        np.float32,
        mode="r+",
        offset=entry.offset,
        shape=entry.shape,
    )
    values[64:] = 1.0
    values.flush()
    record_again(bundle, "weights.safetensors")
    found = verify(bundle, checkpoint)
    assert failed(found)
    assert {max(record.positions) for record in failed(found)} == {160}
    assert {record.graph for record in failed(found)} == {"ar", "draft", "verify"}


def test_notices_a_drafter_of_the_wrong_strength(
    copied: Callable[[str], tuple[Path, Path]],
) -> None:
    checkpoint, bundle = copied("three_kv_heads")
    file = checkpoint / "linear_spec_lora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 17}))  # instead of 16
    found = verify(bundle, checkpoint)
    assert {(record.graph, record.use_drafter) for record in failed(found)} == {("draft", True)}
    assert {record.subject for record in failed(found)} == {"target", "portable"}


def test_replaces_an_earlier_result_whole(
    copied: Callable[[str], tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, bundle = copied("plain")
    before = {path.name for path in bundle.iterdir()}
    (bundle / VERIFICATION).write_text("an earlier one")

    def no_replace(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", no_replace)
        with pytest.raises(BundleError, match="No space left"):
            verify(bundle, checkpoint, max_new_tokens=2)
    assert (bundle / VERIFICATION).read_text() == "an earlier one"
    assert {path.name for path in bundle.iterdir()} == {*before, VERIFICATION}
    assert verify(bundle, checkpoint, max_new_tokens=2).passed
    assert {path.name for path in bundle.iterdir()} == {*before, VERIFICATION}


def test_a_target_that_cannot_run_here_leaves_the_result_alone(
    copied: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, bundle = copied("plain")
    (bundle / VERIFICATION).write_text("an earlier one")

    def no_gpu(*args: Any, **kwargs: Any) -> TriModeModel:
        raise DeviceError(
            "expected a GPU of compute capability 8.9, found none", "run it where the GPU is"
        )

    monkeypatch.setattr(TriModeModel, "from_pretrained", no_gpu)
    with pytest.raises(DeviceError, match="nothing was verified: expected a GPU"):
        run_verify(bundle, checkpoint)
    assert (bundle / VERIFICATION).read_text() == "an earlier one"


def test_the_portable_graphs_do_not_stand_for_a_gpu(
    copied: Callable[[str], tuple[Path, Path]],
) -> None:
    checkpoint, bundle = copied("plain")
    (bundle / VERIFICATION).write_text("an earlier one")
    manifest = json.loads((bundle / "manifest.json").read_text())
    gpu = {
        "backend": "tensorrt_rtx",
        "device": "cuda",
        "compute_capability": "8.9",
        "compute_dtype": "float16",
        "placement": "shared",
        "capacity": 1088,
        "library": "tensorrt_rtx 0",
    }
    targets = manifest["precisions"]["fp32"]["targets"]
    manifest["precisions"]["fp32"]["targets"] = {"rtx-4090": {**targets["cpu"], **gpu}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    for target in (None, "auto", "rtx-4090"):
        with pytest.raises(
            (DeviceError, BundleError, DependencyError), match="nothing was verified"
        ):
            run_verify(bundle, checkpoint, target=target)
    assert (bundle / VERIFICATION).read_text() == "an earlier one"
    found = verify(bundle, checkpoint, target="portable", max_new_tokens=2)
    assert (found.passed, found.target, found.compute_dtype) == (True, "portable", "float32")
    assert "rtx-4090" in found.notes[0]


def test_the_library_names_parameters_and_the_command_its_flags(
    copied: Callable[[str], tuple[Path, Path]],
) -> None:
    checkpoint, bundle = copied("plain")
    model = TriModeModel.from_pretrained(bundle, num_threads=1)
    for name, value in (("long", 993), ("max_new_tokens", 0), ("seed", -1)):
        options: dict[str, Any] = {name: value}
        with pytest.raises(UsageError, match=f"expected `{name}`"):
            library.verify(model, open_checkpoint(checkpoint), **options)
        flag = "--" + name.replace("_", "-")
        with pytest.raises(UsageError, match=f"expected {flag}"):
            run_verify(bundle, checkpoint, **options)


def test_refuses_wrong_usage(copied: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, bundle = copied("plain")
    other = write_checkpoint(tmp_path / "other", config_of())
    wrong: list[tuple[str, Path, dict[str, Any]]] = [
        ("toaster", checkpoint, {"target": "toaster"}),
        ("vocab_size 301, found 109", other, {}),
        ("--long from 1 to 992", checkpoint, {"long": 993}),
        ("--max-new-tokens", checkpoint, {"max_new_tokens": 0}),
        ("--seed", checkpoint, {"seed": -1}),
        ("nowhere.jsonl", checkpoint, {"prompts_file": tmp_path / "nowhere.jsonl"}),
    ]
    for message, folder, options in wrong:
        with pytest.raises(UsageError, match=message):
            run_verify(bundle, folder, **options)
    assert not (bundle / VERIFICATION).exists()


def test_long_and_seed(copied: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, bundle = copied("three_kv_heads")
    found = verify(bundle, checkpoint, long=20, seed=3, max_new_tokens=4)
    assert found.passed
    assert max(max(record.positions) for record in found.graphs) == 20
    assert "--long 64" in found.notes[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_narrow_weights(
    built: Callable[[str], Built],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    precision: str,
) -> None:
    """The checkpoint is bfloat16 and its adapter float32: rounding changes the adapter, and in fp16
    some of the weights. The CPU then computes in float32, so the bounds are as tight as ever.
    """
    options = BuildOptions(precision=precision, cache=tmp_path_factory.getbasetemp() / "traced")
    checkpoint = shutil.copytree(built("three_kv_heads").checkpoint, tmp_path / "checkpoint")
    build_bundle(checkpoint, tmp_path / "bundle", options)
    found = verify(tmp_path / "bundle", checkpoint)
    assert found.passed
    assert found.bounds["target"].dtype == "float32"
    assert found.weight_dtype == {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert found.weight_dtype in found.notes[0]
    weights = load_file(checkpoint / "model.safetensors")
    weights["encoder.layers.1.mlp.up_proj.weight"][3] *= 1.02
    save_file(weights, checkpoint / "model.safetensors")
    assert not verify(tmp_path / "bundle", checkpoint, max_new_tokens=2).passed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_targets_may_part_at_near_ties_only(tmp_path: Path, dtype: Any) -> None:
    """Torch itself in 16 bits stands for a target."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config_of(), rank=4, seed=5))
    model = describe_model(checkpoint, None)
    trunk = load_trunk(checkpoint, model.num_positions)
    reference, target = (
        TorchSession(trunk),
        TorchSession(copy.deepcopy(trunk).to(getattr(torch, dtype))),
    )
    tolerance = tolerance_for(dtype, model.num_hidden_layers)
    rng = np.random.default_rng(0)
    prompts = [
        TokenPrompt(rng.integers(12, model.vocab_size, n).tolist(), ()) for n in (5, 20, 40, 90)
    ]
    records = list(compare_tokens(reference, target, model, prompts, 64, tolerance))
    assert all(record.passed for record in records)
    parted = [record for record in records if record.first_divergence is not None]
    assert {record.mode for record in parted} == (
        {"ar", "diffusion", "linear_spec"}
        if dtype == "bfloat16"
        else {record.mode for record in parted}
    )
    assert all(
        record.preference is not None
        and record.tolerance is not None
        and record.preference <= record.tolerance
        for record in parted
    )
    text = rng.integers(0, model.vocab_size, 200)
    graphs = list(
        compare_target(
            CachedText(reference, text), CachedText(target, text), model, (0, 11, 150), tolerance, 0
        )
    )
    assert all(record.passed for record in graphs)
    # The bounds of float32 refuse the same target.
    strict = tolerance_for("float32", model.num_hidden_layers)
    assert not all(
        record.passed
        for record in compare_target(
            CachedText(reference, text), CachedText(target, text), model, (11,), strict, 0
        )
    )
    if parted:
        assert not all(
            record.passed
            for record in compare_tokens(reference, target, model, prompts, 64, strict)
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_bounds_refuse_another_model(tmp_path: Path, dtype: Any) -> None:
    first, second = (
        open_checkpoint(write_checkpoint(tmp_path / str(seed), config_of(), rank=4, seed=seed))
        for seed in (5, 6)
    )
    model = describe_model(first, None)
    reference, target = (
        TorchSession(load_trunk(checkpoint, model.num_positions)) for checkpoint in (first, second)
    )
    tolerance = tolerance_for(dtype, model.num_hidden_layers)
    prompts = [TokenPrompt([20, 30, 40], ())]
    records = list(compare_tokens(reference, target, model, prompts, 32, tolerance))
    assert not any(record.passed for record in records if record.against == "reference")
    text = np.random.default_rng(0).integers(0, model.vocab_size, 60)
    graphs = list(
        compare_target(
            CachedText(reference, text), CachedText(target, text), model, (11,), tolerance, 0
        )
    )
    assert not any(record.passed for record in graphs if record.graph != "draft")


def test_nan_is_a_failure_and_valid_json(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config_of()))
    model = describe_model(checkpoint, None)
    reference, target = (
        TorchSession(load_trunk(checkpoint, model.num_positions)) for _ in range(2)
    )
    with torch.no_grad():
        target.trunk.diffusion_head.weight[7] = torch.nan
    text = np.random.default_rng(0).integers(0, model.vocab_size, 60)
    for record in compare_target(
        CachedText(reference, text),
        CachedText(target, text),
        model,
        (3,),
        tolerance_for("bfloat16", 2),
        0,
    ):
        assert not record.passed
        assert "NaN" not in record.model_dump_json()
        assert GraphParity.model_validate_json(record.model_dump_json()) == record


def test_a_bundle_that_computes_nan_fails_by_the_names_of_its_graphs(
    copied: Callable[[str], tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, bundle = copied("three_kv_heads")
    pack = bundle / "weights.safetensors"
    weights = load_file(pack)
    weights["encoder.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file_as_before(pack, weights)
    found = verify(bundle, checkpoint, max_new_tokens=4)
    assert not found.passed
    assert {(record.graph, record.subject) for record in failed(found)} == {
        (graph, subject)
        for graph in ("ar", "draft", "verify")
        for subject in ("target", "portable")
    }
    assert not any(record.passed for record in found.tokens)
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.rstrip().endswith("FAILED")]
    outputs = [output for record in failed(found) for output in record.outputs]
    assert len(lines) == sum(not output.passed for output in outputs) + len(found.tokens)
    assert all("no number" in line for line in lines)
    assert any("NaN or infinity" in line for line in printed)
    assert "NaN" not in (bundle / VERIFICATION).read_text()


def save_file_as_before(pack: Path, weights: dict[str, torch.Tensor]) -> None:
    """Overwrite the data of a pack in place: graphs name its offsets."""
    raw = bytearray(pack.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for name, tensor in weights.items():
        begin, end = (start + at for at in header[name]["data_offsets"])
        raw[begin:end] = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    pack.write_bytes(raw)
    record_again(pack.parent, pack.name)


def test_a_reference_or_a_spread_that_is_no_number_passes_nothing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config_of()))
    model = describe_model(checkpoint, None)
    good, also_good, bad = (
        TorchSession(load_trunk(checkpoint, model.num_positions)) for _ in range(3)
    )
    with torch.no_grad():
        bad.trunk.diffusion_head.weight[7] = torch.nan
    text, tolerance = (
        np.random.default_rng(0).integers(0, model.vocab_size, 60),
        tolerance_for("bfloat16", 2),
    )
    assert np.isnan(tolerance.probabilities(float("nan")))

    def graphs(
        reference: TorchSession, target: TorchSession, perturbed: tuple[TorchSession, ...]
    ) -> list[GraphParity]:
        read, other, *more = (
            CachedText(session, text) for session in (reference, target, *perturbed)
        )
        return list(compare_target(read, other, model, (3,), tolerance, 0, perturbed=more))

    assert all(record.passed for record in graphs(good, also_good, (also_good,)))
    for reference, target, perturbed in (
        (bad, bad, ()),
        (bad, good, ()),
        (good, also_good, (bad,)),
        (good, also_good, (also_good, bad)),
    ):
        records = graphs(reference, target, perturbed)
        assert not any(record.passed for record in records)
        assert all(
            GraphParity.model_validate_json(record.model_dump_json()) == record
            for record in records
        )
    prompts = [TokenPrompt([20, 30, 40], ())]
    for reference, target in ((bad, bad), (bad, good), (good, bad)):
        tokens = list(compare_tokens(reference, target, model, prompts, 8, tolerance))
        assert not any(record.passed for record in tokens if record.against == "reference")
        assert all(record.passed for record in tokens if record.against == "ar") == (target is good)


def test_command_line(copied: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, bundle = copied("plain")
    command = ("verify", bundle, "--against", checkpoint)
    done = trimode(*command, "--json", "--max-new-tokens", 4, "--long", 40, "--seed", 2)
    assert done.returncode == 0, done.stderr
    assert Verification.model_validate_json(done.stdout).passed
    weights = load_file(checkpoint / "model.safetensors")
    weights["diffusion_head.weight"][5] *= 1.02
    save_file(weights, checkpoint / "model.safetensors")
    done = trimode(*command, "--max-new-tokens", 4, "--long", 40)
    assert (done.returncode, "FAILED: " in done.stdout) == (1, True)
    done = trimode(*command, "--target", "toaster")
    assert (done.returncode, done.stdout) == (2, "")
    assert "toaster" in done.stderr


def test_the_page_is_true_about_polygraphy(demo: Path) -> None:
    page = (DEMO.parents[1] / "docs" / "reference" / "verify.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("polygraphy run ")]
    assert len(commands) == 3
    for command in commands:
        program = [
            sys.executable,
            "-c",
            "from polygraphy.tools import main; main()",
            *shlex.split(command)[1:],
        ]
        done = subprocess.run(program, cwd=demo.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PASSED" in done.stdout
        assert "shape=(1, 32" in done.stdout


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_itself_stays_below_a_third_of_the_bounds(dtype: Any) -> None:
    checkpoint = open_checkpoint(DEMO)
    trunk = load_trunk(checkpoint, 400)
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (1, 400))
    exact, found = (
        TorchSession(copy.deepcopy(trunk).to(t)) for t in (torch.float64, getattr(torch, dtype))
    )
    expected, logits = (
        session.run("verify", session.new_cache(), ids, 0)[2].astype(np.float64)
        for session in (exact, found)
    )
    error, scale = np.abs(logits - expected), np.abs(expected).max()
    tolerance = tolerance_for(dtype, checkpoint.config.num_hidden_layers)
    assert error.max() < tolerance.relative * scale / 3
    assert error.mean() < tolerance.relative_mean * scale / 3


def test_tolerances() -> None:
    single, half, brain = (tolerance_for(dtype, 6) for dtype in ("float32", "float16", "bfloat16"))
    assert single.relative < half.relative < brain.relative
    assert half.relative * 8 == pytest.approx(brain.relative)
    assert (single.must_equal, half.must_equal, brain.must_equal) == (True, False, False)
    assert brain.probabilities(1e6) == 1.0


def test_the_quadratic_graph_is_compared_too(
    quadratic: Callable[[str], Built], tmp_path: Path
) -> None:
    it = quadratic("three_kv_heads")
    bundle = shutil.copytree(it.bundle, tmp_path / "bundle")
    found = verify(bundle, it.checkpoint)
    assert found.passed
    records = [record for record in found.graphs if record.graph == "quadratic"]
    assert {(r.subject, r.positions, r.rows) for r in records} == {
        *(("target", (p,), rows) for p in (0, 11, 160) for rows in (1, 7, 32)),
        ("portable", (80, 160), 7),
    }
    assert all(
        [ids.name for ids in r.ids] == ["top_ids", "greedy_ids"] and r.has_accepted_length
        for r in records
    )
    assert any(output.name.startswith("present.") for output in records[-1].outputs)
    assert {r.against for r in found.tokens if r.mode == "quadratic_spec"} == {"reference", "ar"}


def test_notices_masked_slots_that_see_those_of_others(
    quadratic: Callable[[str], Built], tmp_path: Path
) -> None:
    it = quadratic("three_kv_heads")
    bundle = shutil.copytree(it.bundle, tmp_path / "bundle")

    def sees_more(graph: onnx.GraphProto) -> None:
        # the end of a slot's own row
        (end,) = (node for node in graph.node if node.op_type == "Less")
        end.op_type = "LessOrEqual"  # one slot more, which is another's

    change_graph(bundle, "quadratic.onnx", sees_more)
    found = verify(bundle, it.checkpoint)
    assert {(record.graph, record.subject) for record in failed(found)} == {
        ("quadratic", "target"),
        ("quadratic", "portable"),
    }
    wrong = {
        output.name for record in failed(found) for output in record.outputs if not output.passed
    }
    assert "top_probabilities" in wrong
    assert "logits" not in wrong  # the tokens' own rows see what they should
    assert all(record.passed for record in found.tokens if record.mode != "quadratic_spec")

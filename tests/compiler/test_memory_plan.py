"""What a GPU will hold: predicted before a build, and counted in what was built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import config_of, write_checkpoint
from once import made_once
from safetensors import safe_open
from typer.testing import CliRunner

from trimode.cli.main import app
from trimode.compiler.memory.assumed import plan_uncalibrated
from trimode.compiler.memory.predict import TargetMemory, largest, predict_memory
from trimode.compiler.memory.shallow import keep_layers, write_empty_pack
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.compiler.plan import make_plan
from trimode.compiler.stages.pack import lay_out_pack
from trimode.compiler.store.cache import ContentCache
from trimode.errors import UsageError
from trimode.graphs.checkpoint import open_checkpoint
from trimode.runtime.bundle.open import open_bundle

OPTIONS = BuildOptions(targets=("rtx-4090",), precision="bf16", max_length=900, block_lengths=(8,))
NUM_LAYERS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "six"
    return write_checkpoint(folder, config_of(num_hidden_layers=NUM_LAYERS), rank=2)


@pytest.fixture(scope="module")
def predicted(checkpoint: Path, run_cache: ContentCache) -> TargetMemory:
    # an architecture has no memory of its own: two engines in place of four are compiled
    options = replace(OPTIONS, targets=("sm89",))
    (found,) = predict_memory(open_checkpoint(checkpoint), options, run_cache)
    return found


@pytest.fixture(scope="module")
def bundle(run_folder: Path) -> Path:
    def make(folder: Path) -> None:
        config = config_of(num_hidden_layers=NUM_LAYERS)
        checkpoint = write_checkpoint(folder / "checkpoint", config, rank=2)
        build_bundle(checkpoint, folder / "bundle", OPTIONS)

    return made_once(run_folder / "memory_plan", make) / "bundle"


def test_engines_of_all_layers_are_as_those_of_two_and_three_say(
    predicted: TargetMemory, bundle: Path
) -> None:
    opened = open_bundle(bundle)
    sizes = [
        record.num_bytes
        for name, record in opened.manifest.files.items()
        if name.endswith(".engine")
    ]
    assert predicted.use.engines == pytest.approx(sum(sizes), rel=0.05)
    engines = opened.chosen.targets["rtx-4090"].graphs.values()
    scratch = sum(max(plan.scratch for plan in engine.plans) for engine in engines)
    assert predicted.use.scratch == pytest.approx(scratch, rel=0.05)


def test_weights_and_cache_are_exact(predicted: TargetMemory, bundle: Path) -> None:
    opened = open_bundle(bundle)
    model = opened.manifest.model
    assert predicted.use.weights == opened.chosen.weight_bytes
    slot = 2 * 2 * NUM_LAYERS * model.num_key_value_heads * model.head_dim
    assert predicted.cache_bytes_per_token == slot
    cache = slot * (opened.chosen.targets["rtx-4090"].capacity or 0)
    assert cache <= predicted.use.cache <= 1.01 * cache  # each tensor begins at 256 bytes


def test_a_forward_moves_what_the_plan_of_the_whole_engine_says(
    predicted: TargetMemory, bundle: Path
) -> None:
    engines = open_bundle(bundle).chosen.targets["rtx-4090"].graphs
    moved = {(name, plan.rows): plan.moved for name, one in engines.items() for plan in one.plans}
    found = {(cost.graph, cost.tokens): cost.moved for cost in predicted.forwards}
    assert found == pytest.approx(moved, rel=0.05)
    assert all(cost.predicted_ms is None for cost in predicted.forwards)  # of no known GPU


def test_the_largest_that_fits() -> None:
    found = [largest(lambda n, top=top: n * n <= top, 20) for top in (-1, 0, 1, 99, 100, 10**6)]
    assert found == [0, 0, 1, 9, 10, 20]


def test_a_pack_of_zeros_has_scales_of_one_and_draws_what_it_is_told(
    checkpoint: Path, tmp_path: Path
) -> None:
    opened = open_checkpoint(checkpoint)
    plan = keep_layers(plan_uncalibrated(opened, replace(OPTIONS, precision="fp8")), 2)
    layout = lay_out_pack(plan, plan.checkpoint.read)
    drawn = "encoder.layers.1.mlp.up_proj.weight"
    write_empty_pack(layout, tmp_path / "pack", {drawn})
    assert (tmp_path / "pack").stat().st_size == layout.num_bytes
    with safe_open(tmp_path / "pack", "np") as pack:
        names = set(pack.keys())
        assert not any(name.startswith("encoder.layers.2") for name in names)
        raw = np.fromfile(tmp_path / "pack", np.uint8)
        for name, tensor in layout.tensors.items():
            data = raw[tensor.offset : tensor.offset + tensor.num_bytes]
            if name.endswith("t_scale"):
                assert set(data.view(np.uint16)) == {0x3F80}, name  # 1 in bfloat16
            else:
                assert data.any() == (name == drawn), name


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4", "nvfp4"])
def test_without_a_calibration_all_linear_layers_but_the_head_are_taken(
    checkpoint: Path, precision: str
) -> None:
    options = replace(OPTIONS, targets=("rtx-5090",), precision=precision)
    plan = plan_uncalibrated(open_checkpoint(checkpoint), options)
    assert plan.precision == precision
    assert plan.options.precision == precision
    assert plan.quantization is not None
    assert len(plan.quantization.layers) == 7 * NUM_LAYERS
    assert "diffusion_head" not in plan.quantization.layers


def test_a_build_that_no_gpu_memory_holds_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path
) -> None:
    opened = open_checkpoint(checkpoint)
    plan = make_plan(opened, OPTIONS)
    weights = sum(t.num_bytes for t in lay_out_pack(plan, opened.read).tensors.values())
    for memory, hint in ((weights / 2, "`precision` int4"), (weights * 3, "`max_length` below")):
        options = replace(OPTIONS, gpu_memory_gb=memory / 1e9)
        with pytest.raises(UsageError, match=r"rtx-4090: expected at most .* GB") as error:
            build_bundle(checkpoint, tmp_path / "bundle", options)
        assert error.value.hint is not None
        assert hint in error.value.hint
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "h100"], "compiled without its GPU"),
        (["--target", "cpu"], "compiled without its GPU"),
        (["--target", "rtx-4090", "--gpu-memory", "0"], "--gpu-memory` above 0"),
        (["--target", "rtx-4090", "--gpu-memory", "nan"], "--gpu-memory` above 0"),
        (["--target", "t4", "--precision", "fp8"], "precision it can run"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    checkpoint: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["plan", str(checkpoint), *arguments])
    assert isinstance(result.exception, UsageError)
    assert message.replace("`", "") in result.exception.message.replace("`", "")


def test_the_table_and_its_json_say_the_same(
    checkpoint: Path, predicted: TargetMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = replace(predicted, memory_bytes=24 * 10**9, longest_text=77777, largest_batch=55)
    monkeypatch.setattr("trimode.compiler.memory.predict.predict_memory", lambda *_: [known])
    result = CliRunner().invoke(app, ["plan", str(checkpoint), "--target", "rtx-4090", "--json"])
    (data,) = json.loads(result.stdout)
    assert data["fits"] is True
    assert data["use"]["total"] == predicted.use.total
    table = CliRunner().invoke(app, ["plan", str(checkpoint), "--target", "rtx-4090"]).stdout
    assert f"{predicted.use.total / 1e9:.2f}" in table
    assert " 77777 " in table

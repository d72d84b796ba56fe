"""The calibration job, against hooks and arithmetic of the tests' own."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoints import SHAPES, config_of, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from whole_trunk import BranchOutside, quantize_whole_trunk, record, replay

from trimode.calib.data.draw import draw_texts
from trimode.calib.data.prompts import Prompts
from trimode.calib.demo.tasks import examples
from trimode.calib.reference import mapped as mapped_trunk
from trimode.calib.reference.episodes import Episode
from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.calib.scales import job
from trimode.calib.scales.layer_replay import DecoderPart
from trimode.calib.scales.layers import quantized_layers
from trimode.calib.scales.modelopt import extract_scales, load_modelopt, run_modelopt
from trimode.calib.scales.modelopt_inputs import weighted_rows
from trimode.calib.scales.settings import QuantizeSettings
from trimode.calib.scales.statistics import quantize_weight
from trimode.calib.scales.work_folder import WorkFolder
from trimode.cli.calibrate.scales import run_calibrate
from trimode.errors import (
    BuildError,
    CheckpointError,
    DependencyError,
    DeviceError,
    TrimodeError,
    UsageError,
)
from trimode.formats.calibration import Calibration, Scales, load_calibration
from trimode.formats.contract import Mode, ModelInfo
from trimode.graphs.checkpoint import describe_model, open_checkpoint
from trimode.graphs.decoder.attention import GrowingCacheAttention
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.graphs.identity import SourceDigest
from trimode.progress import Progress
from trimode.runtime.decode.algorithms import ALGORITHMS, Counters
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence
from trimode.runtime.text.prompts import USUAL_STYLE

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"
PRECISIONS: tuple[Any, ...] = ("fp8", "int8", "int4")
FP8 = QuantizeSettings("fp8", max_new_tokens=12)


class Silent:
    def stage(self, name: str, total: int) -> Callable[[int], None]:
        return lambda _: None


class Interrupted(Silent):
    def stage(self, name: str, total: int) -> Callable[[int], None]:
        if name == "calibrate":
            raise KeyboardInterrupt
        return super().stage(name, total)


class Calibrated(NamedTuple):
    """A trunk as ModelOpt leaves it, what it was run on, and the scales."""

    trunk: TriModeTrunk
    linears: dict[str, nn.Linear]
    episodes: list[Episode]
    scales: Scales


def write(folder: Path, shape: str = "three_kv_heads") -> Path:
    changes, dtype, rank, shards = SHAPES[shape]
    return write_checkpoint(
        folder, config_of(**changes, block_size=8), dtype=dtype, rank=rank, shards=shards
    )


def random_texts(model: ModelInfo, count: int = 3) -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(12, model.vocab_size, 5 + 20 * i).tolist() for i in range(count)]


def run(
    folder: Path,
    output: Path,
    settings: QuantizeSettings = FP8,
    progress: Progress | None = None,
    *,
    resume: bool = False,
) -> tuple[Calibration, Scales]:
    checkpoint = open_checkpoint(folder)
    model = describe_model(checkpoint)
    job.ScalesJob(
        checkpoint,
        model,
        Prompts(random_texts(model), "0" * 64),
        output,
        settings,
        progress or Silent(),
        resume=resume,
    ).run()
    return load_calibration(output)


def change_weight(folder: Path, name: str, change: Callable[[Tensor], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


def largest_inputs(trunk: TriModeTrunk, forward: Callable[[], None]) -> dict[str, float]:
    """Largest magnitude of each linear layer's input while ``forward`` runs."""
    found: dict[str, float] = {}

    def observe(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    handles = [
        m.register_forward_pre_hook(observe(n))
        for n, m in trunk.named_modules()
        if isinstance(m, nn.Linear)
    ]
    forward()
    for handle in handles:
        handle.remove()
    return found


def assert_same_codes(ours: Any, theirs: Any, exact: Any) -> None:
    """The same codes, unless a value lies in the middle between two: then both are right.

    What a code stands for may differ in its last bits, ModelOpt dividing by 448 / amax where the
    format multiplies with amax / 448. Neighbours are 6% (fp8) or a step (integers) apart. Middles
    are frequent: weights of a checkpoint are bfloat16, and so is their amax.
    """
    differ = ~np.isclose(ours, theirs, rtol=4e-7, atol=0)
    middle = (ours.astype(np.float64) + theirs) / 2
    assert np.allclose(exact[differ], middle[differ], rtol=1e-6, atol=0)
    assert differ.mean() < 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> Callable[[Any], Calibrated]:
    done: dict[str, Calibrated] = {}

    def calibrate(precision: Any) -> Calibrated:
        if precision not in done:
            checkpoint = open_checkpoint(folder)
            model, settings = describe_model(checkpoint), replace(FP8, precision=precision)
            trunk = load_trunk(checkpoint, model.num_positions)
            episodes = record(trunk, model, random_texts(model), settings)
            linears = quantize_whole_trunk(trunk, episodes, settings)
            done[precision] = Calibrated(
                trunk, linears, episodes, extract_scales(linears, precision)
            )
        return done[precision]

    return calibrate


@pytest.mark.parametrize("shape", SHAPES)
def test_input_amax_is_the_largest_input_of_all_forwards(tmp_path: Path, shape: str) -> None:
    folder = write(tmp_path / "checkpoint", shape)
    calibration, scales = run(folder, tmp_path / "out")
    checkpoint = open_checkpoint(folder)
    model = describe_model(checkpoint)
    trunk = load_trunk(checkpoint, model.num_positions)  # LowRankLinear in place, no ModelOpt
    episodes = record(trunk, model, random_texts(model), FP8)
    expected = largest_inputs(trunk, lambda: replay(trunk, episodes))
    assert len(calibration.layers) == 7 * checkpoint.config.num_hidden_layers
    for name, layer in calibration.layers.items():
        # The same forwards over the same weights: the same bits.
        assert (
            scales[f"{name}.input_amax"]
            == np.float32(expected[name])
            == np.float32(max(layer.input_amax.values()))
        )
        assert set(layer.input_amax) == {"ar", "draft", "verify"}
        assert scales[f"{name}.weight_amax"].shape == ()


def test_the_replay_shows_what_the_decoders_run(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    model = describe_model(checkpoint)
    trunk = load_trunk(checkpoint, model.num_positions)
    modes: dict[Mode, float] = {"ar": 0.0, "linear_spec": 0.0, "diffusion": 0.9}

    def decode() -> None:
        for text, (mode, threshold) in itertools.product(random_texts(model), modes.items()):
            sequence = Sequence(TorchSession(trunk), model, text)
            for _ in ALGORITHMS[mode](
                sequence, DecodeOptions(12, model.block_size, threshold), Counters()
            ):
                pass

    seen = largest_inputs(trunk, decode)
    episodes = record(trunk, model, random_texts(model), FP8)
    replayed = largest_inputs(trunk, lambda: replay(trunk, episodes, needs_head=True))
    # Decode steps of one row became one product of many rows, which sums in another order. A
    # diffusion block that is cut at the limit is committed whole, and the rows after the cut are
    # not replayed: nothing ever reads what they compute.
    assert replayed.keys() == seen.keys()
    for name in seen:
        assert replayed[name] <= seen[name] * (1 + 1e-5)
        assert replayed[name] >= seen[name] * 0.9


def test_ar_alone_sees_less_than_all_modes(folder: Path, tmp_path: Path) -> None:
    alone, joint = (
        run(folder, tmp_path / "ar", replace(FP8, modes=("ar",))),
        run(folder, tmp_path / "all"),
    )
    grows = [joint[1][name] > alone[1][name] for name in joint[1] if name.endswith("input_amax")]
    assert all(joint[1][name] >= alone[1][name] for name in joint[1])
    assert any(grows)
    assert joint[0].data is not None
    assert alone[0].data is not None
    assert set(alone[0].data.num_tokens) == {"ar"}
    assert all(set(layer.input_amax) == {"ar"} for layer in alone[0].layers.values())
    # Every draft and verify forward of the decoders is a block of the model's length.
    block = open_checkpoint(folder).config.block_size
    assert all(
        joint[0].data.num_tokens[graph_name] % block == 0 for graph_name in ("draft", "verify")
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_quantized_as_the_format_says(
    folder: Path, calibrated: Callable[[Any], Calibrated], precision: Any
) -> None:
    found = calibrated(precision)
    weights = load_trunk(open_checkpoint(folder), 8).state_dict()
    for name, linear in found.linears.items():
        layer: Any = linear
        weight, amax = weights[f"{name}.weight"].numpy(), found.scales[f"{name}.weight_amax"]
        factor = found.scales.get(f"{name}.pre_quant_scale", np.ones(weight.shape[1], np.float32))
        theirs = layer.weight_quantizer(layer.weight).numpy()
        scaled = weight / factor
        ours = quantize_weight(scaled, amax, precision)
        assert_same_codes(ours, theirs, scaled)
        largest = (
            np.abs(scaled).reshape(*amax.shape, -1).max(-1) if amax.ndim else np.abs(scaled).max()
        )
        np.testing.assert_allclose(amax, largest, rtol=2e-7)
        if precision == "fp8":
            assert amax == largest


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_quantized_trunk_computes_what_the_format_says(
    calibrated: Callable[[Any], Calibrated], precision: Any
) -> None:
    found = calibrated(precision)
    calls: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        linear.register_forward_hook(
            lambda _m, inputs, output, name=name: calls.append((name, inputs[0], output))
        )
        for name, linear in found.linears.items()
    ]
    replay(found.trunk, found.episodes[:1])
    for handle in handles:
        handle.remove()
    assert {name for name, _, _ in calls} == set(found.linears)
    for name, x, y in calls:
        layer: Any = found.linears[name]
        factor = found.scales.get(f"{name}.pre_quant_scale", np.float32(1))
        data = x.numpy() * factor
        if precision != "int4":
            data = quantize_weight(data, found.scales[f"{name}.input_amax"], precision)
        # of which the test before says that they are right
        expected = data @ layer.weight_quantizer(layer.weight).numpy().T
        # An input near the middle between two codes may fall to either side, as weights do, and
        # changes its row of the outputs. All else is the order of a sum in float32.
        error = np.abs(y.numpy() - expected).max(-1)
        assert (error > 1e-5 * np.abs(expected).max()).mean() < 0.1, name


def test_the_drafter_branch_stays_in_high_precision(
    calibrated: Callable[[Any], Calibrated],
) -> None:
    found = calibrated("int8")
    seen = 0
    for layer in (m for m in found.trunk.modules() if isinstance(m, BranchOutside)):
        assert layer.lora_A is not None
        assert layer.lora_B is not None
        x = torch.randn(5, layer.base.in_features)
        branch = functional.linear(
            functional.linear(x, layer.lora_A.weight) * layer.scaling, layer.lora_B.weight
        )
        torch.testing.assert_close(layer(x, 1.0), layer.base(x) + branch)
        assert torch.equal(layer(x), layer.base(x))
        assert not torch.allclose(
            layer.base(x),
            functional.linear(x * layer.base.input_quantizer.pre_quant_scale, layer.base.weight),
            atol=1e-6,
        )
        seen += 1
    assert seen == 2


VARIANTS = [
    *(replace(FP8, precision=precision) for precision in PRECISIONS),
    replace(FP8, is_per_channel=True, quantizes_head=True),
    replace(FP8, precision="int4", quantizes_head=True),
]


@pytest.mark.parametrize("settings", VARIANTS, ids=[*PRECISIONS, "fp8-head", "int4-head"])
@pytest.mark.parametrize("shape", ["three_kv_heads", "plain"])
def test_layer_by_layer_gives_the_scales_of_the_whole_trunk(
    tmp_path: Path, shape: str, settings: QuantizeSettings
) -> None:
    """ModelOpt over the whole trunk, all forwards as they were recorded, against statistics and
    batches of one layer at a time.
    """
    folder = write(tmp_path / "checkpoint", shape)
    _, scales = run(folder, tmp_path / "out", settings)
    checkpoint = open_checkpoint(folder)
    model = describe_model(checkpoint)
    trunk = load_trunk(checkpoint, model.num_positions)
    episodes = record(trunk, model, random_texts(model), settings)
    expected = extract_scales(quantize_whole_trunk(trunk, episodes, settings), settings.precision)
    assert scales.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(scales[name], expected[name], name)


def test_rows_are_weighted_so_that_forwards_count_alike() -> None:
    generator = torch.Generator().manual_seed(1)
    forwards = [
        torch.randn(rows, 24, generator=generator, dtype=torch.float64)
        for rows in (1, 17, 0, 5, 512)
    ]
    weight = torch.randn(24, 10, generator=generator, dtype=torch.float64)
    expected = sum(float((x @ weight).square().mean()) for x in forwards if x.shape[0])
    assert float((weighted_rows(forwards) @ weight).square().mean()) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_mapped_weights_decode_and_calibrate_to_the_same_bytes(tmp_path: Path, shape: str) -> None:
    folder = write(tmp_path / "checkpoint", shape)
    for name, memory in (("resident", 1.0), ("mapped", 0.0)):
        run(folder, tmp_path / name, replace(FP8, memory_gib=memory))
    for file in ("calibration.json", "scales.safetensors"):
        assert (tmp_path / "resident" / file).read_bytes() == (
            tmp_path / "mapped" / file
        ).read_bytes()


def test_a_mapped_trunk_computes_what_the_float32_trunk_computes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_trunk, "WIDENED_BYTES", 48 * 4 * 7)  # no weight has rows in sevens
    checkpoint = open_checkpoint(folder)
    ids, positions = torch.arange(20, 50)[None], torch.arange(30)[None]
    loaded, mapped = (
        load_trunk(checkpoint, 64),
        mapped_trunk.open_trunk(checkpoint, 64, memory_bytes=0),
    )
    expected, found = (
        trunk.head(trunk(ids, positions, GrowingCacheAttention(), 0.7))
        for trunk in (loaded, mapped)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    held = sum(parameter.numel() for parameter in mapped.parameters())
    assert held == 48 * (2 * checkpoint.config.num_hidden_layers + 1)  # the norms


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_part_is_in_memory_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    loaded: list[weakref.ref[Any]] = []
    original = DecoderPart.__init__

    def watched(self: DecoderPart, *args: Any) -> None:
        assert not any(weight() is not None for weight in loaded)
        original(self, *args)
        loaded.extend(weakref.ref(linear.weight) for linear in self.linears.values())

    monkeypatch.setattr(DecoderPart, "__init__", watched)
    gc.disable()  # it would hide by chance what is never let go
    try:
        run(folder, tmp_path / "out", replace(FP8, precision=precision))
    finally:
        gc.enable()
    assert len(loaded) == 14


class Stopped(Silent):
    """Interrupts a run behind some steps of a stage."""

    def __init__(self, stage: str, steps: int) -> None:
        self._stage, self._left = stage, steps

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        def advance(count: int) -> None:
            self._left -= count
            if self._left <= 0:
                raise KeyboardInterrupt

        return advance if name == self._stage else super().stage(name, total)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """A calibration with the head, from one uninterrupted run."""
    outputs = tmp_path_factory.mktemp("whole")

    @cache
    def calibrate(precision: Any) -> Path:
        run(folder, outputs / precision, replace(FP8, precision=precision, quantizes_head=True))
        return outputs / precision

    return calibrate


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("stage", "steps"), [("decode", 2), ("calibrate", 1), ("calibrate", 3)])
def test_resumes_to_the_same_bytes(
    folder: Path,
    whole: Callable[[Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Any,
    stage: str,
    steps: int,
) -> None:
    settings = replace(FP8, precision=precision, quantizes_head=True)
    expected = whole(precision)
    output = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        run(folder, output, settings, Stopped(stage, steps))
    work = WorkFolder.beside(output).path
    num_answered = len(WorkFolder(work).episodes())
    assert num_answered == (2 if stage == "decode" else 3)
    if stage == "decode":
        with (work / "episodes.jsonl").open("a") as stream:
            stream.write("[[[12, 13")  # killed while it wrote
    answered: list[Any] = []
    original = job.answer
    monkeypatch.setattr(job, "answer", lambda *args: answered.append(args) or original(*args))
    run(folder, output, settings, resume=True)
    assert len(answered) == 3 - num_answered
    assert not work.exists()
    for file in ("calibration.json", "scales.safetensors"):
        assert (output / file).read_bytes() == (expected / file).read_bytes()


def interrupted(folder: Path, output: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run(folder, output, FP8, Stopped("calibrate", 1))
    return WorkFolder.beside(output).path


def test_refuses_to_resume_other_work(tmp_path: Path) -> None:
    folder, output = write(tmp_path / "checkpoint"), tmp_path / "out"
    with pytest.raises(
        UsageError, match="expected the work of an interrupted calibration, found none"
    ):
        run(folder, output, resume=True)
    work = interrupted(folder, output)
    with pytest.raises(
        UsageError, match="of a calibration with seed 5, found one with 0"
    ) as caught:
        run(folder, output, replace(FP8, seed=5), resume=True)
    assert "`resume`" in caught.value.hint
    change_weight(folder, "encoder.layers.1.self_attn.q_proj.weight", lambda weight: weight.mul_(2))
    with pytest.raises(UsageError, match="with checkpoint_stamp"):
        run(folder, output, resume=True)
    assert (work / "part-0.safetensors").exists()
    (work / "work.json").write_text("{")
    with pytest.raises(UsageError, match="expected a JSON object"):
        run(folder, output, resume=True)


def test_starts_over_without_resume(folder: Path, tmp_path: Path) -> None:
    interrupted(folder, tmp_path / "out")
    other = run(folder, tmp_path / "out", replace(FP8, max_new_tokens=5))
    assert other[0] == run(folder, tmp_path / "fresh", replace(FP8, max_new_tokens=5))[0]
    assert not WorkFolder.beside(tmp_path / "out").path.exists()


def test_refuses_hidden_states_that_are_cut_off(folder: Path, tmp_path: Path) -> None:
    work = interrupted(folder, tmp_path / "out")
    os.truncate(work / "hidden-1.f32", 100)
    with pytest.raises(UsageError, match=r"hidden-1\.f32: expected \d+ bytes, found 100"):
        run(folder, tmp_path / "out", resume=True)


@pytest.mark.parametrize("file", ["episodes.jsonl", "part-0.safetensors"])
def test_refuses_work_that_is_damaged(folder: Path, tmp_path: Path, file: str) -> None:
    work = interrupted(folder, tmp_path / "out")
    (work / file).write_text("[[1]]\n")
    with pytest.raises(UsageError, match=f"{file}: expected what an interrupted run wrote"):
        run(folder, tmp_path / "out", resume=True)


def test_a_full_disk_leaves_the_work_to_go_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "finish_part", full)
        with pytest.raises(BuildError, match="No space left on device"):
            run(folder, tmp_path / "out")
    assert run(folder, tmp_path / "out", resume=True)[0] == run(folder, tmp_path / "fresh")[0]


def test_two_runs_do_not_share_a_work_folder(folder: Path, tmp_path: Path) -> None:
    work = interrupted(folder, tmp_path / "out")
    with (
        WorkFolder(work).opened({}, resume=False),
        pytest.raises(UsageError, match="expected no other run at work there"),
    ):
        run(folder, tmp_path / "out")


def test_leaves_a_folder_alone_that_only_has_the_name(folder: Path, tmp_path: Path) -> None:
    work = WorkFolder.beside(tmp_path / "out").path
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="found something else"):
        run(folder, tmp_path / "out")
    assert [file.name for file in work.iterdir()] == ["thesis.txt"]


def test_an_interruption_says_how_to_go_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"token_ids": [20, 21]}\n')
    original = job.find_scales

    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "find_scales", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_calibrate(folder, tmp_path / "out", **arguments(data))
    assert "repeat the command with --resume" in capsys.readouterr().err
    monkeypatch.setattr(job, "find_scales", original)
    run_calibrate(folder, tmp_path / "out", **arguments(data, resume=True))
    assert len(load_calibration(tmp_path / "out")[0].layers) == 14


@pytest.mark.parametrize(
    "settings", [replace(FP8, precision=p) for p in PRECISIONS], ids=PRECISIONS
)
def test_the_same_seed_gives_the_same_bytes(
    folder: Path, tmp_path: Path, settings: QuantizeSettings
) -> None:
    for name in ("one", "two"):
        run(folder, tmp_path / name, replace(settings, num_samples=2, seed=3))
    for file in ("calibration.json", "scales.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_draws_without_repetition_in_order_by_seed(folder: Path) -> None:
    model = describe_model(open_checkpoint(folder))
    texts = [[12 + i] for i in range(50)]
    first = draw_texts(texts, 10, 0, model)
    assert first == draw_texts(texts, 10, 0, model) == sorted(first)
    assert len({tuple(text) for text in first}) == 10
    assert first != draw_texts(texts, 10, 1, model)
    assert draw_texts(texts, None, 0, model) == texts


def test_granularity(folder: Path, tmp_path: Path) -> None:
    head = replace(FP8, is_per_channel=True, quantizes_head=True)
    calibration, scales = run(folder, tmp_path / "fp8", head)
    assert scales["diffusion_head.weight_amax"].shape == (109,)
    assert scales["diffusion_head.input_amax"].shape == ()
    assert len(calibration.layers) == 15
    per_tensor = run(folder, tmp_path / "fp8_per_tensor")[0]
    better = [
        calibration.layers[name].weight_snr_db >= layer.weight_snr_db
        for name, layer in per_tensor.layers.items()
    ]
    assert sum(better) > len(better) / 2

    calibration, scales = run(
        folder, tmp_path / "int4", replace(FP8, precision="int4", quantizes_head=True)
    )
    assert scales["diffusion_head.weight_amax"].shape == (109, 3)
    assert calibration.block_size == 16  # 48, 80 and 96 inputs
    assert scales["encoder.layers.0.mlp.down_proj.weight_amax"].shape == (48, 5)
    assert not any(name.endswith("input_amax") for name in scales)
    assert calibration.algorithm == "awq_lite"
    assert all(10 < layer.weight_snr_db < 40 for layer in calibration.layers.values())

    calibration, scales = run(folder, tmp_path / "int8", replace(FP8, precision="int8"))
    assert scales["encoder.layers.1.self_attn.o_proj.weight_amax"].shape == (48,)
    assert scales["encoder.layers.1.self_attn.o_proj.pre_quant_scale"].shape == (96,)
    assert calibration.algorithm == "smoothquant"


def test_int4_leaves_out_what_no_block_divides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibration, _ = run(
        write(tmp_path / "checkpoint", "one_kv_head"),
        tmp_path / "out",
        replace(FP8, precision="int4"),
    )
    # hidden_size is 40
    assert {name.rpartition(".")[2] for name in calibration.layers} == {"o_proj", "down_proj"}
    assert "stays in high precision: blocks of 16 do not divide its 40 inputs" in caplog.text


def test_weights_that_are_all_zero_get_a_scale(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    change_weight(
        folder, "encoder.layers.1.self_attn.q_proj.weight", lambda weight: weight[3:5].zero_()
    )
    _, scales = run(folder, tmp_path / "out", replace(FP8, is_per_channel=True))
    assert scales["encoder.layers.1.self_attn.q_proj.weight_amax"][3:5].tolist() == [1, 1]


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"precision": "fp4"}, "expected `precision` fp8, int8, int4, nvfp4, found 'fp4'"),
    ({"modes": ("ar", "mtp")}, "expected `modes` among ar,draft,verify, found mtp"),
    ({"modes": ()}, "found none"),
    ({"modes": ("draft",)}, "expected `modes` to include ar, found draft"),
    ({"num_samples": 0}, "expected `num_samples` of at least 1, found 0"),
    ({"num_samples": 4}, "expected at least 4 prompts, found 3"),
    ({"max_new_tokens": 0}, "expected `max_new_tokens` of at least 1"),
    ({"seed": -1}, "expected `seed` of at least 0"),
    (
        {"precision": "int4", "block_size": 24},
        "expected `block_size` to be a power of two from 16 on, found 24",
    ),
    ({"block_size": 64}, "expected `block_size` with `precision` int4, found fp8"),
    (
        {"precision": "int4", "is_per_channel": True},
        "expected `is_per_channel` with `precision` fp8, found int4",
    ),
    ({"memory_gib": -1.0}, "expected `memory_gib` of at least 0, found -1"),
    ({"device": "tpu"}, "expected `device` cpu or cuda, found 'tpu'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS)
def test_refuses_settings_and_writes_nothing(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        run(folder, tmp_path / "out", replace(FP8, **changes))
    assert message in caught.value.message
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_a_device_that_is_not_here(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="expected a CUDA device"):
        run(folder, tmp_path / "out", replace(FP8, device="cuda"))


BAD_DATA = [
    ("", "expected at least one prompt, found none"),
    ("\n\n", "expected at least one prompt, found none"),
    ("hello\n", "line 1: expected a JSON object, found 'hello'"),
    ('{"token_ids": [1, 2]}\n{"text": "x"}\n', "line 2: expected either `prompt`"),
    ('{"token_ids": [1, 109]}\n', "prompt 1: expected token ids from 0 to 108, found 109"),
    ('{"token_ids": [1, -1]}\n', "found -1"),
    ('{"token_ids": [1, true]}\n', "found True"),
    ('{"token_ids": []}\n', "expected from 1 to"),
    (
        json.dumps({"token_ids": [20] * 1024}),
        "prompt 1: expected from 1 to 1023 tokens, found 1024",
    ),
    ('{"prompt": "hello"}\n', "expected tokenizer.json, found none"),
]


def arguments(data: Path, *, resume: bool = False, as_json: bool = False, **changes: Any) -> Any:
    """Keywords of :func:`run_calibrate`; ``changes`` are of the settings."""
    settings = replace(QuantizeSettings("fp8", max_new_tokens=16), **changes)
    return {
        "data": data,
        "settings": settings,
        "style": USUAL_STYLE,
        "resume": resume,
        "as_json": as_json,
    }


@pytest.mark.parametrize(("lines", "message"), BAD_DATA)
def test_refuses_data_and_writes_nothing(
    folder: Path, tmp_path: Path, lines: str, message: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(lines)
    with pytest.raises(UsageError) as caught:
        run_calibrate(folder, tmp_path / "out", **arguments(data))
    assert message in caught.value.message
    assert list(tmp_path.iterdir()) == [data]


def test_names_the_layer_whose_input_is_not_finite(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    change_weight(
        folder,
        "encoder.layers.0.mlp.up_proj.weight",
        lambda weight: weight[2, 1].fill_(float("inf")),
    )
    with pytest.raises(
        CheckpointError,
        match=(
            r"encoder\.layers\.0\.mlp\.down_proj: expected finite inputs, found (inf|nan) in a "
            r"forward of ar"
        ),
    ):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_the_layer_that_never_saw_anything(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    change_weight(folder, "encoder.layers.1.self_attn.v_proj.weight", lambda weight: weight.zero_())
    with pytest.raises(
        UsageError, match=r"encoder\.layers\.1\.self_attn\.o_proj: expected inputs other than zero"
    ):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_replaces_a_calibration_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run(folder, output)[0]
    assert run(folder, output, replace(FP8, max_new_tokens=5))[0] != first
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(
        UsageError, match="expected a new or empty folder, or a calibration to replace"
    ):
        run(folder, other)
    assert [file.name for file in other.iterdir()] == ["thesis.txt"]


def test_an_interruption_leaves_the_earlier_calibration(folder: Path, tmp_path: Path) -> None:
    before = run(folder, tmp_path / "out")[0]
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", replace(FP8, max_new_tokens=5), Interrupted())
    assert load_calibration(tmp_path / "out")[0] == before
    assert {file.name for file in tmp_path.iterdir()} == {"out", "out.work"}


def test_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(DependencyError, match=r"pip install 'trimode\[calib\]'"):
        load_modelopt()
    with pytest.raises(TrimodeError):
        run(folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_says_so_when_modelopt_gives_up(folder: Path) -> None:
    trunk = load_trunk(open_checkpoint(folder), 64)
    linears = {name: trunk.get_submodule(name) for name in quantized_layers(trunk.config, FP8)[0]}

    def forward_loop(_trunk: TriModeTrunk) -> None:
        raise RuntimeError("out of memory\nand a long trace")

    with pytest.raises(BuildError, match="14 layers, found that it gave up: out of memory\nhint"):
        run_modelopt(trunk, linears, None, FP8, forward_loop)  # type: ignore[arg-type]


def test_demo_checkpoint_from_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": example.prompt}) + "\n"
            for example in itertools.islice(examples(1, "train"), 6)
        )
    )
    run_calibrate(
        DEMO, tmp_path / "out", **arguments(data, precision="int4", num_samples=3, as_json=True)
    )
    said = capsys.readouterr()
    calibration, scales = load_calibration(tmp_path / "out")
    printed = json.loads(said.out)  # nothing else is on stdout, whatever ModelOpt prints
    assert printed["num_samples"] == 3
    assert printed["num_layers"] == len(calibration.layers) == 42
    assert "int4 (awq_lite) scales of 42 layers from 3 prompts" in said.err

    digest = SourceDigest(open_checkpoint(DEMO))
    for _ in digest.read_all():
        pass
    assert calibration.source_sha256 == digest.base_hexdigest()
    assert calibration.data is not None
    assert calibration.data.sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    assert calibration.block_size == 128
    assert scales["encoder.layers.5.mlp.down_proj.weight_amax"].shape == (256, 5)
    assert all(
        set(layer.input_amax) == {"ar", "draft", "verify"} for layer in calibration.layers.values()
    )

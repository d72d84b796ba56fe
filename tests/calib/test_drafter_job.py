"""The drafter's training as a job: what it trains on, what it trains against, what it writes, and
that it can be interrupted.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import config_of, raw_weight, write_checkpoint, write_int8_calibration
from jobs import Quiet, some_texts
from safetensors.torch import load_file

from trimode.calib.data.prompts import Prompts, split_texts
from trimode.calib.drafter.adapter import adapter_of, blank_adapter, install_adapter
from trimode.calib.drafter.answers import Written, batches, encode, write_answer
from trimode.calib.drafter.job import DrafterJob
from trimode.calib.drafter.measure import measure
from trimode.calib.drafter.settings import DrafterJobSettings
from trimode.calib.drafter.training import DrafterSettings, DrafterTraining
from trimode.calib.drafter.windows import DrafterLoss
from trimode.calib.reference.served import ServedTrunk, load_served
from trimode.calib.reference.torch_session import TorchSession
from trimode.calib.training.budget import Budget
from trimode.calib.training.run_state import state_file
from trimode.errors import BuildError, CheckpointError, TrimodeError, UsageError
from trimode.formats.contract import ModelInfo
from trimode.formats.drafter import RECORD, DrafterRecord
from trimode.graphs.adapter import ADAPTER_FOLDER
from trimode.graphs.checkpoint import describe_model, open_checkpoint
from trimode.runtime.decode.options import DecodeOptions

CONFIG = {"block_size": 8, "eos_token_id": 11}
SETTINGS: dict[str, Any] = {"steps": 6, "max_new_tokens": 14, "batch_size": 3, "num_held_out": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("drafter") / "it", config_of(**CONFIG), rank=4)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without an adapter."""
    return write_checkpoint(tmp_path_factory.mktemp("bare") / "it", config_of(**CONFIG))


def model_of(folder: Path) -> ModelInfo:
    return describe_model(open_checkpoint(folder))


def train(
    folder: Path,
    output: Path,
    *,
    resume: bool = False,
    calibration: Path | None = None,
    progress: Quiet | None = None,
    **changes: Any,
) -> DrafterRecord:
    settings = DrafterJobSettings(**{**SETTINGS, **changes})
    prompts = Prompts(some_texts(), "0" * 64)
    return DrafterJob(
        open_checkpoint(folder),
        model_of(folder),
        prompts,
        output,
        settings,
        progress or Quiet(),
        calibration=calibration,
        resume=resume,
    ).run()


def lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def served(folder: Path, dtype: Any = "float32", calibration: Path | None = None) -> ServedTrunk:
    return load_served(open_checkpoint(folder), 300, dtype, calibration)


# Prompts and answers


def test_the_parts_share_no_prompt_even_where_the_data_repeats_itself(folder: Path) -> None:
    texts = some_texts(20)
    split = split_texts(texts + texts[:9], None, 5, 3, model_of(folder))
    assert (len(split.held_out), len(split.validation), len(split.train)) == (5, 1, 14)
    assert sorted(split.texts) == sorted(texts)
    assert split == split_texts(texts + texts[:9], None, 5, 3, model_of(folder))
    assert split != split_texts(texts, None, 5, 4, model_of(folder))
    drawn = split_texts(texts, 9, 5, 3, model_of(folder))
    assert (drawn.held_out, len(drawn.train + drawn.validation)) == (split.held_out, 9)


def test_batches_go_on_from_any_step_and_use_every_answer_equally() -> None:
    written = [Written([i], [100 + i, 11]) for i in range(7)]
    first = [batch.ids[:, 0].tolist() for batch in islice(batches(written, 3, 5, "cpu"), 7)]
    assert sorted(number for batch in first for number in batch) == sorted([*range(7)] * 3)
    later = [
        batch.ids[:, 0].tolist() for batch in islice(batches(written, 3, 5, "cpu", first=4), 3)
    ]
    assert later == first[4:]


def test_a_batch_is_padded_behind_its_answers() -> None:
    batch = encode([Written([20, 21, 22], [30, 31]), Written([40], [*range(50, 66), 11])])
    assert batch.ids.shape == (2, 32)
    assert batch.ids[0, :5].tolist() == [20, 21, 22, 30, 31]
    assert batch.ids[1, :18].tolist() == [40, *range(50, 66), 11]
    assert (batch.answer_start.tolist(), batch.end.tolist()) == ([[3], [1]], [[4], [17]])


# Training


def test_a_drafter_learns_what_the_model_writes_and_changes_none_of_it(folder: Path) -> None:
    trunk, model = served(folder).trunk, model_of(folder)
    session, options = TorchSession(trunk), DecodeOptions(14, 8, 0.0)
    written = [Written(text, write_answer(session, model, text, 14)) for text in some_texts(4)]
    install_adapter(trunk, blank_adapter(trunk, 16, 64.0))
    training = DrafterTraining(
        trunk, DrafterSettings(learning_rate=1e-2, autocast=False, block_length=8)
    )
    before = measure(session, model, written, options)
    losses: list[float] = []
    training.run(
        batches(written, 4, 0, "cpu"), Budget(steps=120), lambda p, _share: losses.append(p.loss)
    )
    after = measure(session, model, written, options)
    assert losses[-1] < 0.5 * losses[0]
    assert before.acceptance_length is not None
    assert after.acceptance_length is not None
    assert after.acceptance_length > 2 * before.acceptance_length
    assert after.tokens_per_forward > 1.5 * before.tokens_per_forward
    assert before.num_unlike == after.num_unlike == 0
    assert (after.num_tokens, after.num_prompts) == (sum(len(one.answer) for one in written), 4)
    # a prefill each, a draft and a verify forward a cycle
    assert after.num_forwards == 4 + 2 * after.num_cycles


def test_the_output_has_the_layout_of_the_family(folder: Path, tmp_path: Path) -> None:
    record = train(folder, tmp_path / "out", learning_rate=0.02)
    written = lora(tmp_path / "out")
    pattern = re.compile(
        r"base_model\.model\.encoder\.layers\.[01]\.self_attn\.o_proj\.lora_[AB]\.weight"
    )
    assert len(written) == 4
    assert all(
        pattern.fullmatch(name) and tensor.dtype == torch.float32
        for name, tensor in written.items()
    )
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["o_proj"],
        "bias": "none",
    }.items() <= config.items()
    opened = open_checkpoint(folder, tmp_path / "out")
    assert opened.drafter is not None
    assert (opened.drafter.rank, opened.drafter.alpha) == (4, 16.0)
    entry = opened.tensors["encoder.layers.1.self_attn.o_proj.lora_A.weight"]
    raw = np.frombuffer(b"".join(entry.chunks()), np.float32).reshape(entry.shape)
    assert np.array_equal(
        raw, written["base_model.model.encoder.layers.1.self_attn.o_proj.lora_A.weight"].numpy()
    )
    assert DrafterRecord.model_validate_json((tmp_path / "out" / RECORD).read_text()) == record
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert record.prompts.model_dump() | {"sha256": ""} == {
        "sha256": "",
        "num_train": 11,
        "num_validation": 1,
        "num_held_out": 3,
    }
    assert record.held_out.checkpoint is not None
    assert (
        record.held_out.trained.num_unlike
        == record.held_out.no_drafter.num_unlike
        == record.held_out.checkpoint.num_unlike
        == 0
    )


def test_where_training_does_not_help_the_adapter_is_the_one_before(
    folder: Path, bare: Path, tmp_path: Path
) -> None:
    record = train(folder, tmp_path / "own", steps=1, learning_rate=1e-9)
    assert record.kept == "checkpoint"
    assert same(lora(tmp_path / "own"), lora(folder / ADAPTER_FOLDER))
    record = train(bare, tmp_path / "fresh", steps=1, learning_rate=1e-9, rank=3, alpha=7.0)
    assert (record.kept, record.rank, record.alpha) == ("untrained", 3, 7.0)
    assert record.held_out.checkpoint is None
    assert not any(
        tensor.any() for name, tensor in lora(tmp_path / "fresh").items() if "lora_B" in name
    )


def test_training_starts_from_the_adapter_or_from_scratch(folder: Path) -> None:
    trunk = served(folder).trunk
    own = adapter_of(trunk, 16.0)
    written = [Written([20, 21], [30, 31, 32])]
    training = DrafterTraining(
        trunk, DrafterSettings(learning_rate=1e-9, autocast=False), from_scratch=False
    )
    training.run(batches(written, 1, 0, "cpu"), Budget(steps=1))
    now = adapter_of(trunk, 16.0)
    assert all(
        torch.allclose(own.weights[name], now.weights[name], atol=1e-7) for name in own.weights
    )
    DrafterTraining(trunk, DrafterSettings(autocast=False))
    assert not any(
        tensor.any() for name, tensor in adapter_of(trunk, 16.0).weights.items() if "lora_B" in name
    )


def test_an_adapter_of_bfloat16_numbers(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "out", dtype="bfloat16", learning_rate=0.02)
    assert all(
        torch.equal(tensor, tensor.bfloat16().float()) for tensor in lora(tmp_path / "out").values()
    )
    trunk = served(folder, "bfloat16").trunk
    weight = trunk.get_parameter("encoder.layers.0.mlp.up_proj.weight")
    assert torch.equal(weight, weight.bfloat16().float())


def test_a_training_that_diverges(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms of a trunk keep a large step finite, so the loss itself is spoilt."""
    monkeypatch.setattr(
        DrafterTraining, "_step", lambda *_: DrafterLoss(*[torch.tensor(float("nan"))] * 4)
    )
    with pytest.raises(BuildError, match="learning_rate"):
        train(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Interruptions


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """As in a terminal; a runner may have started the tests with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupted_run_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole = train(folder, tmp_path / "whole", learning_rate=0.02, from_scratch=True)
    for stage, at in (("write answers", 4), ("train", 50)):

        def press(name: str, done: int, stage: str = stage, at: int = at) -> None:
            if (name, done) == (stage, at):
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            train(
                folder,
                tmp_path / "parts",
                learning_rate=0.02,
                from_scratch=True,
                resume=stage == "train",
                progress=Quiet(press),
            )
        assert not (tmp_path / "parts").exists()
    state = torch.load(state_file(tmp_path / "parts"), weights_only=True)
    assert (len(state["written"]), state["training"]["progress"]["step"]) == (15, 3)
    with pytest.raises(UsageError, match="found one that was interrupted"):
        train(folder, tmp_path / "parts", learning_rate=0.02, from_scratch=True)
    with pytest.raises(UsageError, match=r"a run with learning_rate 0\.01, found one with 0\.02"):
        train(folder, tmp_path / "parts", learning_rate=0.01, from_scratch=True, resume=True)
    progress = Quiet()
    parts = train(
        folder,
        tmp_path / "parts",
        learning_rate=0.02,
        from_scratch=True,
        resume=True,
        progress=progress,
    )
    assert progress.done["write answers"] == 15
    assert (tmp_path / "parts/adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole/adapter_model.safetensors"
    ).read_bytes()
    without_time = {"training": parts.training.model_copy(update={"seconds": 0.0})}
    assert parts.model_copy(update=without_time) == whole.model_copy(
        update={"training": whole.training.model_copy(update={"seconds": 0.0})}
    )
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts"}


def test_a_state_that_is_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found none"):
        train(folder, tmp_path / "out", resume=True)
    state_file(tmp_path / "out").write_text("?")
    with pytest.raises(UsageError, match="a file that is none"):
        train(folder, tmp_path / "out", resume=True)


# Quantized


def test_the_drafter_is_trained_against_the_quantized_weights(folder: Path, tmp_path: Path) -> None:
    calibration = write_int8_calibration(folder, tmp_path / "cal")
    trunk = served(folder, "bfloat16", calibration).trunk
    name = "encoder.layers.1.self_attn.o_proj"
    weight, scales = (
        raw_weight(folder, f"{name}.weight").astype(np.float64),
        load_scales(calibration, name),
    )
    expected = (
        np.clip(np.rint(weight / scales["pre"] / scales["step"][:, None]), -127, 127)
        * scales["step"][:, None]
    )
    np.testing.assert_allclose(
        trunk.get_parameter(f"{name}.weight").detach().numpy(), expected, rtol=1e-6
    )
    record = train(folder, tmp_path / "out", calibration=calibration, learning_rate=0.02)
    assert record.calibration is not None
    assert (record.calibration.precision, record.calibration.name) == ("int8", "cal")
    assert record.held_out.trained.num_unlike == 0
    dense = train(folder, tmp_path / "dense", learning_rate=0.02)
    assert dense.training.loss != record.training.loss


def load_scales(calibration: Path, layer: str) -> dict[str, np.ndarray]:
    """Rounded to bfloat16 as a pack rounds them, in float64."""
    from safetensors.numpy import load_file as load_numpy

    values = load_numpy(calibration / "scales.safetensors")
    step = (
        (values[f"{layer}.weight_amax"] / np.float32(127))
        .astype(ml_dtypes.bfloat16)
        .astype(np.float64)
    )
    return {
        "step": step,
        "pre": values[f"{layer}.pre_quant_scale"].astype(ml_dtypes.bfloat16).astype(np.float64),
    }


def test_a_calibration_belongs_to_the_checkpoint_whatever_its_adapter(
    folder: Path, bare: Path, tmp_path: Path
) -> None:
    calibration = write_int8_calibration(folder, tmp_path / "cal")
    train(folder, tmp_path / "other", learning_rate=0.02)
    load_served(open_checkpoint(folder, tmp_path / "other"), 300, "float32", calibration)
    other = write_checkpoint(tmp_path / "it", config_of(**CONFIG), rank=4, seed=1)
    with pytest.raises(CheckpointError, match="expected a calibration of this checkpoint"):
        train(other, tmp_path / "out", calibration=calibration)
    assert not (tmp_path / "out").exists()
    assert not state_file(tmp_path / "out").exists()


# Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, "`rank` and `alpha` together with `from_scratch`"),
        (
            {"num_held_out": 14},
            "expected at least 16 different prompts, 14 of them held out, found 15",
        ),
        ({"num_samples": 13}, "expected at least 16 different prompts"),
        ({"steps": 0}, "`steps` of at least 1"),
        ({"minutes": -1.0}, "`minutes` above 0"),
        ({"alpha": float("nan")}, "`alpha` above 0"),
        ({"learning_rate": 2.0}, "`learning_rate` above 0 and up to 1"),
        ({"block_length": 65}, "`block_length` up to 64"),
        ({"dtype": "fp32"}, "`dtype` float32, bfloat16, float16"),
        ({"device": "tpu"}, "`device` cpu or cuda"),
    ],
)
def test_settings_that_cannot_be_used(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(folder, tmp_path / "out", **changes)
    assert not any(tmp_path.iterdir())


def test_a_device_that_is_not_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrimodeError, match="expected a CUDA device"):
        train(folder, tmp_path / "out", device="cuda")


def test_no_adapter_and_no_rank(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected `rank` for a checkpoint without"):
        train(bare, tmp_path / "out")


def test_answers_that_end_at_once(tmp_path: Path) -> None:
    """Every token ends a text."""
    folder = write_checkpoint(
        tmp_path / "it", config_of(**{**CONFIG, "eos_token_id": list(range(109))}), rank=4
    )
    with pytest.raises(
        UsageError, match="at least 2 tokens to train on, found 11 that end at the first"
    ):
        train(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_output_is_replaced(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="something else"):
        train(folder, folder / ADAPTER_FOLDER)
    first = train(folder, tmp_path / "out", steps=1)
    assert train(folder, tmp_path / "out", steps=2).training.steps == first.training.steps + 1

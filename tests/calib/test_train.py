from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trimode.calib.demo import train
from trimode.calib.demo.model import build_trunk, demo_config
from trimode.calib.demo.save import demo_texts
from trimode.calib.demo.train import REPORT_FILE, Plan, processor, train_demo
from trimode.calib.training.budget import Budget
from trimode.calib.training.checkpoint_writer import round_weights, write_adapter, write_checkpoint
from trimode.errors import BuildError, UsageError
from trimode.formats.safetensors import to_float32
from trimode.graphs.adapter import ADAPTER_FOLDER
from trimode.graphs.checkpoint import Checkpoint, open_checkpoint
from trimode.graphs.config import parse_config
from trimode.graphs.decoder.trunk import TriModeTrunk

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    f"{ADAPTER_FOLDER}/adapter_config.json",
    f"{ADAPTER_FOLDER}/adapter_model.safetensors",
}


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def values(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    entry = checkpoint.tensors[name]
    return torch.from_numpy(to_float32(b"".join(entry.chunks()), entry.dtype).copy()).view(
        entry.shape
    )


def plan(folder: Path, config: dict[str, Any], **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "joint": Budget(steps=3),
        "drafter": Budget(steps=2),
        "num_questions": 0,
        "batch_size": 4,
        "num_answers": 12,
        **changes,
    }
    return Plan(output=folder / "model", state=folder / "state.pt", config=config, **settings)


def test_three_steps_end_to_end(tmp_path: Path, small_config: dict[str, Any]) -> None:
    report = train_demo(plan(tmp_path, small_config))
    folder = tmp_path / "model"
    assert files(folder) == FILES | {REPORT_FILE}
    assert {p.name for p in tmp_path.iterdir()} == {"model", "state.pt"}
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == parse_config(small_config)
    assert checkpoint.drafter is not None
    assert (checkpoint.drafter.rank, checkpoint.drafter.alpha) == (128, 512.0)
    assert {e.dtype for n, e in checkpoint.tensors.items() if "lora_" not in n} == {"BF16"}
    assert {e.dtype for n, e in checkpoint.tensors.items() if "lora_" in n} == {"F32"}
    assert values(checkpoint, "encoder.layers.1.self_attn.o_proj.lora_B.weight").any()
    assert json.loads((folder / REPORT_FILE).read_text()) == json.loads(json.dumps(report))
    assert (report["joint"]["step"], report["drafter"]["step"], report["seed"]) == (3, 2, 0)


def test_a_finished_run_is_taken_up_at_the_drafter(
    tmp_path: Path, small_config: dict[str, Any]
) -> None:
    train_demo(plan(tmp_path, small_config))
    first = load_file(tmp_path / "model/model.safetensors")
    with pytest.raises(UsageError, match="expected no earlier run"):
        train_demo(plan(tmp_path, small_config))
    report = train_demo(plan(tmp_path, small_config, resume=True, drafter=Budget(steps=1)))
    assert (report["joint"]["step"], report["drafter"]["step"]) == (3, 1)
    second = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_refinement_goes_on_from_the_joint_stage_and_from_its_checkpoint_alike(
    tmp_path: Path, small_config: dict[str, Any]
) -> None:
    whole = train_demo(plan(tmp_path / "whole", small_config, refinement=Budget(steps=2)))
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {
        "model",
        "state.pt",
        "state.refinement.pt",
    }
    train_demo(plan(tmp_path / "first", small_config))
    base = tmp_path / "first/model"
    second = train_demo(
        plan(tmp_path / "second", small_config, refinement=Budget(steps=2), base=base)
    )
    assert second["base"]["joint"]["step"] == whole["joint"]["step"] == 3
    assert (second["refinement"]["step"], second["refinement"]["losses"]) == (
        2,
        whole["refinement"]["losses"],
    )
    folders = [
        load_file(tmp_path / name / "model/model.safetensors")
        for name in ("whole", "first", "second")
    ]
    assert all(torch.equal(tensor, folders[2][name]) for name, tensor in folders[0].items())
    assert any(not torch.equal(tensor, folders[2][name]) for name, tensor in folders[1].items())


def test_a_finished_refinement_is_taken_up(tmp_path: Path, small_config: dict[str, Any]) -> None:
    train_demo(plan(tmp_path, small_config, refinement=Budget(steps=2)))
    (tmp_path / "state.pt").unlink()
    with pytest.raises(UsageError, match="expected no earlier run"):
        train_demo(
            plan(tmp_path, small_config, refinement=Budget(steps=2), base=tmp_path / "model")
        )
    report = train_demo(
        plan(
            tmp_path, small_config, refinement=Budget(steps=3), base=tmp_path / "model", resume=True
        )
    )
    assert report["refinement"]["step"] == 3


def test_a_base_of_another_shape_is_refused(tmp_path: Path, small_config: dict[str, Any]) -> None:
    train_demo(plan(tmp_path, small_config))
    with pytest.raises(UsageError, match="another"):
        train_demo(
            plan(
                tmp_path / "other",
                {**small_config, "num_hidden_layers": 1},
                base=tmp_path / "model",
            )
        )


def test_resume_without_a_state_is_refused(tmp_path: Path, small_config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="found none"):
        train_demo(plan(tmp_path, small_config, resume=True))


def test_the_drafter_stage_sees_the_weights_that_are_saved(
    tmp_path: Path, small_config: dict[str, Any]
) -> None:
    trunk = build_trunk(small_config, 3)
    round_weights(trunk)
    write_checkpoint(tmp_path / "model", trunk, small_config, demo_texts())
    checkpoint = open_checkpoint(tmp_path / "model")
    for name, parameter in trunk.named_parameters():
        assert torch.equal(values(checkpoint, name), parameter.detach())
    assert files(tmp_path / "model") == FILES


def test_the_files_are_those_of_the_family(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", build_trunk(demo_config(), 0), demo_config(), demo_texts())
    assert json.loads((tmp_path / "model/generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [11],
    }
    adapter = json.loads((tmp_path / "model" / ADAPTER_FOLDER / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "r": 128,
        "lora_alpha": 512,
        "target_modules": ["o_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
    }
    assert expected.items() <= adapter.items()
    assert adapter["inference_mode"] is True
    lora = load_file(tmp_path / "model" / ADAPTER_FOLDER / "adapter_model.safetensors")
    assert lora["base_model.model.encoder.layers.5.self_attn.o_proj.lora_A.weight"].shape == (
        128,
        384,
    )
    assert lora["base_model.model.encoder.layers.0.self_attn.o_proj.lora_B.weight"].shape == (
        256,
        128,
    )
    assert len(lora) == 12


def test_a_trunk_without_adapter_makes_a_checkpoint_without(
    tmp_path: Path, small_config: dict[str, Any]
) -> None:
    trunk = TriModeTrunk(parse_config(small_config), 32)
    write_checkpoint(tmp_path / "model", trunk, small_config, {})
    assert open_checkpoint(tmp_path / "model").drafter is None
    with pytest.raises(UsageError, match="adapter"):
        write_adapter(tmp_path / "adapter", trunk)


def test_only_checkpoints_are_replaced_and_only_by_whole_ones(
    tmp_path: Path, small_trunk: TriModeTrunk, small_config: dict[str, Any]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        write_checkpoint(tmp_path / "notes", small_trunk, small_config, {})
    write_checkpoint(tmp_path / "model", small_trunk, small_config, {"old.txt": ""})
    with pytest.raises(BuildError, match="no/such/folder"):
        write_checkpoint(tmp_path / "model", small_trunk, small_config, {"no/such/folder": ""})
    assert (tmp_path / "model/old.txt").is_file()
    write_checkpoint(tmp_path / "model", small_trunk, small_config, {})
    assert not (tmp_path / "model/old.txt").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"notes", "model"}


def test_the_command_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trimode.calib.demo.train", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in (
        "--minutes",
        "--refinement-steps",
        "--base",
        "--drafter-steps",
        "--resume",
        "--state",
    ):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"refinement_steps": 0}, None),
        ({"refinement_steps": 7}, Budget(steps=7)),
        ({}, Budget(5400.0)),
    ],
)
def test_the_command_leaves_the_refinement_out_where_it_is_told_to(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    expected: Budget | None,
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(train, "train_demo", lambda one, _progress: plans.append(one))
    train.main(tmp_path / "model", **options)
    assert plans[0].refinement == expected


def test_the_processor_has_a_name() -> None:
    assert processor()

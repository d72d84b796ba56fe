from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import config_of, write_checkpoint
from safetensors.torch import load_file, save_file

from trimode.errors import CheckpointError
from trimode.formats.safetensors import to_float32
from trimode.graphs.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("good"), config_of(), rank=4)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def test_entries_hold_the_bytes(good: Path) -> None:
    opened, truth = open_checkpoint(good), load_file(good / "model.safetensors")
    assert len([n for n in opened.tensors if "lora" not in n]) == 9 * 2 + 3
    for name, tensor in truth.items():
        raw = b"".join(opened.tensors[name].chunks(chunk_bytes=1000))
        np.testing.assert_array_equal(
            to_float32(raw, opened.tensors[name].dtype).reshape(tensor.shape),
            tensor.float().numpy(),
        )
    assert opened.drafter is not None
    assert (opened.drafter.rank, opened.drafter.alpha) == (4, 16.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widening_is_exact(dtype: torch.dtype) -> None:
    values = torch.cat([torch.randn(1001) * 10.0**e for e in range(-7, 5)]).to(dtype)
    raw = values.view(torch.uint8).numpy().tobytes()
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    np.testing.assert_array_equal(to_float32(raw, name), values.float().numpy())


def test_shards_equal_a_single_file(good: Path, tmp_path: Path) -> None:
    sharded = open_checkpoint(write_checkpoint(tmp_path / "sharded", config_of(), rank=4, shards=3))
    single = open_checkpoint(good)
    assert list(sharded.tensors) == list(single.tensors)
    for name in single.tensors:
        assert b"".join(sharded.tensors[name].chunks()) == b"".join(single.tensors[name].chunks())


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


NORM = "encoder.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "checkpoint folder"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"model\.safetensors: expected a file",
    ),
    "truncated weights": (truncate("model.safetensors", 0.9), "bytes"),
    "truncated header": (truncate("model.safetensors", 0.001), "header"),
    "empty weights": (truncate("model.safetensors", 0), "header"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"x" * 400),
        "safetensors",
    ),
    "a tensor missing": (edit_weights(lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "a tensor too many": (
        edit_weights(lambda t: t.update(extra=torch.ones(1))),
        "extra is not part",
    ),
    "a wrong shape": (
        edit_weights(lambda t: t.update({NORM: torch.ones(7)})),
        rf"{NORM} of shape \[48\], found \[7\]",
    ),
    "a wrong type": (
        edit_weights(lambda t: t.update({NORM: torch.ones(48, dtype=torch.int64)})),
        "I64",
    ),
    "another config": (edit_json("config.json", num_hidden_layers=3), "layers.2"),
    "adapter weights missing": (
        lambda f: (f / "linear_spec_lora/adapter_model.safetensors").unlink(),
        "adapter_model",
    ),
    "adapter of another kind": (
        edit_json("linear_spec_lora/adapter_config.json", peft_type="IA3"),
        "IA3",
    ),
    "adapter elsewhere": (
        edit_json("linear_spec_lora/adapter_config.json", target_modules=["q_proj"]),
        "q_proj",
    ),
    "adapter of another rank": (edit_json("linear_spec_lora/adapter_config.json", r=5), "lora_A"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(copy: Path, damage: str) -> None:
    change, expected = DAMAGES[damage]
    change(copy)
    with pytest.raises(CheckpointError, match=expected) as raised:
        open_checkpoint(copy)
    assert raised.value.hint
    assert "\n" not in raised.value.message


def test_index_that_lies(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", config_of(), shards=2)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][NORM] = next(
        f for f in values["weight_map"].values() if f != values["weight_map"][NORM]
    )
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=NORM):
        open_checkpoint(folder)
    values["weight_map"][NORM] = "../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(folder)


ROTARY = "encoder.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize(
    "name", [ROTARY, "encoder.rotary_emb.original_inv_freq", "rotary_emb.cos_cached"]
)
def test_stored_rotary_buffers_are_skipped(
    good: Path, copy: Path, name: str, dtype: torch.dtype
) -> None:
    edit_weights(lambda tensors: tensors.update({name: torch.ones(8).to(dtype)}))(copy)
    assert list(open_checkpoint(copy).tensors) == list(open_checkpoint(good).tensors)


def test_a_second_output_matrix_is_refused(copy: Path) -> None:
    edit_weights(
        lambda tensors: tensors.update({"lm_head.weight": tensors["diffusion_head.weight"].clone()})
    )(copy)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not part") as raised:
        open_checkpoint(copy)
    assert "diffusion_head" in raised.value.hint


def test_a_cache_of_links_opens(good: Path, tmp_path: Path) -> None:
    """As the Hub's cache lies: files by their digest, and a folder of links to them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    for number, file in enumerate(file for file in sorted(good.rglob("*")) if file.is_file()):
        blobs.mkdir(exist_ok=True)
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(good)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    opened = open_checkpoint(snapshot)
    assert list(opened.tensors) == list(open_checkpoint(good).tensors)
    assert opened.drafter is not None


def gone(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "gone")

    return damage


def folder_at(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


FILES = [
    "config.json",
    "model.safetensors",
    "linear_spec_lora/adapter_config.json",
    "linear_spec_lora/adapter_model.safetensors",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [gone, folder_at])
def test_what_lies_in_place_of_a_file_is_named(
    copy: Path, name: str, damage: Callable[[str], Callable[[Path], None]]
) -> None:
    damage(name)(copy)
    with pytest.raises(CheckpointError, match=name) as raised:
        open_checkpoint(copy)
    assert raised.value.hint


def test_a_pickle_is_named(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_checkpoint(copy)


def test_a_file_that_goes_while_it_is_read(copy: Path) -> None:
    entry = open_checkpoint(copy).tensors[NORM]
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        list(entry.chunks())


@pytest.mark.parametrize("value", ["gone.safetensors", "", "..", 7, "a\0b", "/etc/passwd"])
def test_an_index_to_a_shard_that_is_not_there(tmp_path: Path, value: object) -> None:
    folder = write_checkpoint(tmp_path / "c", config_of(), shards=2)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][NORM] = value
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="safetensors") as raised:
        open_checkpoint(folder)
    assert "\n" not in raised.value.message

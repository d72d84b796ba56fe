"""Adapters that PEFT wrote: what the trunk computes with them is what PEFT computes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import config_of, write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file, save_file
from torch import nn

from trimode.calib.reference.mapped import open_trunk
from trimode.errors import CheckpointError
from trimode.graphs.adapter import FoldedEntry
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.config import parse_config
from trimode.graphs.decoder.trunk import LowRankLinear, TriModeTrunk
from trimode.graphs.identity import SourceDigest

CONFIG = config_of(num_hidden_layers=3)
O_PROJ = re.compile(r"(.*\.)?encoder\.layers\.\d+\.self_attn\.o_proj")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank stabilised": {"use_rslora": True},
    "alpha of a layer": {"alpha_pattern": {"encoder.layers.1.self_attn.o_proj": 7}},
    "alpha of layers, by an expression": {
        "alpha_pattern": {r"layers\.[02]\..*o_proj": 3, r".*1\.self_attn.o_proj": 20}
    },
    "the first pattern that matches": {
        "alpha_pattern": {"o_proj": 5, "layers.1.self_attn.o_proj": 9}
    },
    "a pattern from the start of the name": {
        "alpha_pattern": {"^encoder.layers.2.self_attn.o_proj": 1}
    },
    "a larger rank in a layer": {"rank_pattern": {"layers.0.self_attn.o_proj": 6}},
    "a smaller rank in a layer": {"rank_pattern": {"layers.2.self_attn.o_proj": 1}},
    "rank and alpha, rank stabilised": {
        "use_rslora": True,
        "rank_pattern": {"layers.0.*": 3},
        "alpha_pattern": {"layers.1.*": 2.5},
    },
    "a scale of zero": {"alpha_pattern": {"layers.0.self_attn.o_proj": 0}},
    "a scale below zero": {"alpha_pattern": {"layers.0.self_attn.o_proj": -40}},
    "an expression": {"target_modules": r".*\.self_attn\.o_proj"},
    "an expression of some layers": {"target_modules": r"encoder\.layers\.[12]\.self_attn\.o_proj"},
    "qualified": {"target_modules": ["self_attn.o_proj"]},
    "whole names": {
        "target_modules": ["encoder.layers.0.self_attn.o_proj", "encoder.layers.2.self_attn.o_proj"]
    },
    "one layer": {"layers_to_transform": 1},
    "two layers": {"layers_to_transform": [0, 2]},
    "two layers, with a pattern": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "a layer that is not there": {
        "layers_to_transform": [1, 7],
        "layers_pattern": ["blocks", "layers"],
    },
    "a layer excluded": {"exclude_modules": ["layers.1.self_attn.o_proj"]},
    "a layer excluded by an expression": {"exclude_modules": r".*\.0\..*"},
    "another target excluded": {
        "target_modules": ["o_proj", "q_proj"],
        "exclude_modules": ["q_proj"],
    },
    "gaussian": {"init_lora_weights": "gaussian"},
}


class Wrapper(nn.Module):
    """The trunk behind one more name."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.model = trunk


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "checkpoint", CONFIG)


def untrained(*, wrapped: bool) -> nn.Module:
    """The trunk with linear layers as PEFT wants them."""
    trunk = TriModeTrunk(parse_config(CONFIG), 8)
    for name, child in list(trunk.named_modules()):
        if isinstance(child, LowRankLinear):
            parent, _, last = name.rpartition(".")
            setattr(
                trunk.get_submodule(parent),
                last,
                nn.Linear(child.in_features, child.out_features, bias=False),
            )
    return Wrapper(trunk) if wrapped else trunk


def trained(folder: Path, *, wrapped: bool = False, **settings: Any) -> dict[str, PeftLinear]:
    """Save an adapter of random weights as PEFT does, and open it with PEFT; its layers by the
    trunk's names.
    """
    torch.manual_seed(5)
    chosen: dict[str, Any] = {"target_modules": ["o_proj"], "r": 4, "lora_alpha": 16, **settings}
    peft = get_peft_model(untrained(wrapped=wrapped), LoraConfig(**chosen))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    peft.save_pretrained(folder)
    # Opened again, for PEFT sorts the patterns when it writes them, and the first that matches
    # counts.
    opened = PeftModel.from_pretrained(untrained(wrapped=wrapped), folder)
    found = {
        name: module for name, module in opened.named_modules() if isinstance(module, PeftLinear)
    }
    return {name[name.index("encoder") :]: module for name, module in found.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("memory_bytes", [None, 0], ids=["in memory", "mapped"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_branch_is_that_of_peft(
    base: Path, tmp_path: Path, variant: str, memory_bytes: int | None
) -> None:
    theirs = trained(tmp_path, **VARIANTS[variant])
    assert theirs
    assert all(O_PROJ.fullmatch(name) for name in theirs)
    trunk = open_trunk(open_checkpoint(base, tmp_path), 8, memory_bytes=memory_bytes)
    x = torch.randn(9, trunk.config.query_size)
    for i in range(3):
        name = f"encoder.layers.{i}.self_attn.o_proj"
        ours = trunk.get_submodule(name)
        branch = ours(x, 1.0) - ours(x)
        expected = (
            nn.functional.linear(x, theirs[name].get_delta_weight("default"))
            if name in theirs
            else torch.zeros_like(branch)
        )
        torch.testing.assert_close(
            branch, expected.detach(), rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max()))
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folded_weights_are_those_of_peft(base: Path, tmp_path: Path, variant: str) -> None:
    """Entry by entry in float64, at the precision of one float32 rounding."""
    theirs = trained(tmp_path, **VARIANTS[variant])
    checkpoint = open_checkpoint(base, tmp_path)
    assert checkpoint.drafter is not None
    scale = checkpoint.drafter.alpha / checkpoint.drafter.rank
    for i in range(3):
        name = f"encoder.layers.{i}.self_attn.o_proj"
        a, b = (stored(checkpoint.tensors[f"{name}.lora_{half}.weight"]) for half in "AB")
        assert a.shape == (checkpoint.drafter.rank, 96)
        if name not in theirs:
            assert not b.any()
            continue
        layer = theirs[name]
        expected = layer.scaling["default"] * (
            layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        torch.testing.assert_close(
            scale * (b @ a), expected.detach(), rtol=1e-6, atol=1e-6 * float(expected.abs().max())
        )


@pytest.mark.filterwarnings("ignore")
def test_a_plain_adapter_is_read_where_it_lies(base: Path, tmp_path: Path) -> None:
    trained(tmp_path)
    checkpoint = open_checkpoint(base, tmp_path)
    assert (checkpoint.drafter.rank, checkpoint.drafter.alpha) == (4, 16.0)  # type: ignore[union-attr]
    assert not any(isinstance(entry, FoldedEntry) for entry in checkpoint.tensors.values())


@pytest.mark.filterwarnings("ignore")
def test_digests_tell_scales_apart(base: Path, tmp_path: Path) -> None:
    digests = set()
    for i, alpha in enumerate((16, 8, 4)):
        trained(tmp_path / str(i), alpha_pattern={"layers.1.self_attn.o_proj": alpha})
        digest = SourceDigest(open_checkpoint(base, tmp_path / str(i)))
        list(digest.read_all())
        digests.add(digest.hexdigest())
    assert len(digests) == 3


@pytest.mark.parametrize("chunk_bytes", [4, 1000, 1 << 24])
@pytest.mark.filterwarnings("ignore")
def test_pieces_of_a_folded_tensor(base: Path, tmp_path: Path, chunk_bytes: int) -> None:
    trained(tmp_path, rank_pattern={"layers.0.*": 6})
    entry = open_checkpoint(base, tmp_path).tensors[
        "encoder.layers.1.self_attn.o_proj.lora_B.weight"
    ]
    assert isinstance(entry, FoldedEntry)
    raw = b"".join(entry.chunks(chunk_bytes))
    assert len(raw) == entry.num_bytes
    torch.testing.assert_close(
        torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(entry.shape),
        torch.from_numpy(entry.values()),
    )


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_in_sixteen_bits_is_folded_exactly(base: Path, tmp_path: Path) -> None:
    # half of the others: a power of two
    trained(tmp_path, alpha_pattern={"layers.1.self_attn.o_proj": 8})
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    name = "encoder.layers.1.self_attn.o_proj.lora_B.weight"
    folded = stored(open_checkpoint(base, tmp_path).tensors[name])
    torch.testing.assert_close(
        folded, load_file(path)[f"base_model.model.{name}"].double() / 2, rtol=0, atol=0
    )


RESPELLED: dict[str, Callable[[str], str]] = {
    "of a state dict": lambda name: re.sub(r"(lora_[AB])\.", r"\1.default.", name),
    "of a state dict, another name": lambda name: re.sub(
        r"(lora_[AB])\.", r"\1.linear_spec_lora.", name
    ),
    "with one more model": lambda name: name.replace(
        "base_model.model.", "base_model.model.model."
    ),
    "without the prefix": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spelling", RESPELLED)
def test_other_spellings_are_the_same_adapter(base: Path, tmp_path: Path, spelling: str) -> None:
    trained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "adapter_model.safetensors"
    save_file({RESPELLED[spelling](name): tensor for name, tensor in load_file(path).items()}, path)
    assert digest_of(base, tmp_path / "a") == digest_of(base, tmp_path / "b")


@pytest.mark.filterwarnings("ignore")
def test_patterns_match_names_behind_a_wrapper(base: Path, tmp_path: Path) -> None:
    theirs = trained(
        tmp_path, wrapped=True, target_modules=r"model\.encoder\.layers\.[01]\.self_attn\.o_proj"
    )
    checkpoint = open_checkpoint(base, tmp_path)
    assert len(theirs) == 2
    assert not stored(checkpoint.tensors["encoder.layers.2.self_attn.o_proj.lora_B.weight"]).any()
    assert stored(checkpoint.tensors["encoder.layers.1.self_attn.o_proj.lora_B.weight"]).any()


def setting(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return damage


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


FIRST = "base_model.model.encoder.layers.0.self_attn.o_proj.lora_"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (emptied, r"adapter_config\.json: expected a file"),
    "a pickle": (pickled, r"adapter_model\.bin"),
    "other projections": (
        setting(target_modules=["o_proj", "q_proj"]),
        r"target_modules.*layers\.0\.self_attn\.q_proj",
    ),
    "the head": (setting(target_modules=r".*(o_proj|diffusion_head)"), "diffusion_head"),
    "no projection": (setting(target_modules=["out_proj"]), "out_proj"),
    "no expression": (setting(target_modules="(o_proj"), "target_modules.*regular expression"),
    "no expression among patterns": (setting(rank_pattern={"[": 4}), "rank_pattern"),
    "targets of numbers": (setting(target_modules=[1]), "target_modules"),
    "no targets": (setting(target_modules=None), "target_modules"),
    "fewer layers than tensors": (setting(layers_to_transform=[0]), r"layers\.1"),
    "layers beside an expression": (
        setting(target_modules=".*o_proj", layers_to_transform=[0]),
        "layers_to_transform",
    ),
    "a layers_pattern alone": (setting(layers_pattern="layers"), "layers_pattern"),
    "layers that are no numbers": (setting(layers_to_transform=["0"]), "layers_to_transform"),
    "a rank of another layer": (setting(rank_pattern={"layers.1.*": 5}), r"layers\.1.*lora_A"),
    "a rank that is no number": (setting(rank_pattern={"o_proj": "4"}), "rank_pattern"),
    "a rank of zero": (setting(r=0), "expected r to be"),
    "a rank that is true": (setting(r=True), "expected r to be"),
    "no alpha": (setting(lora_alpha=None), "lora_alpha"),
    "an endless alpha": (
        lambda f: setting(lora_alpha=123456789)(f) or respelled(f, "123456789", "1e999"),
        "lora_alpha",
    ),
    "magnitudes": (
        tensors(lambda t: t.update({FIRST + "magnitude_vector": torch.ones(48)})),
        "magnitude_vector",
    ),
    "biases": (tensors(lambda t: t.update({FIRST + "B.bias": torch.ones(48)})), r"lora_B\.bias"),
    "a tensor missing": (
        tensors(lambda t: t.pop(FIRST + "B.weight")),
        r"layers\.0.*lora_B\.weight.*missing",
    ),
    "a tensor twice": (
        tensors(lambda t: t.update({FIRST + "A.default.weight": torch.ones(4, 96)})),
        "named alike",
    ),
    "whole numbers": (
        tensors(lambda t: t.update({FIRST + "A.weight": torch.ones(4, 96, dtype=torch.int32)})),
        "I32",
    ),
    "a name twice": (lambda f: respelled(f, '"r":', '"r": 4, "r":'), "twice"),
    **{
        f"initialized by {name}": (setting(init_lora_weights=name), name)
        for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    },
    "acting behind tokens": (setting(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
    "saving modules": (setting(modules_to_save=["diffusion_head"]), "modules_to_save"),
    "a bias": (setting(bias="lora_only"), "bias"),
}


def respelled(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", REFUSED)
def test_what_is_not_computed_is_refused(base: Path, tmp_path: Path, damage: str) -> None:
    trained(tmp_path)
    change, expected = REFUSED[damage]
    change(tmp_path)
    with pytest.raises(CheckpointError, match=expected) as raised:
        open_checkpoint(base, tmp_path)
    assert raised.value.hint
    assert "\n" not in raised.value.message
    assert str(tmp_path) in raised.value.message


@pytest.mark.filterwarnings("ignore")
def test_all_linear_layers_of_which_one_was_trained(base: Path, tmp_path: Path) -> None:
    trained(tmp_path)
    plain = digest_of(base, tmp_path)
    setting(target_modules="all-linear")(tmp_path)
    assert digest_of(base, tmp_path) == plain


@pytest.mark.parametrize("lies_there", ["a file", "a link"])
def test_what_is_no_folder_is_no_absent_adapter(
    base: Path, tmp_path: Path, lies_there: str
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "c"))
    own = folder / "linear_spec_lora"
    own.write_text("") if lies_there == "a file" else own.symlink_to(tmp_path / "gone")
    with pytest.raises(
        CheckpointError, match=rf"linear_spec_lora: expected the folder.*{lies_there}"
    ):
        open_checkpoint(folder)


def stored(entry: Any) -> torch.Tensor:
    """A tensor of float32, as float64."""
    return (
        torch.frombuffer(bytearray(b"".join(entry.chunks())), dtype=torch.float32)
        .reshape(entry.shape)
        .double()
    )


def digest_of(base: Path, adapter: Path) -> str:
    digest = SourceDigest(open_checkpoint(base, adapter))
    list(digest.read_all())
    return digest.hexdigest()

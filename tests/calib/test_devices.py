"""What a step of training computes with is where the weights are, shown without a GPU: on the
device ``meta``.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

import trimode.calib.demo.joint
from trimode.calib.demo.data import Chats, encode
from trimode.calib.demo.joint import autoregressive_loss, denoising_loss
from trimode.calib.demo.model import build_trunk
from trimode.calib.demo.refine import RefinementTraining
from trimode.calib.demo.tasks import examples
from trimode.calib.demo.training import Settings
from trimode.calib.drafter.windows import draft_forward, window_starts
from trimode.calib.reference.device import check_device
from trimode.errors import DeviceError
from trimode.graphs.decoder.attention import MaskedAttention
from trimode.graphs.decoder.trunk import TriModeTrunk


@pytest.fixture
def elsewhere(small_config: dict[str, Any]) -> TriModeTrunk:
    trunk = build_trunk(small_config, 0).to("meta")
    trunk.register_forward_pre_hook(_check_inputs)
    return trunk


def _check_inputs(_: Any, inputs: tuple[Any, ...]) -> None:
    ids, positions, attention, *_ = inputs
    mask = attention.mask if isinstance(attention, MaskedAttention) else attention._mask
    assert [part.device.type for part in (ids, positions, mask)] == ["meta"] * 3


@pytest.fixture
def chats(tokenizer: Tokenizer) -> Chats:
    return encode(list(islice(examples(1, "train"), 3)), tokenizer)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Of what the objective is computed from, which selects by value and so cannot be computed on
    ``meta`` itself.
    """
    found: list[set[str]] = []

    def joint_loss(*parts: Any, **_: Any) -> None:
        tensors = [t for part in parts for t in (part if isinstance(part, tuple) else (part,))]
        found.append({tensor.device.type for tensor in tensors})

    monkeypatch.setattr(trimode.calib.demo.joint, "joint_loss", joint_loss)
    return found


def test_joint_stage(elsewhere: TriModeTrunk, chats: Chats, devices: list[set[str]]) -> None:
    autoregressive_loss(elsewhere, chats)
    denoising_loss(elsewhere, chats, torch.Generator().manual_seed(0))
    assert devices == [{"meta"}] * 2


def test_refinement(
    elsewhere: TriModeTrunk,
    tokenizer: Tokenizer,
    tmp_path: Path,
    devices: list[set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = RefinementTraining(
        elsewhere, tokenizer, Settings(batch_size=2), tmp_path / "state.pt"
    )
    training._begin(3)
    seen: list[Tensor] = []
    # The logits go to the CPU, where it is decided what to reveal; of meta there is nothing to
    # copy.
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape))
    monkeypatch.setattr(training, "_advance", lambda *tensors: seen.extend(tensors))
    training._loss(0.5)
    assert devices == [{"meta"}]
    assert [tensor.device.type for tensor in seen] == ["cpu"] * 4


def test_drafter(elsewhere: TriModeTrunk, chats: Chats) -> None:
    starts = window_starts(chats, 2, torch.Generator().manual_seed(0)).to("meta")
    forward = draft_forward(elsewhere, chats.to(torch.device("meta")), starts, 8)
    assert {part.device.type for part in forward} == {"meta"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_here() -> None:
    check_device("cpu")
    with pytest.raises(DeviceError, match="expected a CUDA device") as raised:
        check_device("cuda")
    assert raised.value.hint is not None
    assert "`device`" in raised.value.hint
